"""Every record exactly once per epoch, whoever reads it, also after an interruption."""

import itertools

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datasets_scripts.files import Folder
from datasets_scripts.shards import commit_shard, finish
from datasets_scripts.streaming import ShardStream


def write_shards(path, sizes, payload=10):
    """Shards of numbered records."""
    folder = Folder(path)
    numbers = itertools.count()
    for index, size in enumerate(sizes):
        rows = (
            {
                "id": f"{next(numbers):06d}",
                "audio": {"bytes": b"x" * payload, "path": None},
                "frames": [],
                "frame_times": [],
                "labels": [],
                "source": "",
                "start": 0.0,
                "duration": 1.0,
            }
            for _ in range(size)
        )
        commit_shard(folder, index, rows)
    finish(folder, {"settings": {"frames": 0}})
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", [100, 33, 1, 0, 64, 207])


TOTAL = 405


def ids(stream_or_loader):
    return [record["id"] for record in stream_or_loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("nodes", [1, 2])
def test_nodes_and_workers_share_the_records(shards, nodes, workers):
    parts = []
    for rank in range(nodes):
        stream = ShardStream(shards, buffer_size=50, rank=rank, world_size=nodes)
        parts.append(ids(DataLoader(stream, batch_size=None, num_workers=workers)))
        assert len(parts[-1]) == stream.num_rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    seen = sorted(itertools.chain(*parts))
    assert seen == [f"{i:06d}" for i in range(TOTAL)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 300), st.integers(0, 5), st.booleans())
def test_any_numbers_of_nodes_and_buffers(shards, nodes, seed, buffer_size, epoch, shuffle):
    seen = []
    for rank in range(nodes):
        stream = ShardStream(shards, ["id"], shuffle, seed, buffer_size, rank, nodes)
        stream.set_epoch(epoch)
        seen += ids(stream)
    assert (sorted(seen) if shuffle else seen) == [f"{i:06d}" for i in range(TOTAL)]


def test_the_order_follows_from_seed_and_epoch(shards):
    def order(seed, epoch):
        stream = ShardStream(shards, seed=seed)
        stream.set_epoch(epoch)
        return ids(stream)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    first = [int(number) for number in order(0, 0)[:100]]
    assert max(first) - min(first) > TOTAL / 2  # from all shards, not from the first


@settings(max_examples=20, deadline=None)
@given(st.integers(0, TOTAL), st.integers(1, 100))
def test_resuming_goes_on_where_it_was(shards, position, buffer_size):
    stream = ShardStream(shards, buffer_size=buffer_size)
    stream.set_epoch(3)
    iterator = iter(stream)
    before = [next(iterator)["id"] for _ in range(position)]
    state = stream.state_dict()
    again = ShardStream(shards, buffer_size=buffer_size)
    again.load_state_dict(state)
    whole = ShardStream(shards, buffer_size=buffer_size)
    whole.set_epoch(3)
    assert before + ids(again) == ids(whole)
    assert len(ids(again)) == TOTAL  # the epoch after that is a whole one


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("batches", [0, 1, 7, 40, 50])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_loader_resumes_in_mid_epoch(shards, workers, batches):
    def loader(skip):
        stream = ShardStream(shards, ["id"], buffer_size=30)
        stream.set_epoch(2)
        if skip:
            stream.skip_batches(skip, 8, workers)
        return DataLoader(stream, batch_size=8, num_workers=workers, collate_fn=ids)

    whole = list(loader(0))
    assert sorted(itertools.chain(*whole[batches:])) == sorted(itertools.chain(*loader(batches)))
    if batches % max(workers, 1) == 0:
        assert list(loader(batches)) == whole[batches:]


def test_a_state_of_other_workers_is_refused(shards):
    stream = ShardStream(shards)
    stream.load_state_dict({"epoch": 0, "positions": [3, 4]})
    with pytest.raises(ValueError, match="2 workers"):
        next(iter(stream))


def test_remote_shards(shards):
    path = "memory://stream/shards"
    write_shards(path, [5, 40])
    assert sorted(ids(ShardStream(path))) == [f"{i:06d}" for i in range(45)]


def test_what_is_no_folder_of_shards_is_refused(tmp_path, shards):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        ShardStream(tmp_path)
    with pytest.raises(ValueError, match="rank"):
        ShardStream(shards, rank=2, world_size=2)


def test_memory_is_that_of_the_buffer(tmp_path):
    """20 MB of records pass through a buffer of 0.6 MB."""
    path = write_shards(tmp_path, [1000] * 2, payload=10_000)
    process = psutil.Process()
    stream = ShardStream(path, buffer_size=64)
    records = iter(stream)
    for _ in range(200):
        next(records)
    before = process.memory_info().rss
    most = max(process.memory_info().rss for _ in records)
    assert most - before < 8 << 20
