"""DALI for Hugging Face transformers: image captioners that hear."""

__version__ = "0.1.0"

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .audio_encoder_dali import DaliAudioModel
from .configuration_dali import DaliAudioConfig, DaliCaptionerConfig, DaliConfig
from .feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .modeling_dali import DaliForConditionalGeneration, DaliModel
from .modeling_dali_captioner import DaliForImageTextToText
from .pipeline_dali import AudioCaptioningPipeline
from .processing_dali import DaliProcessor
from .processing_dali_captioner import DaliCaptionerProcessor

# Where this package is imported the Auto classes know DALI without `trust_remote_code`.
for config_class, model_class in {
    DaliConfig: DaliForConditionalGeneration,
    DaliCaptionerConfig: DaliForImageTextToText,
}.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(config_class, model_class, exist_ok=True)
    AutoFeatureExtractor.register(config_class, KaldiFbankFeatureExtractor, exist_ok=True)
AutoModel.register(DaliAudioConfig, DaliAudioModel, exist_ok=True)
AutoProcessor.register(DaliConfig, DaliProcessor, exist_ok=True)
AutoProcessor.register(DaliCaptionerConfig, DaliCaptionerProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("audio-captioning", AudioCaptioningPipeline, AutoModelForMultimodalLM)

__all__ = [
    "AudioCaptioningPipeline",
    "DaliAudioConfig",
    "DaliAudioModel",
    "DaliCaptionerConfig",
    "DaliCaptionerProcessor",
    "DaliConfig",
    "DaliForConditionalGeneration",
    "DaliForImageTextToText",
    "DaliModel",
    "DaliProcessor",
    "KaldiFbankFeatureExtractor",
]
