"""Streams of prepared shards go on in mid-epoch without reading what was trained on."""

from itertools import chain

import pytest
from torch.utils.data import DataLoader

from datasets_scripts.files import Folder
from datasets_scripts.shards import commit_shard, finish
from datasets_scripts.streaming import ShardStream
from trainers.recipes import load_rows
from trainers.rows import StreamedRows, column_names

ROWS, BATCH = 400, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("shards"))
    for index in range(5):
        rows = ({"id": f"{index}-{i:02d}", "labels": [], "frames": [], "duration": 1.0} for i in range(ROWS // 5))
        commit_shard(folder, index, rows)
    finish(folder, {"settings": {"frames": 0}})
    return folder.path


def ids(rows):
    return [row and row["id"] for row in rows]


def batches(rows, workers, epochs=(1,)):
    loader = DataLoader(rows, BATCH, num_workers=workers, collate_fn=ids, persistent_workers=workers > 0)
    for epoch in epochs:
        rows.set_epoch(epoch)
        yield list(loader)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("trained", [0, 1, 25, 49])
def test_a_resumed_epoch_gives_the_batches_that_were_left(shards, workers, trained):
    ((*whole,), (*after,)) = batches(StreamedRows(load_rows(shards, streaming=True), ROWS), workers, (1, 2))
    assert sorted(chain(*whole)) == sorted(chain(*after)) and whole != after
    rows = StreamedRows(load_rows(shards, streaming=True), ROWS)
    rows.resume(1, trained, BATCH)
    ((*resumed,), (*next_epoch,)) = batches(rows, workers, (1, 2))
    assert resumed[trained:] == whole[trained:] and next_epoch == after
    for batch, expected in zip(resumed[:trained], whole[:trained], strict=True):
        assert batch in (expected, [None] * BATCH)


def test_rows_that_were_trained_on_are_not_read(shards, monkeypatch):
    reads = []
    read = ShardStream._read_block
    monkeypatch.setattr(ShardStream, "_read_block", lambda *args: reads.append(args[-1]) or read(*args))
    rows = StreamedRows(ShardStream(shards, buffer_size=32), ROWS)
    rows.resume(1, 40, BATCH)
    list(batches(rows, 0))
    assert len(reads) <= 2 + 4  # of 15 blocks: those of the first batch, and of the last 80 rows


def test_more_rows_than_there_are_is_an_error(shards):
    assert "frame_times" in column_names(load_rows(shards, streaming=True))
    with pytest.raises(ValueError, match="holds 400 rows, but `train_rows` says 401"):
        StreamedRows(ShardStream(shards), ROWS + 1)
