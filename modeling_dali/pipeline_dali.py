"""
Captions of sounds of any length, window by window.

    pipe = pipeline("audio-captioning", model=DIR_OR_ID, trust_remote_code=True)
    pipe("sound.wav")  # [{"start": 0.0, "end": 10.24, "caption": "..."}, ...]
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import load_image
from transformers.pipelines.base import ChunkPipeline

from .audio_io import read_middle_frame
from .processing_audio import QUESTION

# What a saved model's configuration says about the pipelines whose code lies beside it.
CUSTOM_PIPELINES = {
    "audio-captioning": {
        "impl": "pipeline_dali.AudioCaptioningPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}


@dataclass
class Window:
    """A stretch of sound to caption, and the picture that goes with it."""

    start: float  # seconds
    end: float
    samples: np.ndarray  # mono, at the feature extractor's rate
    image: Image.Image | None = None


def cut_windows(
    processor, sound: Any, sampling_rate: int | None = None, image: Image.Image | None = None
) -> list[Window]:
    """
    All windows of a sound, in order.

    Args:
        processor (`DaliProcessor`): Knows how long a window is.
        sound: A file, URL, bytes or array, as the processor takes it.
        sampling_rate (`int`, *optional*): Of an array, in Hz.
        image (`Image`, *optional*): The picture that goes with all of them.

    Raises:
        ValueError: if the sound cannot be read.
    """
    windows, _ = processor.split_windows([sound], sampling_rate, max_windows=sys.maxsize)
    rate = processor.feature_extractor.sampling_rate
    ends = np.cumsum([len(samples) for samples in windows])
    return [
        Window((end - len(samples)) / rate, end / rate, samples.numpy(), image)
        for end, samples in zip(ends.tolist(), windows, strict=True)
    ]


def caption_windows(model, processor, windows: list[Window], question: str = QUESTION, **generate_kwargs) -> list[str]:
    """
    The captions of windows, in one batch.

    Args:
        model: A DALI model.
        processor (`DaliProcessor`): The model's.
        windows: With a picture, without, or both kinds.
        question (`str`): What to ask.
        generate_kwargs: For the model's `generate`.
    """
    images = [window.image for window in windows if window.image is not None]
    inputs = processor(
        text=[
            processor.caption_prompt("audio" if window.image is None else "audio_image", question)
            for window in windows
        ],
        audio=[window.samples for window in windows],
        images=images or None,
        sampling_rate=processor.feature_extractor.sampling_rate,
        return_tensors="pt",
    ).to(model.device)
    return processor.decode_captions(model.generate(**inputs, **generate_kwargs), inputs)


class AudioCaptioningPipeline(ChunkPipeline):
    """
    Captions sounds, alone or with a picture; what is longer than the model's clip is captioned window by window.

    Example:
        ```python
        pipe = pipeline("audio-captioning", model="runs/demo/model", trust_remote_code=True, batch_size=8)
        pipe(["rain.wav", "street.mp4"], with_video=True)
        ```
    """

    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Windows reach `_forward` as they are and are batched there: there is nothing for the base class to pad.
        self.feature_extractor = self.image_processor = None

    def __call__(self, inputs, **kwargs):
        """
        Args:
            inputs: A sound or a list of sounds: paths of sound or video files, URLs, bytes, arrays, or
                `{"array", "sampling_rate"}`. A `{"audio", "image"}` brings a picture of its own. Data sets and
                generators are captioned as they are read.
            image (`str` or `Image`, *optional*): A picture that goes with every sound.
            with_video (`bool`, defaults to `False`): Take the middle frame of each (video) file as its picture.
            question (`str`, *optional*): What to ask in the place of the default question.
            sampling_rate (`int`, *optional*): Of arrays, in Hz.
            generate_kwargs (`dict`, *optional*): For the model's `generate`, such as `{"max_new_tokens": 32}`.
            batch_size (`int`, defaults to 1): Windows that are captioned together; they may come from several sounds.

        Returns:
            `list[dict]`: For each sound its windows in order: `start` and `end` in seconds, and `caption`. A list of
            these for a list of sounds.

        Raises:
            ValueError: if a sound or a picture cannot be read.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, question=None, generate_kwargs=None, **reading):
        unknown = sorted(reading.keys() - {"image", "with_video", "sampling_rate"})
        if unknown:
            raise TypeError(f"Unknown arguments {unknown}: those for `generate` go into `generate_kwargs`.")
        forward = {} if question is None else {"question": question}
        return reading, forward | (generate_kwargs or {}), {}

    def preprocess(self, sound, image=None, with_video=False, sampling_rate=None) -> Iterator[dict[str, Any]]:
        """The windows of one sound."""
        if isinstance(sound, dict) and "audio" in sound:
            sound, image = sound["audio"], sound.get("image", image)
        if with_video:
            image = read_middle_frame(sound)
        if image is not None:
            image = load_image(image)
        windows = cut_windows(self.processor, sound, sampling_rate, image)
        for number, window in enumerate(windows, start=1):
            yield {"window": window, "is_last": number == len(windows)}

    def _forward(self, inputs: dict[str, Any], **kwargs) -> dict[str, Any]:
        batched = isinstance(inputs["window"], list)
        windows = inputs["window"] if batched else [inputs["window"]]
        captions = caption_windows(self.model, self.processor, windows, **kwargs)
        results = [
            {"start": round(window.start, 3), "end": round(window.end, 3), "caption": caption}
            for window, caption in zip(windows, captions, strict=True)
        ]
        return {"result": results if batched else results[0], "is_last": inputs["is_last"]}

    def postprocess(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The windows of one sound, with their captions."""
        return [output["result"] for output in outputs]
