"""Rows with sound, pictures and captions -> batches for VIP-ANT.

Columns: `id`, `audio` (path, bytes or a `datasets.Audio` dict), `image` or `frames`, `caption` or `captions`, and
`labels`. Training rows carry an `epoch`: frame, caption, crop and masks are then drawn from (seed, epoch, id) alone.
Rows without one get the middle frame, the middle caption, the extractor's own crop and no mask.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from PIL import Image

from trainers.rows import (
    SkippedSamples,
    UnreadableSampleError,
    frame_count,
    pick,
    pick_frame,
    read_audio,
    read_image,
    sample_rng,
)

COLUMNS = {"audio": ("audio",), "image": ("image", "frames"), "text": ("caption", "captions")}


def spec_augment(features: torch.Tensor, frequency_mask: int, time_mask: int) -> torch.Tensor:
    """
    Covers one band of mel bins and one stretch of frames with zeros, the mean of normalised features.

    Args:
        features (`torch.Tensor`): `[frames, bins]`.
        frequency_mask (`int`): Largest width of the band in bins; the width is uniform in `[0, frequency_mask]`.
        time_mask (`int`): Largest length of the stretch in frames, likewise.

    Returns:
        A new tensor.

    Source: Park et al., arXiv 1904.08779; widths from VIP-ANT (32 bins, 200 frames).
    """
    features = features.clone()
    for dimension, largest in ((1, frequency_mask), (0, time_mask)):
        size = features.shape[dimension]
        width = int(torch.randint(min(largest, size) + 1, ()))
        start = int(torch.randint(size - width + 1, ()))
        features.narrow(dimension, start, width).zero_()
    return features


def seeded(rng: np.random.Generator | None) -> AbstractContextManager:
    """Lets torch's random numbers in the block follow from those of a sample, and no others from them."""
    return nullcontext() if rng is None else _seeded(int(rng.integers(2**62)))


@contextmanager
def _seeded(seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class ClipCollator:
    """
    Batches of sounds, pictures and texts.

    A clip that cannot be decoded becomes a blank one of weight zero; it is logged and counted (see
    [`SkippedSamples`]).

    Args:
        processor (`VipAntProcessor`): The model's.
        modalities (`Sequence[str]`): Which of `"audio"`, `"image"`, `"text"` a batch holds.
        frequency_mask, time_mask (`int`, *optional*, defaults to 0): See [`spec_augment`].
        cache_features (`bool`, *optional*, defaults to `False`): Whether spectrograms and pictures of training rows
            are kept in memory, in half precision, once they are made; for small data sets of short clips.
        max_skipped (`float`, *optional*, defaults to 0.01): Largest share of clips that may fail to decode.
        seed (`int`, *optional*, defaults to 42): Of everything random.
    """

    def __init__(
        self,
        processor,
        modalities: Sequence[str],
        frequency_mask: int = 0,
        time_mask: int = 0,
        cache_features: bool = False,
        max_skipped: float = 0.01,
        seed: int = 42,
    ):
        self.processor = processor
        self.modalities = modalities
        self.masks = (frequency_mask, time_mask)
        self.cache_features = cache_features
        self.known: dict[tuple, torch.Tensor] = {}
        self.skips = SkippedSamples(max_skipped)
        self.seed = seed

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The columns it reads, for [`require_columns`]."""
        return [COLUMNS[modality] for modality in self.modalities]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            What the modalities ask for of `input_features` `[B, frames, bins]`, `pixel_values`
            `[B, 3, height, width]`, `input_ids` and `attention_mask` `[B, length]`; and `pair_weight` `[B]`, 0 for
            clips that could not be decoded, else 1.
        """
        examples = [self.skips.attempt(self.read, row) for row in rows]
        weight = torch.tensor([float(example is not None) for example in examples])
        if not weight.all():
            blank = self.blank(rows[0])
            examples = [blank if example is None else example for example in examples]
        names = [name for name in ("input_features", "pixel_values", "labels") if name in examples[0]]
        batch = {name: torch.stack([example[name] for example in examples]) for name in names}
        if "input_ids" in examples[0]:
            texts = {"input_ids": [example["input_ids"] for example in examples]}
            batch |= self.processor.tokenizer.pad(texts, return_tensors="pt")
        return batch | {"pair_weight": weight}

    def read(self, row: dict) -> dict[str, torch.Tensor]:
        """
        Decodes one row: `input_features` `[frames, bins]`, `pixel_values` and `input_ids`.

        Raises:
            ValueError, OSError: if that cannot be done.
        """
        rng = sample_rng(self.seed, row)
        example = {}
        if "audio" in self.modalities:
            example["input_features"] = self.sound(row, rng)
        if "image" in self.modalities:
            frame = pick_frame(frame_count(row), rng)
            cell = row["frames"][frame] if "frames" in row else row["image"]
            key = row.get("index"), frame
            example["pixel_values"] = self.remembered(key, rng, lambda: self.pixels(read_image(cell)))
        if "text" in self.modalities:
            captions = row["captions"] if "captions" in row else [row["caption"]]
            if not captions:
                raise UnreadableSampleError("the row has no caption")
            example["input_ids"] = self.tokens(pick(captions, rng, len(captions) // 2))
        return example

    def sound(self, row: dict, rng: np.random.Generator | None) -> torch.Tensor:
        """Spectrogram `[frames, bins]` of a row's sound, masked in training."""
        with seeded(rng):
            features = self.remembered(
                (row.get("index"),), rng, lambda: self.features(self.waveform(row), training=rng is not None)
            )
            return self.masked(features, training=rng is not None)

    def masked(self, features: torch.Tensor, training: bool) -> torch.Tensor:
        """Spectrogram `[frames, bins]`, in training with masks."""
        return spec_augment(features, *self.masks) if training and any(self.masks) else features

    def remembered(self, key: tuple, rng, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, for training rows from memory where it is there."""
        if not self.cache_features or rng is None:
            return make()
        if key not in self.known:
            self.known[key] = make().half()
        return self.known[key].float()

    def waveform(self, row: dict) -> torch.Tensor:
        """A row's sound `[samples]` at the extractor's rate."""
        return torch.from_numpy(read_audio(row["audio"], self.processor.feature_extractor.sampling_rate))

    def features(self, waveform: torch.Tensor, training: bool = False) -> torch.Tensor:
        """
        Spectrogram `[frames, bins]`, in training of a random part of the sound.

        Raises:
            UnreadableSampleError: if it is not finite.
        """
        extractor = self.processor.feature_extractor
        features = extractor(
            [waveform],
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            crop="random" if training else None,
            truncation=True,
        )["input_features"][0]
        if not features.isfinite().all():
            raise UnreadableSampleError("the sound gives features that are not finite")
        return features

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """A picture as the image tower takes it `[3, height, width]`."""
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]

    def tokens(self, text: str) -> torch.Tensor:
        """A text as the text tower takes it `[length]`."""
        return self.processor.tokenizer(text, truncation=True, return_tensors="pt")["input_ids"][0]

    def blank(self, row: dict) -> dict[str, torch.Tensor]:
        """What stands in for a row that cannot be decoded."""
        example = {}
        if "audio" in self.modalities:
            example["input_features"] = self.features(torch.zeros(self.processor.feature_extractor.window_samples))
        if "image" in self.modalities:
            example["pixel_values"] = self.pixels(Image.new("RGB", (32, 32)))
        if "text" in self.modalities:
            example["input_ids"] = self.tokens("")
        return example
