"""Training records from shards, one after the other: shuffled, split over nodes and workers, resumable in mid-epoch.

The order of an epoch follows from seed and epoch alone: blocks of rows from all shards are permuted, cut into one
stretch of equal length (within one record) for each worker of each node, and rows are shuffled within buffers along
the stretch. A position in it is therefore one number, and resuming reads no record that was seen before.
(`datasets.IterableDataset` drops what its shuffle buffers hold when it resumes, and gives workers whole shards.)
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import IterableDataset, get_worker_info

from datasets_scripts.files import Folder
from datasets_scripts.shards import ROW_GROUP, read_manifest


class ShardStream(IterableDataset):
    """The records of a folder of parquet shards, for a `DataLoader` with any number of workers.

    Under `transformers.Trainer` leave `rank` and `world_size` alone: accelerate splits what the data set gives. In a
    loop of one's own pass those of the process.

    Args:
        path: local folder or URL, written by `prepare` or `filter_pairs`.
        columns: to be read; all by default.
        shuffle: otherwise records come in their order in the shards.
        seed: of the order.
        buffer_size: records that are shuffled with each other, and held in memory, in each worker.
        rank: of this process among `world_size`.
        world_size: number of processes that share the records.

    Raises:
        FileNotFoundError: if the folder holds no finished parquet shards.
        ValueError: if the numbers make no sense.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        columns: list[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        buffer_size: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size or buffer_size < 1:
            raise ValueError(
                f"expected 0 <= rank < world_size and buffer_size >= 1, got {rank=}, {world_size=}, {buffer_size=}"
            )
        self.path, self.columns, self.shuffle, self.seed, self.buffer_size = path, columns, shuffle, seed, buffer_size
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._positions: list[int] = []  # of the workers, where the next iteration starts; none: at the beginning
        files = read_manifest(path)["files"]
        self._names = [file["name"] for file in files]
        blocks = [(i, row) for i, file in enumerate(files) for row in range(0, file["rows"], ROW_GROUP)]
        self._blocks = np.array(blocks, np.int64).reshape(-1, 2)  # (file, first row)
        rows = np.array([file["rows"] for file in files], np.int64)
        self._sizes = np.minimum(rows[self._blocks[:, 0]] - self._blocks[:, 1], ROW_GROUP)

    @property
    def num_rows(self) -> int:
        """Number of records that this process gets in an epoch. (A length would promise records by index.)"""
        first, last = _stretch(int(self._sizes.sum()), self.rank, self.world_size)
        return last - first

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that are read."""
        with Folder(self.path).open(self._names[0]) as handle:
            return self.columns or pq.read_schema(handle).names

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration, which starts at the beginning."""
        self.epoch = epoch
        self._positions = []

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: in this process, or in the worker that calls it (torchdata's StatefulDataLoader)."""
        return {"epoch": self.epoch, "positions": list(self._positions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration go on from a state; with the same data, seed and numbers of nodes and workers."""
        self.epoch, self._positions = state["epoch"], list(state["positions"])

    def skip_batches(self, batches: int, batch_size: int, workers: int = 0) -> None:
        """Lets the next iteration go on after batches that a `DataLoader` gave in this epoch, before the interruption.

        Args:
            batches: number of batches.
            batch_size: of the loader.
            workers: of the loader, which takes batches from them in turn.
        """
        workers = max(workers, 1)
        self._positions = [
            (batches // workers + (worker < batches % workers)) * batch_size for worker in range(workers)
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields records: columns by name, sounds and pictures as `{"bytes", "path"}`."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self._positions and len(self._positions) != workers:
            raise ValueError(f"the state is of {len(self._positions)} workers, there are {workers}")
        position = self._positions[worker] if self._positions else 0
        self._positions = []  # the next iteration starts afresh, unless it is told otherwise
        order = np.arange(len(self._blocks))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        ends = np.cumsum(self._sizes[order])
        # A process has its stretch of all records, a worker its stretch of that; longer ones come first, so that
        # a loader that takes batches in turn runs out of them in turn.
        first, last = _stretch(int(ends[-1]), self.rank, self.world_size)
        begin, end = _stretch(last - first, worker, workers)
        begin, end = first + begin, first + end
        folder = Folder(self.path)
        held: dict[int, pa.Table] = {}  # the block that the next buffer may begin in
        while position < end - begin:
            offset = position % self.buffer_size
            start = begin + position - offset
            table = self._read(folder, held, order, ends, start, min(start + self.buffer_size, end))
            rows = np.arange(len(table))
            if self.shuffle:
                np.random.default_rng([self.seed, self.epoch, start]).shuffle(rows)
            for row in rows[offset:]:
                position += 1
                self._positions = [0] * worker + [position] + [0] * (workers - worker - 1)
                yield table.slice(row, 1).to_pylist()[0]
        self._positions = []

    def _read(
        self, folder: Folder, held: dict[int, pa.Table], order: np.ndarray, ends: np.ndarray, start: int, stop: int
    ) -> pa.Table:
        """Reads records `start` to `stop` of the epoch's sequence of blocks."""
        pieces = []
        for i in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1):
            if i not in held:
                held.clear()
                held[i] = self._read_block(folder, int(order[i]))
            before = int(ends[i]) - len(held[i])
            low, high = max(start - before, 0), min(stop - before, len(held[i]))
            pieces.append(held[i].slice(low, high - low))
        return pa.concat_tables(pieces)

    def _read_block(self, folder: Folder, block: int) -> pa.Table:
        file, row = self._blocks[block]
        with folder.open(self._names[file]) as handle:
            parquet = pq.ParquetFile(handle)
            if parquet.metadata.row_group(row // ROW_GROUP).num_rows != self._sizes[block]:
                raise ValueError(f"{self._names[file]} is not as the manifest says; run prepare again")
            return parquet.read_row_group(row // ROW_GROUP, columns=self.columns, use_threads=False)


def _stretch(total: int, part: int, parts: int) -> tuple[int, int]:
    """The bounds of one of equal parts; the first ones are one longer where it does not divide."""
    size, longer = divmod(total, parts)
    first = part * size + min(part, longer)
    return first, first + size + (part < longer)
