"""DALI for Hugging Face transformers: a LLaVA captioner that hears."""

__version__ = "0.1.0"

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .audio_encoder_dali import DaliAudioModel
from .configuration_dali import DaliAudioConfig, DaliConfig
from .feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .modeling_dali import DaliForConditionalGeneration, DaliModel
from .processing_dali import DaliProcessor

# Where this package is imported the Auto classes know DALI without `trust_remote_code`.
AutoConfig.register("dali", DaliConfig, exist_ok=True)
AutoModel.register(DaliConfig, DaliForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(DaliConfig, DaliForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(DaliConfig, DaliForConditionalGeneration, exist_ok=True)
AutoModel.register(DaliAudioConfig, DaliAudioModel, exist_ok=True)
AutoFeatureExtractor.register(DaliConfig, KaldiFbankFeatureExtractor, exist_ok=True)
AutoProcessor.register(DaliConfig, DaliProcessor, exist_ok=True)

__all__ = [
    "DaliAudioConfig",
    "DaliAudioModel",
    "DaliConfig",
    "DaliForConditionalGeneration",
    "DaliModel",
    "DaliProcessor",
    "KaldiFbankFeatureExtractor",
]
