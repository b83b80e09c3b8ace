import json
import os
import signal

import pytest
import torch

from tests.tiny import tiny_dali
from tests.trainers.dali import stage_worker
from tests.trainers.stages import clips, wav
from trainers.dali import pseudo_captions
from trainers.dali.pseudo_captions import (
    PseudoCaptionConfig,
    read_pseudo_captions,
    write_on_ray,
    write_pseudo_captions,
)
from trainers.rows import TooManySkippedError, without_decoding


def caption(folder, rows=None, kill_shard=-1, rank=0, world=1, port=0, **options):
    """Captions the small world; may be killed in the middle of writing a shard."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if kill_shard >= 0:
        write = pseudo_captions.write_captions

        def cut_short(path, rows):
            write(path, rows)
            if f"-{kill_shard:05d}." in path.name:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        pseudo_captions.write_captions = cut_short
    model, processor = tiny_dali(prefix=4)
    options = {"shard_size": 3, "batch_size": 2, "max_new_tokens": 6, "temperature": 1.0} | options
    config = PseudoCaptionConfig(output=str(folder), **options)
    return write_pseudo_captions(model, processor, clips(8) if rows is None else rows, config)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert caption(folder) == {"captions": 8, "skipped": 0}
    return files(folder)


def test_rows(whole):
    rows = [json.loads(line) for k in range(3) for line in whole[f"captions-{k:05d}.jsonl"].decode().splitlines()]
    assert [row["id"] for row in rows] == [f"clip{i}" for i in range(8)]
    assert all(row.keys() == {"id", "caption"} for row in rows) and len({row["caption"] for row in rows}) > 3


def test_sampling_is_the_released_codes(monkeypatch):
    """`generate` of LLaVA/generate_pseudo_labels.py (line 300): temperature 0.2, 128 tokens, one beam, and
    transformers' own top_k of 50; greedy where the temperature is 0."""
    model, processor = tiny_dali(prefix=4)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: (calls.append(given), generate(**given))[1])
    collator = pseudo_captions.new_collator(processor, PseudoCaptionConfig())
    for config in (PseudoCaptionConfig(), PseudoCaptionConfig(temperature=0.0)):
        pseudo_captions.caption_shard(model, processor, collator, list(clips(1)), config)
    sampled, greedy = calls
    expected = {
        "do_sample": True,
        "temperature": 0.2,
        "top_k": 50,
        "top_p": 1.0,
        "max_new_tokens": 128,
        "num_beams": 1,
    }
    assert {name: sampled[name] for name in expected} == expected
    assert greedy["do_sample"] is False and "temperature" not in greedy


def test_killed_and_run_again(whole, tmp_path):
    assert stage_worker.start(caption, tmp_path, None, 1) == [-signal.SIGKILL]
    assert (tmp_path / "captions-00000.jsonl").exists() and not (tmp_path / "captions-00001.jsonl").exists()
    caption(tmp_path)
    assert files(tmp_path) == whole


def test_two_processes_write_the_same(whole, tmp_path):
    assert stage_worker.start(caption, tmp_path, world=2) == [0, 0]
    assert files(tmp_path) == whole


def test_ray_writes_the_same(whole, tmp_path, ray_cluster):
    model, processor = tiny_dali(prefix=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    clips(8).save_to_disk(tmp_path / "rows")
    options = {
        "shard_size": 3,
        "batch_size": 2,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "engine": "ray",
        "workers": 2,
    }
    config = PseudoCaptionConfig(
        model=str(tmp_path / "model"), dataset=str(tmp_path / "rows"), output=str(tmp_path / "out"), **options
    )
    assert write_on_ray(config) == {"captions": 8, "skipped": 0}
    written = files(tmp_path / "out")
    assert {k: v for k, v in written.items() if k != "settings.json"} == {
        k: v for k, v in whole.items() if k != "settings.json"
    }


def test_streams_write_the_same(whole, tmp_path):
    caption(tmp_path, clips(8).to_iterable_dataset())
    captions = {name: data for name, data in files(tmp_path).items() if name.startswith("captions")}
    assert captions == {name: data for name, data in whole.items() if name.startswith("captions")}


def test_parquet(whole, tmp_path):
    caption(tmp_path, file_format="parquet")
    rows = [json.loads(line) for k in range(3) for line in whole[f"captions-{k:05d}.jsonl"].decode().splitlines()]
    assert read_pseudo_captions(tmp_path) == {row["id"]: row["caption"] for row in rows}


def test_one_at_a_time_says_the_same(tmp_path):
    rows = without_decoding(clips(6)).to_list()
    for index, row in enumerate(rows):
        row["audio"] = wav(index, seconds=0.3 + 0.5 * (index % 3))  # one to three windows
    caption(tmp_path / "many", rows, batch_size=6, temperature=0.0)
    caption(tmp_path / "one", rows, batch_size=1, temperature=0.0)
    assert read_pseudo_captions(tmp_path / "many") == read_pseudo_captions(tmp_path / "one")


def test_undecodable_clips_are_listed(tmp_path):
    rows = without_decoding(clips(8)).to_list()
    rows[4]["audio"] = {"bytes": b"no sound", "path": None}
    assert caption(tmp_path, rows) == {"captions": 7, "skipped": 1}
    assert json.loads((tmp_path / "skipped-00001.json").read_text()) == ["clip4"]
    assert "clip4" not in read_pseudo_captions(tmp_path)
    rows[5]["audio"] = rows[4]["audio"]
    with pytest.raises(TooManySkippedError, match="the last was clip5"):
        caption(tmp_path / "again", rows)
    assert not (tmp_path / "again" / "captions-00001.jsonl").exists()


def test_other_settings_are_refused(tmp_path):
    caption(tmp_path)
    with pytest.raises(ValueError, match="shard_size was 3, is 4"):
        caption(tmp_path, shard_size=4)
    with pytest.raises(ValueError, match="empty"):
        caption(tmp_path / "new", clips(8).select([]))
    with pytest.raises(ValueError, match="no column `audio`"):
        caption(tmp_path / "new", clips(8).remove_columns("audio"))


def test_ids_that_are_not_unique(tmp_path):
    rows = without_decoding(clips(2)).to_list()
    rows[1]["id"] = rows[0]["id"]
    caption(tmp_path, rows)
    with pytest.raises(ValueError, match="two captions for the clip clip0"):
        read_pseudo_captions(tmp_path)
    with pytest.raises(ValueError, match="holds no captions"):
        read_pseudo_captions(tmp_path / "nowhere")
