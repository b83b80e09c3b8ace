"""Processor of VIP-ANT: sound, image and text to the model's inputs."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from transformers.processing_utils import ProcessingKwargs


class VipAntAudioKwargs(TypedDict, total=False):
    """Keyword arguments about sound. `padding`, `truncation` and `max_length` apply to text unless they are given in
    `audio_kwargs={...}`."""

    sampling_rate: int | Sequence[int] | None
    crop: str | None
    return_tensors: str | None


class VipAntProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`VipAntProcessor`]."""

    audio_kwargs: VipAntAudioKwargs  # type: ignore[misc]


class VipAntProcessor(ProcessorMixin):
    """The audio front end, CLIP's image processor and CLIP's tokenizer in one.

    Args:
        feature_extractor: A `KaldiFbankFeatureExtractor` with VIP-ANT's numbers (`vipant_feature_extractor()`).
        image_processor: CLIP's image processor.
        tokenizer: CLIP's tokenizer.

    A sound that is longer than the feature extractor's clip is heard whole, in windows that the model weights by their
    duration, unless `crop` ("center", "start" or "random") or `audio_kwargs={"truncation": True}` says that a part
    will do.

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

    def _process_audio(self, audio: list, sampling_rate=None, return_tensors=None, **kwargs) -> tuple[dict, list]:
        """Features of sounds, whole: where one is longer than a clip, all come in windows with `window_seconds`."""
        if any(kwargs.get(name) is not None for name in ("crop", "truncation", "max_length")):  # a part is asked for
            return super()._process_audio(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)
        extractor = self.feature_extractor
        clips = [extractor.split(clip) for clip in extractor.read(audio, sampling_rate)]
        features = extractor(
            [window for windows, _ in clips for window in windows],
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            **kwargs,
        )
        if len(features["input_features"]) > len(clips):
            counts = [len(windows) for windows, _ in clips]
            features = {name: pad_sequence(tensor.split(counts), True) for name, tensor in features.items()}
            seconds = [torch.tensor(seconds) for _, seconds in clips]
            features["window_seconds"] = pad_sequence(seconds, batch_first=True)
        if return_tensors is None:
            features = {name: list(tensor.numpy()) for name, tensor in features.items()}
        return features, []

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
