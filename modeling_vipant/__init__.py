"""VIP-ANT: audio, image and text in one embedding space.

Importing this package makes transformers' auto classes know VIP-ANT, without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoProcessor,
)

from modeling_dali import KaldiFbankFeatureExtractor

from .configuration_vipant import VipAntAudioConfig, VipAntConfig
from .feature_extraction_vipant import vipant_feature_extractor
from .modeling_vipant import VipAntAudioModel, VipAntForAudioClassification, VipAntModel
from .processing_vipant import VipAntProcessor

AutoConfig.register("vipant", VipAntConfig)
AutoModel.register(VipAntConfig, VipAntModel)
AutoModelForAudioClassification.register(VipAntConfig, VipAntForAudioClassification)
AutoFeatureExtractor.register(VipAntConfig, KaldiFbankFeatureExtractor)
AutoProcessor.register(VipAntConfig, VipAntProcessor)

__all__ = [
    "VipAntAudioConfig",
    "VipAntAudioModel",
    "VipAntConfig",
    "VipAntForAudioClassification",
    "VipAntModel",
    "VipAntProcessor",
    "vipant_feature_extractor",
]
