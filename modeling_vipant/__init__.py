"""VIP-ANT: audio, image and text in one embedding space."""

from .configuration_vipant import VipAntAudioConfig, VipAntConfig
from .feature_extraction_vipant import VipAntFeatureExtractor
from .modeling_vipant import VipAntAudioModel, VipAntForAudioClassification, VipAntModel
from .processing_vipant import VipAntProcessor

__all__ = [
    "VipAntAudioConfig",
    "VipAntAudioModel",
    "VipAntConfig",
    "VipAntFeatureExtractor",
    "VipAntForAudioClassification",
    "VipAntModel",
    "VipAntProcessor",
]
