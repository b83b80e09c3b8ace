"""Processor of VIP-ANT: sound, image and text to the model's inputs."""

from transformers import ProcessorMixin

# Not used below: a saved processor carries the code of its feature extractor by this import.
from .feature_extraction_vipant import VipAntFeatureExtractor  # noqa: F401


class VipAntProcessor(ProcessorMixin):
    """The audio front end, CLIP's image processor and CLIP's tokenizer in one.

    Args:
        feature_extractor: A `VipAntFeatureExtractor`.
        image_processor: CLIP's image processor.
        tokenizer: CLIP's tokenizer.

    Example:
        ```python
        inputs = processor(audio=[waveform], text=["rain on a tin roof"], sampling_rate=44_100, return_tensors="pt")
        logits = model(**inputs).logits_per_audio
        ```
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, feature_extractor=None, image_processor=None, tokenizer=None):
        super().__init__(feature_extractor, image_processor, tokenizer)


VipAntProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VipAntProcessor"]
