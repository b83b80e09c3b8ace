"""Rows of a data set -> inputs of DALI: decoding, features, prompts, labels and masks.

    Trainer(model, TrainingArguments("out", remove_unused_columns=False), data_collator=DaliDataCollator(processor),
            train_dataset=rows)

Columns: `id`, `audio` (path, bytes or `{"path", "bytes"}`), `image` or `frames` (the same, or PIL), `caption` or
`captions`. The stage trainers put an `epoch` into training rows: then frame, caption and augmentation are drawn at
random, from (seed, epoch, id) alone. So they are the same whichever worker, process or resumed run draws them. Rows
without an epoch get the middle frame, the first caption and no augmentation.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from modeling_dali.processing_audio import IGNORED, MODALITIES, QUESTION
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

Modality = Literal["audio", "image", "audio_image"]
NOISE = 0.1  # largest amplitude of the uniform noise on normalised log-mel frames


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
        seed: Seed of the choice among several captions or frames.
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
    picture: Image.Image | torch.Tensor


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
        first_frame: Whether the first frame of a clip is always taken.
        cache_features: Whether features of training rows are kept in memory once they are computed.
        max_skipped: Tolerated share of samples that cannot be decoded.
        seed: Seed of everything random.
    """

    def __init__(
        self,
        processor,
        image_tokens=None,
        mask_padding: bool = False,
        augment: bool = True,
        first_frame: bool = False,
        cache_features: bool = False,
        max_skipped: float = 0.01,
        seed: int = 42,
    ):
        self.extractor = processor.feature_extractor
        self.processor = processor
        self.image_tokens = image_tokens
        self.mask_padding = mask_padding
        self.augment = augment
        self.first_frame = first_frame
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
            `input_features` [B, frames, bins]; what the captioner's image processor gives (`pixel_values` [B, 3,
            height, width] for LLaVA) or `image_tokens` [B, m, d];
            `pair_weight` [B], 0 for samples that could not be decoded, else 1; `input_features_mask` [B, frames] with
            `mask_padding`.
        """
        pairs = [self.skips.attempt(self.read, row) for row in rows]
        weight = torch.tensor([float(pair is not None) for pair in pairs])
        if not weight.all():
            blank = self.blank(rows[0])
            pairs = [blank if pair is None else pair for pair in pairs]
        batch = {"input_features": torch.stack([pair.input_features for pair in pairs]), "pair_weight": weight}
        pictures: Any = [pair.picture for pair in pairs]
        if self.is_cached(rows[0]):
            batch["image_tokens"] = torch.stack(pictures)
        else:
            batch |= self.processor.image_inputs(pictures)
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
            picture = self.image_tokens.read(row["index"], rng, self.first_frame)
        else:
            frame = pick_frame(frame_count(row), rng, self.first_frame)
            picture = read_image(row["frames"][frame] if "frames" in row else row["image"])
        features, mask = self.features_of(row)
        if rng is not None and self.augment:
            features, mask = augment(features, mask, rng)
        return Pair(features, mask, picture)

    def features_of(self, row: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and mask of a row's sound."""
        keep = self.cache_features and "epoch" in row
        if keep and row["index"] in self.known:
            return self.known[row["index"]]
        found = self.features(read_audio(row["audio"], self.extractor.sampling_rate))
        if keep:
            self.known[row["index"]] = found
        return found

    def features(self, sound: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and mask of one sound."""
        require_frame(sound, self.extractor)
        output = self.extractor([sound], sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        mask = output["input_features_mask"][0] if self.mask_padding else None
        return output[self.extractor.model_input_names[0]][0], mask

    def is_cached(self, row: dict) -> bool:
        """Whether image tokens stand in for the row's pictures."""
        return self.image_tokens is not None and "epoch" in row

    def blank(self, row: dict) -> Pair:
        """What stands in for a row that cannot be decoded."""
        features, mask = self.features(blank_sound(self.extractor))
        if self.is_cached(row):
            return Pair(features, mask, self.image_tokens.blank())
        return Pair(features, mask, Image.new("RGB", (32, 32)))


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
