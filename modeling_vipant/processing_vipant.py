"""Processor of VIP-ANT: sound, image and text to the model's inputs."""

from transformers import ProcessorMixin


class VipAntProcessor(ProcessorMixin):
    """The audio front end, CLIP's image processor and CLIP's tokenizer in one.

    Args:
        feature_extractor: A `KaldiFbankFeatureExtractor` with VIP-ANT's numbers (`vipant_feature_extractor()`).
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

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Lists of texts, pictures and sounds; the sounds are unread: the feature extractor does that."""
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        return images, text, videos, self.feature_extractor.fetch_audio(audio)


VipAntProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VipAntProcessor"]
