"""Rows of a data set -> inputs of DALI: decoding, features, prompts, labels and masks.

    Trainer(model, TrainingArguments("out", remove_unused_columns=False), data_collator=DaliDataCollator(processor),
            train_dataset=rows)

Columns: `id`, `audio` (path, bytes or `{"path", "bytes"}`), `image` or `frames` (the same, or PIL), `caption` or
`captions`. The stage trainers put an `epoch` into training rows: then frame, caption and augmentation are drawn at
random, from (seed, epoch, id) alone. So they are the same whichever worker, process or resumed run draws them. Rows
without an epoch get the middle frame, the first caption and no augmentation.
"""

import io
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import soxr
import torch
from PIL import Image
from transformers.utils import logging

from modeling_dali.audio_io import load_audio
from modeling_dali.processing_dali import IGNORED, MODALITIES, QUESTION

logger = logging.get_logger(__name__)

NOISE = 0.1  # largest amplitude of the uniform noise on normalised log-mel frames
MAX_WORKERS = 64


class TooManySkippedError(RuntimeError):
    """More samples than allowed could not be decoded."""


class UnreadableSampleError(ValueError):
    """A row whose sound, picture or caption cannot be used."""


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def column_names(rows) -> list[str]:
    """Column names of a `datasets` data set, or the keys of the first row of anything else."""
    names = getattr(rows, "column_names", None)
    return list(names) if names else list(next(iter(rows), {}))


def require_columns(rows, needed: Sequence[tuple[str, ...]], what: str) -> None:
    """
    Checks a data set before work starts.

    Args:
        rows: The data set.
        needed: Groups of names, one of each of which must be there, such as `[("audio",), ("image", "frames")]`.
        what: What the data set is for, for messages.

    Raises:
        ValueError: if it is empty, or a column is missing.
    """
    names = column_names(rows)
    if not names or (hasattr(rows, "__len__") and len(rows) == 0):
        raise ValueError(f"The data set for {what} is empty.")
    for group in needed:
        if not any(name in names for name in group):
            raise ValueError(
                f"The data set for {what} has no column `{'` or `'.join(group)}`; its columns are {', '.join(names)}."
            )


def without_decoding(rows):
    """The same rows with sounds and pictures as paths or bytes: the collator decodes what it uses, and only that."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, (datasets.Audio, datasets.Image)):
            rows = rows.cast_column(name, type(feature)(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def _payload(value):
    """A path or bytes out of a cell."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return io.BytesIO(value) if isinstance(value, bytes) else value


def read_audio(value, sampling_rate: int, seconds: float | None = None) -> np.ndarray:
    """
    Mono sound of a row.

    Args:
        value: The cell: a path, bytes, `{"path", "bytes"}` or `{"array", "sampling_rate"}`.
        sampling_rate: Wanted rate in Hz.
        seconds: Cut to this length.

    Returns:
        [samples], float32.

    Raises:
        UnreadableSampleError: if there is none, or it holds NaN.
    """
    if value is None:
        raise UnreadableSampleError("the row has no sound")
    if isinstance(value, dict) and value.get("array") is not None:
        waveform, rate = np.atleast_2d(np.asarray(value["array"], dtype=np.float32)), value["sampling_rate"]
    else:
        waveform, rate = load_audio(_payload(value))
    samples = waveform[0]
    if seconds is not None:
        samples = samples[: math.ceil(seconds * rate)]
    if not np.isfinite(samples).all():
        raise UnreadableSampleError("the sound holds NaN or infinite samples")
    return samples if rate == sampling_rate else soxr.resample(samples, rate, sampling_rate)


def read_image(value) -> Image.Image:
    """Picture of a row: a PIL image, a path, bytes or `{"path", "bytes"}`."""
    if value is None:
        raise UnreadableSampleError("the row has no picture")
    image = value if isinstance(value, Image.Image) else Image.open(_payload(value))
    return image.convert("RGB")


def sample_rng(seed: int, row: dict) -> np.random.Generator | None:
    """Randomness of one training row; None for a row that is not trained on."""
    if "epoch" not in row:
        return None
    return np.random.default_rng([seed, row["epoch"], zlib.crc32(sample_id(row).encode())])


def sample_id(row: dict) -> str:
    """The row's id, or its number where the data set has no ids."""
    return str(row["id"] if row.get("id") is not None else row.get("index", "without id"))


def pick(values: Sequence, rng: np.random.Generator | None, default: int) -> Any:
    """A random one of `values`, or without randomness the one at `default`."""
    return values[default if rng is None else int(rng.integers(len(values)))]


def frame_count(row: dict) -> int:
    """Pictures of a row."""
    if "frames" not in row:
        return 1
    if not row["frames"]:
        raise UnreadableSampleError("the row has no frames")
    return len(row["frames"])


def pick_frame(count: int, rng: np.random.Generator | None) -> int:
    """A random frame, or without randomness the middle one."""
    return pick(range(count), rng, count // 2)


# ---------------------------------------------------------------------------------------------------------------------
# Samples that cannot be decoded


class SkippedSamples:
    """
    Counts samples that cannot be decoded, over all dataloader workers of a process.

    Args:
        max_share: Largest tolerated share of the samples seen so far (at least a hundred).
    """

    def __init__(self, max_share: float):
        self.max_share = max_share
        # Seen and skipped, one row a worker, in memory that all of them share.
        self.counts = torch.zeros(MAX_WORKERS, 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """Samples tried."""
        return int(self.counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """Samples that could not be decoded."""
        return int(self.counts[:, 1].sum())

    def attempt(self, read, row: dict):
        """
        `read(row)`, or None if the sample cannot be decoded.

        Raises:
            TooManySkippedError: if this one makes them more than the tolerated share.
        """
        worker = torch.utils.data.get_worker_info()
        counts = self.counts[0 if worker is None else (worker.id + 1) % MAX_WORKERS]
        counts[0] += 1
        try:
            return read(row)
        except (ValueError, OSError, SyntaxError) as error:  # SyntaxError: Pillow's, for broken PNG files
            counts[1] += 1
            logger.warning(f"Sample {sample_id(row)} is skipped: {error}")
            if self.skipped > self.max_share * max(self.seen, 100):
                raise TooManySkippedError(
                    f"{self.skipped} of {self.seen} samples could not be decoded, more than {self.max_share:.1%} "
                    f"(`max_skipped`); the last was {sample_id(row)}: {error}"
                ) from error
            return None


# ---------------------------------------------------------------------------------------------------------------------
# Captioning: stages 1a and 2, pseudo-captions, fine-tuning


class CaptionSample(NamedTuple):
    """What a prompt and its answer are made of."""

    sound: np.ndarray | None
    picture: Image.Image | None
    caption: str | None


class DaliDataCollator:
    """
    Prompts with their media and, as labels, their captions.

    A sample that cannot be decoded becomes a blank one without labels, so that it weighs nothing; it is logged and
    counted (see [`SkippedSamples`]).

    Args:
        processor: The model's `DaliProcessor`.
        modality: `"audio"`, `"image"` or `"audio_image"`: what the prompt holds.
        prefix: Whether the soft prefix is part of the prompt; by default if the model holds one.
        question: What the prompt asks.
        captions: Whether there are captions to learn; without, the batch has no labels.
        max_skipped: Tolerated share of samples that cannot be decoded.
        seed: Of the choice among several captions or frames.
    """

    def __init__(
        self,
        processor,
        modality: str = "audio",
        prefix: bool | None = None,
        question: str = QUESTION,
        captions: bool = True,
        max_skipped: float = 0.01,
        seed: int = 42,
    ):
        self.processor = processor
        self.modality = modality
        self.prompt = processor.caption_prompt(modality, question, prefix)
        self.captions = captions
        self.skips = SkippedSamples(max_skipped)
        self.seed = seed

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The columns it reads, for [`require_columns`]."""
        groups = {"audio": ("audio",), "image": ("image", "frames")}
        needed = [groups[kind] for kind in MODALITIES[self.modality]]
        return [*needed, ("caption", "captions")] if self.captions else needed

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: See the top of this file.

        Returns:
            `input_ids`, `attention_mask`, `labels` (unless `captions` is off), `pixel_values`, `input_features`.

        Raises:
            ValueError: if a column is missing.
            TooManySkippedError: see `max_skipped`.
        """
        for group in self.columns:
            if not any(name in rows[0] for name in group):
                raise ValueError(
                    f"The rows have no `{'` or `'.join(group)}`, only {', '.join(rows[0])}. (Plain `Trainer`s drop "
                    "columns unless `remove_unused_columns=False`.)"
                )
        samples = [self.skips.attempt(self.read, row) for row in rows]
        batch = self.encode([self.blank() if sample is None else sample for sample in samples])
        for index, sample in enumerate(samples):
            if sample is None and self.captions:
                batch["labels"][index] = IGNORED
        return batch

    def read(self, row: dict) -> CaptionSample:
        """
        Decodes one row.

        Raises:
            ValueError, OSError: if that cannot be done.
        """
        rng = sample_rng(self.seed, row)
        sound = picture = caption = None
        kinds = MODALITIES[self.modality]
        if self.captions:
            captions = row["captions"] if row.get("captions") else [row.get("caption")]
            caption = pick(captions, rng, 0)
            if not caption or not caption.strip():
                raise UnreadableSampleError("the row has no caption")
        if "audio" in kinds:
            extractor = self.processor.feature_extractor
            sound = read_audio(row["audio"], extractor.sampling_rate)
            require_frame(sound, extractor)
            self.processor.split_windows([sound], extractor.sampling_rate)  # raises if there are too many
        if "image" in kinds:
            if row.get("image") is not None:
                picture = read_image(row["image"])
            else:
                picture = read_image(row["frames"][pick_frame(frame_count(row), rng)] if "frames" in row else None)
        return CaptionSample(sound, picture, caption)

    def encode(self, samples: list[CaptionSample]) -> dict[str, torch.Tensor]:
        """The inputs of the model for decoded samples."""
        kinds = MODALITIES[self.modality]
        media: dict[str, Any] = {}
        if "audio" in kinds:
            media |= {
                "audio": [sample.sound for sample in samples],
                "sampling_rate": self.processor.feature_extractor.sampling_rate,
            }
        if "image" in kinds:
            media["images"] = [sample.picture for sample in samples]
        if self.captions:
            media["suffix"] = [sample.caption for sample in samples]
        return dict(self.processor(text=[self.prompt] * len(samples), return_tensors="pt", **media))

    def blank(self) -> CaptionSample:
        """What stands in for a sample that cannot be decoded."""
        return CaptionSample(blank_sound(self.processor.feature_extractor), Image.new("RGB", (32, 32)), "")


def require_frame(sound: np.ndarray, extractor) -> None:
    """Checks that a sound fills at least one frame, where the extractor tells how long that is."""
    needed = getattr(extractor, "frame_samples", 1)
    if len(sound) < needed:
        raise UnreadableSampleError(f"the sound has {len(sound)} samples, less than one frame of {needed}")


def blank_sound(extractor) -> np.ndarray:
    """Silence of a clip's length."""
    return np.zeros(getattr(extractor, "window_samples", extractor.sampling_rate), dtype=np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Alignment: stage 1b


class Pair(NamedTuple):
    """One clip's sound and one of its pictures (or the tokens of that)."""

    input_features: torch.Tensor
    input_features_mask: torch.Tensor | None
    picture: torch.Tensor


class AlignmentCollator:
    """
    Log-mel features of clips and one frame of each, no text.

    Training rows get a random frame, noise U(0, 1) * U(0, 0.1) on the features, and a random roll of their time axis.

    Args:
        processor: The model's `DaliProcessor`.
        image_tokens: An [`ImageTokenCache`] of the training data: training rows take image tokens from it, in place
            of pictures.
        mask_padding: Whether the batch has `input_features_mask`, so that padding is left out of the loss.
        augment: Whether to add noise and roll.
        cache_features: Whether features of training rows are kept in memory once they are computed.
        max_skipped: Tolerated share of samples that cannot be decoded.
        seed: Of everything random.
    """

    def __init__(
        self,
        processor,
        image_tokens=None,
        mask_padding: bool = False,
        augment: bool = True,
        cache_features: bool = False,
        max_skipped: float = 0.01,
        seed: int = 42,
    ):
        self.extractor = processor.feature_extractor
        self.image_processor = processor.image_processor
        self.image_tokens = image_tokens
        self.mask_padding = mask_padding
        self.augment = augment
        self.cache_features = cache_features
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # features and mask by row
        self.skips = SkippedSamples(max_skipped)
        self.seed = seed

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The columns it reads, for [`require_columns`]."""
        return [("audio",), ("image", "frames")]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_features` [B, frames, bins]; `pixel_values` [B, 3, height, width] or `image_tokens` [B, m, d];
            `pair_weight` [B], 0 for samples that could not be decoded, else 1; `input_features_mask` [B, frames] with
            `mask_padding`.
        """
        pairs = [self.skips.attempt(self.read, row) for row in rows]
        weight = torch.tensor([float(pair is not None) for pair in pairs])
        if not weight.all():
            blank = self.blank(rows[0])
            pairs = [blank if pair is None else pair for pair in pairs]
        picture = "image_tokens" if self.is_cached(rows[0]) else "pixel_values"
        batch = {
            "input_features": torch.stack([pair.input_features for pair in pairs]),
            picture: torch.stack([pair.picture for pair in pairs]),
            "pair_weight": weight,
        }
        if self.mask_padding:
            batch["input_features_mask"] = torch.stack([pair.input_features_mask for pair in pairs])
        return batch

    def read(self, row: dict) -> Pair:
        """
        Decodes one row.

        Raises:
            ValueError, OSError: if that cannot be done.
        """
        rng = sample_rng(self.seed, row)
        if self.is_cached(row):
            picture = self.image_tokens.read(row["index"], rng)
        else:
            frame = pick_frame(frame_count(row), rng)
            picture = self.pixels(read_image(row["frames"][frame] if "frames" in row else row["image"]))
        features, mask = self.features_of(row)
        if rng is not None and self.augment:
            features, mask = augment(features, mask, rng)
        return Pair(features, mask, picture)

    def features_of(self, row: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and mask of a row's sound."""
        keep = self.cache_features and "epoch" in row
        if keep and row["index"] in self.known:
            return self.known[row["index"]]
        window = getattr(self.extractor, "window_samples", None)
        seconds = None if window is None else window / self.extractor.sampling_rate
        found = self.features(read_audio(row["audio"], self.extractor.sampling_rate, seconds))
        if keep:
            self.known[row["index"]] = found
        return found

    def features(self, sound: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and mask of one sound."""
        require_frame(sound, self.extractor)
        output = self.extractor([sound], sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        mask = output["input_features_mask"][0] if self.mask_padding else None
        return output[self.extractor.model_input_names[0]][0], mask

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """A picture as the image tower takes it [3, height, width]."""
        return self.image_processor(picture, return_tensors="pt")["pixel_values"][0]

    def is_cached(self, row: dict) -> bool:
        """Whether image tokens stand in for the row's pictures."""
        return self.image_tokens is not None and "epoch" in row

    def blank(self, row: dict) -> Pair:
        """What stands in for a row that cannot be decoded."""
        features, mask = self.features(blank_sound(self.extractor))
        if self.is_cached(row):
            return Pair(features, mask, self.image_tokens.blank())
        return Pair(features, mask, self.pixels(Image.new("RGB", (32, 32))))


def augment(
    features: torch.Tensor, mask: torch.Tensor | None, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Noise U(0, 1) * U(0, 0.1) on the features, then a roll of the time axis by up to its whole length either way.

    Args:
        features: [frames, bins] (or the other way round: time is the longest axis).
        mask: [frames], rolled along.
        rng: Randomness of the sample.

    Source: DALI's released code, training augmentation of stage 1b.
    """
    noise = rng.random(features.shape, dtype=np.float32) * np.float32(rng.uniform(0, NOISE))
    time = int(np.argmax(features.shape))
    length = features.shape[time]
    shift = int(rng.integers(-length + 1, length))
    features = torch.roll(features + torch.from_numpy(noise), shift, dims=time)
    return features, None if mask is None else torch.roll(mask, shift, dims=0)
