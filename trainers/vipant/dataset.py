"""Clips for VIP-ANT's trainers: rows with sound, pictures and captions become tensors, one example at a time.

Columns: `id`, `audio` (path, bytes or a `datasets.Audio` dict), `image` or `frames`, `caption` or `captions`, and
`labels`.
"""

from collections.abc import Sequence

import datasets
import torch
from transformers.utils import logging

from trainers.rows import read_audio, read_image, require_columns, without_decoding

logger = logging.get_logger(__name__)


class TooManyUnreadableError(RuntimeError):
    """More clips than allowed could not be read."""


def spec_augment(features: torch.Tensor, frequency_mask: int, time_mask: int) -> torch.Tensor:
    """Covers one band of mel bins and one stretch of frames with zeros, the mean of normalised features.

    Args:
        features: `[frames, bins]`.
        frequency_mask: Largest width of the band in bins; the width is uniform in `[0, frequency_mask]`.
        time_mask: Largest length of the stretch in frames, likewise.

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


def pick(values: Sequence, training: bool):
    """A random value in training, else the middle one."""
    if len(values) == 0:
        raise ValueError("nothing to pick from: an empty list of frames or captions")
    return values[int(torch.randint(len(values), ()))] if training else values[len(values) // 2]


class ClipDataset(torch.utils.data.Dataset):
    """Rows as tensors. A clip that cannot be read is logged, counted and replaced by the next one.

    Args:
        rows: The data set.
        processor: A `VipAntProcessor`.
        modalities: Which of "audio", "image", "text" an example holds.
        training: Whether frame and caption are random and the spectrogram is masked; else the middle frame and
            caption are taken and nothing is masked.
        frequency_mask: See `spec_augment`.
        time_mask: See `spec_augment`.
        max_skipped: Largest tolerated share of unreadable clips among those read so far (at least a hundred);
            beyond it `TooManyUnreadableError` is raised.

    Raises:
        ValueError: If the data set is empty or a column is missing.
    """

    COLUMNS = {"audio": ("audio",), "image": ("image", "frames"), "text": ("caption", "captions")}

    def __init__(
        self,
        rows: datasets.Dataset,
        processor,
        modalities: Sequence[str],
        training: bool,
        frequency_mask: int = 0,
        time_mask: int = 0,
        max_skipped: float = 0.01,
    ):
        require_columns(rows, [self.COLUMNS[modality] for modality in modalities], "VIP-ANT")
        self.rows = without_decoding(rows)
        self.processor = processor
        self.training = training
        self.masks = (frequency_mask, time_mask)
        self.max_skipped = max_skipped
        self.columns = {
            modality: next(name for name in self.COLUMNS[modality] if name in rows.column_names)
            for modality in modalities
        }
        self.read = self.unreadable = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for offset in range(len(self)):
            row = self.rows[(index + offset) % len(self)]
            self.read += 1
            try:
                return self.example(row)
            except (ValueError, OSError) as error:
                self.unreadable += 1
                logger.warning(f"clip {row.get('id', index)} is replaced by the next: {error}")
                allowed = self.max_skipped * max(self.read, 100)
                if self.unreadable > allowed:
                    raise TooManyUnreadableError(
                        f"{self.unreadable} of {self.read} clips could not be read, more than "
                        f"{self.max_skipped:.1%}; the last was {row.get('id', index)}: {error}"
                    ) from error
        raise TooManyUnreadableError("no clip of the data set can be read")

    def example(self, row: dict) -> dict[str, torch.Tensor]:
        """One row's tensors: `input_features` `[frames, bins]`, `pixel_values`, `input_ids`."""
        example = {}
        if "audio" in self.columns:
            example["input_features"] = self.features(self.waveform(row))
        if "image" in self.columns:
            value = row[self.columns["image"]]
            if self.columns["image"] == "frames":
                value = pick(value, self.training)
            example["pixel_values"] = self.processor.image_processor(read_image(value), return_tensors="pt")[
                "pixel_values"
            ][0]
        if "text" in self.columns:
            value = row[self.columns["text"]]
            if self.columns["text"] == "captions":
                value = pick(value, self.training)
            tokenizer = self.processor.tokenizer
            example["input_ids"] = tokenizer(value, truncation=True, return_tensors="pt")["input_ids"][0]
        return example

    def waveform(self, row: dict) -> torch.Tensor:
        """A row's sound as the front end needs it: `[samples]`, at the extractor's rate."""
        return torch.from_numpy(read_audio(row["audio"], self.processor.feature_extractor.sampling_rate))

    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Spectrogram `[frames, bins]`, in training of a random part of the sound, and masked."""
        extractor = self.processor.feature_extractor
        features = extractor(
            [waveform],
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            crop="random" if self.training else None,
            truncation=True,
        )
        features = features["input_features"][0]
        return spec_augment(features, *self.masks) if self.training and any(self.masks) else features

    def collate(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch as the model takes it."""
        return stack(examples, self.processor.tokenizer)


def stack(examples: list[dict[str, torch.Tensor]], tokenizer) -> dict[str, torch.Tensor]:
    """Stacks examples; texts are padded to the longest and get an `attention_mask`.

    Args:
        examples: As `ClipDataset` gives them.
        tokenizer: Pads the texts.
    """
    names = [name for name in ("input_features", "pixel_values", "labels") if name in examples[0]]
    batch: dict[str, torch.Tensor] = {name: torch.stack([example[name] for example in examples]) for name in names}
    if "input_ids" in examples[0]:
        texts = {"input_ids": [example["input_ids"] for example in examples]}
        batch |= tokenizer.pad(texts, return_tensors="pt")
    return batch
