"""Rows of a data set: which columns they must have, how their cells are decoded, what happens to those that cannot be.

Columns: `id`, `audio` (path, bytes or `{"path", "bytes"}`), `image` or `frames` (the same, or PIL), `caption` or
`captions`, `labels`. Training rows carry an `epoch`: what is random is then drawn from (seed, epoch, id) alone, so it
is the same whichever worker, process or resumed run draws it.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from datasets_scripts.streaming import ShardStream
from modeling_dali import audio_io

logger = logging.get_logger(__name__)

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


def read_audio(value, sampling_rate: int) -> np.ndarray:
    """
    Mono sound of a row.

    Args:
        value: The cell: a path, bytes, `{"path", "bytes"}` or `{"array", "sampling_rate"}`.
        sampling_rate: Wanted rate in Hz.

    Returns:
        [samples], float32.

    Raises:
        ClipError: if there is none, or it cannot be read.
    """
    return audio_io.read_audio(value, target_rate=sampling_rate)[0]


def read_image(value) -> Image.Image:
    """Picture of a row, upright and in RGB: a PIL image, a path, bytes or `{"path", "bytes"}`."""
    if value is None:
        raise UnreadableSampleError("the row has no picture")
    return audio_io.read_image(value)


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


def pick_frame(count: int, rng: np.random.Generator | None, first: bool = False) -> int:
    """A random frame, or without randomness the middle one; or always the first."""
    return 0 if first else pick(range(count), rng, count // 2)


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
# Rows in an order that follows from seed and epoch


class Rows(torch.utils.data.Dataset):
    """
    Rows of a data set with their `index`, and in training with the `epoch`.

    Args:
        rows: Anything with a length and rows by index.
    """

    def __init__(self, rows):
        self.rows = without_decoding(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """The row of an index, or of (epoch, index)."""
        if isinstance(key, tuple):
            return {**self.rows[key[1]], "epoch": key[0], "index": key[1]}
        return {**self.rows[key], "index": key}


class EpochSampler(torch.utils.data.Sampler):
    """
    Gives (epoch, index) in an order that follows from seed and epoch alone.

    Args:
        length (`int`): Number of rows.
        seed (`int`): Seed of the order.
        weights (`torch.Tensor`, *optional*): `[length]`; rows are then drawn with replacement, in proportion to them.
            By default an epoch is a permutation.
    """

    def __init__(self, length: int, seed: int, weights: torch.Tensor | None = None):
        self.length, self.seed, self.weights, self.epoch = length, seed, weights, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the data loader calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        epoch = self.epoch
        if self.weights is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator)
        return ((epoch, index) for index in order.tolist())


class StreamedRows(torch.utils.data.IterableDataset):
    """
    Rows of a stream, with `epoch` and `index`; one pass over it is one epoch.

    Args:
        stream: A `ShardStream`, a `datasets.IterableDataset` or any iterable that can be gone through again.
        length (`int`): Rows of one pass, by which schedules know how far training is.

    Raises:
        ValueError: if the stream is known to hold fewer rows.
    """

    def __init__(self, stream, length: int):
        if isinstance(stream, ShardStream) and stream.num_rows < length:
            raise ValueError(f"The stream holds {stream.num_rows} rows, but `train_rows` says {length}.")
        self.stream, self.length = without_decoding(stream), length
        self._interrupted = (-1, 0, 0)  # epoch, batches of it that were trained on, rows in each
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Tells the rows, and a stream that shuffles, which epoch it is."""
        self._epoch.fill_(epoch)

    def resume(self, epoch: int, batches: int, batch_size: int) -> None:
        """
        Lets an epoch go on where an interrupted run was.

        Args:
            epoch (`int`): The epoch.
            batches (`int`): How many of its batches were trained on. The loader gives them again and drops them; the
                rows come as None, and those of a `ShardStream` are not read.
            batch_size (`int`): Rows of a batch, of all processes together.
        """
        self._interrupted = (epoch, batches, batch_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict | None]:
        epoch = int(self._epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        worker = torch.utils.data.get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # In workers these streams share out their rows by themselves.
        shares, mine = (1, 0) if hasattr(self.stream, "set_epoch") else (workers, number)
        first, end = self._rows_to_drop(epoch, workers, number)
        count = given = 0
        for index, row in self._numbered(first, end, workers):
            if index == self.length:
                return
            count += 1
            if index % shares == mine:
                given += 1
                yield None if first < given <= end else {**row, "epoch": epoch, "index": index}
        if worker is None and count < self.length:
            raise ValueError(f"The stream ends after {count} rows, but `train_rows` says {self.length}.")

    def _rows_to_drop(self, epoch: int, workers: int, number: int) -> tuple[int, int]:
        """First and end of a worker's rows that come as None: its first batch may fill up an incomplete last one."""
        interrupted, batches, batch_size = self._interrupted
        if epoch != interrupted:
            return 0, 0
        mine = batches // workers + (number < batches % workers)  # the loader takes batches from workers in turn
        return min(mine, 1) * batch_size, mine * batch_size

    def _numbered(self, first: int, end: int, workers: int) -> Iterator[tuple[int, dict]]:
        """Rows and their numbers; those to be dropped are only counted where the stream can go on behind them."""
        if not isinstance(self.stream, ShardStream) or first == end:
            yield from enumerate(self.stream)
            return
        state = self.stream.state_dict()
        yield from enumerate(islice(self.stream, first))
        yield from ((index, {}) for index in range(first, end))
        self.stream.load_state_dict({**state, "positions": [end] * workers})
        yield from enumerate(self.stream, end)


class WithIds:
    """
    A collator whose batches also hold the `ids` of their rows, so that an error can name a clip.

    Args:
        collator: Makes a batch of rows.
    """

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        """The collator's batch, and `ids`; nothing for rows that a resumed run drops (see [`StreamedRows`])."""
        if rows[0] is None:
            return {}
        return {**self.collator(rows), "ids": [sample_id(row) for row in rows]}
