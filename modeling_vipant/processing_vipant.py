"""Processor of VIP-ANT: sound, image and text to the model's inputs."""

from collections.abc import Sequence
from typing import TypedDict

from transformers import ProcessorMixin
from transformers.processing_utils import ProcessingKwargs


class VipAntAudioKwargs(TypedDict, total=False):
    """What a call may say about sound without naming it: `padding` and `max_length` are of text."""

    sampling_rate: int | Sequence[int] | None
    crop: str | None
    truncation: bool | None
    return_tensors: str | None


class VipAntProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """What a call of [`VipAntProcessor`] may say."""

    audio_kwargs: VipAntAudioKwargs  # type: ignore[misc]


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

    valid_processor_kwargs = VipAntProcessorKwargs
    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, feature_extractor=None, image_processor=None, tokenizer=None):
        super().__init__(feature_extractor, image_processor, tokenizer)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Lists of texts, pictures and sounds; the sounds are unread: the feature extractor does that."""
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        return images, text, videos, self.feature_extractor.fetch_audio(audio)

    def _merge_kwargs(self, ModelProcessorKwargs=None, tokenizer_init_kwargs=None, **kwargs) -> dict:
        """The base class's, which would drop keywords that nothing knows."""
        groups = self.valid_processor_kwargs.__annotations__
        known = {"common_kwargs", "videos", *groups, *self.image_processor.valid_kwargs.__annotations__}
        known |= {name for group in groups.values() for name in getattr(group, "__annotations__", ())}
        unknown = sorted(name for name in set(kwargs) - known if kwargs[name] is not None)
        if unknown:
            raise TypeError(f"Unknown arguments {unknown}: texts are `text`, pictures `images`, sounds `audio`.")
        return super()._merge_kwargs(ModelProcessorKwargs, tokenizer_init_kwargs, **kwargs)


VipAntProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VipAntProcessor"]
