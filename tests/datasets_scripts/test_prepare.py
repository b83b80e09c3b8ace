"""From videos to shards: whole, resumable, the same on Ray, and unharmed by hostile files."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from datasets_scripts import prepare as module
from datasets_scripts.clips import ClipRequest
from datasets_scripts.files import Folder, locked
from datasets_scripts.prepare import clips_of, main, prepare
from datasets_scripts.records import Limits, Settings, failure
from datasets_scripts.shards import open_shards
from datasets_scripts.workers import guarded_map
from tests.datasets_scripts.videos import lag, make_video, number
from tests.datasets_scripts.workloads import small_record

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Fourteen clips of a second, in two folders, of which two have a fault."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    make_video(folder / "a.mp4", 1, video="mpeg4", rate=16_000, layout="mono")
    for i in range(11):
        shutil.copy(folder / "a.mp4", folder / "more" / f"clip {i:02d}.mp4")
    make_video(folder / "mute.mp4", 1, video="mpeg4", audio=None)
    (folder / "void.mp4").touch()
    (folder / "notes.txt").write_text("no video")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder of shards, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(source: Path, output: Path, *options: str) -> int:
    return main([str(source), "--output", str(output), "--shard-size", "4", "--workers", "2", "--quiet", *options])


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "shards"
    assert run(videos, output) == 0
    return output


def test_shards_hold_every_clip_once_or_list_it(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert (manifest["clips"], manifest["rows"]) == (14, 12)
    assert manifest["failures"] == {"empty": 1, "no_audio": 1}
    failures = [json.loads(line) for line in (prepared / "failures.jsonl").read_text().splitlines()]
    assert {failure["id"]: failure["reason"] for failure in failures} == {"mute": "no_audio", "void": "empty"}
    rows = [row for path in sorted((prepared / "shards").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == ["a", *(f"more/clip {i:02d}" for i in range(11))]
    for file in manifest["files"]:
        import hashlib

        data = (prepared / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    waveform, rate = soundfile.read(io.BytesIO(rows[3]["audio"]["bytes"]))
    assert rate == 16_000 and abs(len(waveform) - 16_000) <= 1600 and abs(lag(waveform, 0)) < 0.02
    assert [number(Image.open(io.BytesIO(frame["bytes"]))) for frame in rows[3]["frames"]] == list(range(10))


def test_datasets_reads_the_folder(prepared, tmp_path):
    dataset = datasets.load_dataset(str(prepared), split="train", cache_dir=str(tmp_path))
    assert len(dataset) == 12
    assert set(dataset[0]["audio"]) == {"bytes", "path"}
    decoded = dataset.cast_column("frames", datasets.List(datasets.Image()))
    assert decoded[0]["frames"][2].size == (64, 64)
    streamed = list(open_shards(prepared, streaming=True))
    assert [row["id"] for row in streamed] == dataset["id"]


def test_a_second_run_changes_nothing_and_reads_nothing(videos, prepared, monkeypatch):
    before = content(prepared)
    monkeypatch.setattr(module, "read_record", None)
    assert run(videos, prepared) == 0
    assert content(prepared) == before


def test_other_settings_or_another_source_are_refused(videos, prepared, tmp_path, capsys):
    assert run(videos, prepared, "--frames", "3") == 1
    assert "frames was 10, is 3" in capsys.readouterr().err
    shutil.copytree(videos, tmp_path / "other")
    shutil.copy(videos / "a.mp4", tmp_path / "other" / "b.mp4")
    assert run(tmp_path / "other", prepared) == 1
    assert "clips was 14, is 15" in capsys.readouterr().err
    assert run(tmp_path / "none", prepared) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "output") == 1
    assert "no clip" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from datasets_scripts import files, prepare, shards

def dying(method, at):
    calls = 0
    def call(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments, **keywords)
    return call

where, at = sys.argv[1], int(sys.argv[2])
owner = {"add": shards.Journal, "remove": shards.Journal, "write_json": files.Folder}.get(where, files.HashingFile)
setattr(owner, where, dying(getattr(owner, where), at))
sys.exit(prepare.main(sys.argv[3:]))
"""


def test_killed_runs_end_like_one_that_was_not(videos, prepared, tmp_path):
    """Killed while clips come in, in the middle of a shard, before its report, after it, and in the manifest."""
    output = tmp_path / "killed"
    arguments = [str(videos), "--output", str(output), "--shard-size", "4", "--workers", "2", "--quiet"]
    moments = [("add", 3), ("write", 9), ("write_json", 1), ("remove", 1), ("write_json", 4)]
    for where, at in moments:
        process = subprocess.run([sys.executable, "-c", KILLED, where, str(at), *arguments], cwd=REPOSITORY)
        assert process.returncode == -signal.SIGKILL, f"{where} {at} did not come"
    assert main(arguments) == 0
    assert content(output) == content(prepared)


def test_killed_at_a_random_moment(videos, prepared, tmp_path):
    generator = np.random.default_rng()
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "datasets_scripts.prepare", str(videos), "--output", str(output)]
    command += ["--shard-size", "4", "--workers", "2", "--quiet"]
    for _ in range(2):
        process = subprocess.Popen(command, cwd=REPOSITORY)
        try:
            process.wait(timeout=float(generator.uniform(0.8, 2.0)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
    assert content(output) == content(prepared)


def test_finished_clips_of_a_killed_run_are_not_read_again(videos, tmp_path, monkeypatch):
    reads = []
    journal = module.Journal(tmp_path / "output" / "_work" / "shard-000000.sqlite")
    requests = list(clips_of(videos)())

    def recording(function, items, *limits):
        return guarded_map(function, (reads.append(item[1][0].id) or item for item in items), *limits)

    count, fingerprint = module._survey(clips_of(videos))
    plan = {"clips": count, "fingerprint": fingerprint, **module.asdict(Settings())}
    Folder(tmp_path / "output").write_json("plan.json", plan)
    for i, request in enumerate(requests[:5]):
        journal.add(i, {**small_record((request, None)), "file": request.file_state()})
    journal.add(5, {**small_record((requests[5], None)), "file": [1, 2]})  # as the file was before
    journal.close()
    monkeypatch.setattr(module, "guarded_map", recording)
    prepare(clips_of(videos), tmp_path / "output", workers=1, progress=False)
    assert reads == [request.id for request in requests[5:]]


def test_a_journal_gives_back_what_it_got_and_runs_nothing(tmp_path):
    request = ClipRequest("a", "a.mp4", str(tmp_path), labels=("x", "y"))
    record = {**small_record((request, None)), "frames": [{"bytes": b"", "path": None}, {"bytes": b"1", "path": None}]}
    outcomes = [{**record, "file": None}, {**failure("b", "silent", "\u2028"), "file": [3, 4]}]
    journal = module.Journal(tmp_path / "shard.sqlite")
    for i, outcome in enumerate(outcomes):
        journal.add(i, outcome)
    assert list(journal.outcomes()) == outcomes
    journal._database.execute("UPDATE clips SET outcome = ? WHERE position = 0", (pickle.dumps(Path("x")),))
    with pytest.raises(ValueError):
        list(journal.outcomes())
    journal.close()
    (tmp_path / "shard.sqlite").write_bytes(b"no database")
    assert module.Journal(tmp_path / "shard.sqlite").finished([]) == set()


def test_changed_files_are_refused_or_read_anew(videos, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(videos, source)
    assert run(source, output) == 0
    before = content(output)
    make_video(source / "more" / "clip 03.mp4", 1, video="mpeg4", rate=16_000, layout="mono", fps=5)
    capsys.readouterr()
    assert run(source, output) == 1
    assert "the file of 'more/clip 03' has changed since shard-000001 was made" in capsys.readouterr().err
    assert content(output) == before
    assert run(source, output, "--refresh") == 0
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy2)
    assert run(tmp_path / "copy", tmp_path / "fresh") == 0
    assert content(output) == content(tmp_path / "fresh") != before


@pytest.mark.parametrize("fault", ["empty report", "short shard", "no shard"])
def test_what_a_full_disk_may_leave_of_a_shard_is_made_anew(videos, prepared, tmp_path, fault):
    output = tmp_path / "output"
    shutil.copytree(prepared, output)
    report, shard = output / "reports" / "shard-000001.json", output / "shards" / "shard-000001.parquet"
    if fault == "empty report":
        report.write_bytes(b"")
    elif fault == "short shard":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    assert run(videos, output) == 0
    assert content(output) == content(prepared)


def test_files_of_others_in_the_output_folder_stay(videos, tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    theirs = [tmp_path / ".a.mp4.partial", tmp_path / "shards" / ".b.1.dali-partial.parquet"]
    for path in theirs:
        path.touch()
    (tmp_path / "shards" / "c.parquet").touch()
    assert run(videos, tmp_path) == 1  # refused: nothing is removed
    assert "holds shards but no plan.json" in capsys.readouterr().err
    assert all(path.exists() for path in theirs)


def test_two_runs_at_once_are_refused(videos, tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match=f"in use by another run.*process {os.getpid()}"):
        prepare(clips_of(videos), tmp_path, progress=False)


def test_ray_gives_the_same_files(videos, prepared, tmp_path, ray_cluster):
    assert run(videos, tmp_path / "ray", "--engine", "ray") == 0
    assert content(tmp_path / "ray") == content(prepared)


def test_remote_folders(videos, prepared):
    output = "memory://somewhere/shards"
    assert run(videos, output) == 0
    filesystem = fsspec.filesystem("memory")
    for name, data in content(prepared).items():
        assert filesystem.cat(f"/somewhere/shards/{name}") == data
    assert run(videos, output) == 0
    assert [row["id"] for row in open_shards(output, streaming=True)][:2] == ["a", "more/clip 00"]


def test_an_index_cuts_whole_videos_and_takes_cut_ones(tmp_path):
    times = make_video(tmp_path / "AAAAAAAAAAA.mp4", 6, fps=10, video="mpeg4", gop=10)
    make_video(tmp_path / "BBBBBBBBBBB_000030.mp4", 2, video="mpeg4")
    make_video(tmp_path / "CCCCCCCCCCC_30.000.mp4", 1, video="mpeg4")
    index = tmp_path / "index.csv"
    index.write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=4\n# YTID, start_seconds, end_seconds, labels\n"
        'AAAAAAAAAAA, 3.000, 5.000, "/m/04rlf,/m/09x0r"\n'
        'BBBBBBBBBBB, 30.000, 32.000, "/m/09x0r"\n'
        'CCCCCCCCCCC, 30.000, 40.000, "/m/09x0r"\n'
        'DDDDDDDDDDD, 30.000, 40.000, "/m/09x0r"\n'
        '../../etc/passwd, 0.000, 10.000, "/m/09x0r"\n'
        "EEEEEEEEEEE, 5.000, 3.000, /m/09x0r\n"
    )
    assert run(index, tmp_path / "output", "--frames", "4") == 0
    rows = pq.read_table(tmp_path / "output" / "shards").to_pylist()
    assert [row["id"] for row in rows] == ["AAAAAAAAAAA_3.000", "BBBBBBBBBBB_30.000"]
    assert rows[0]["labels"] == ["/m/04rlf", "/m/09x0r"] and rows[0]["start"] == 3
    shown = [times[number(Image.open(io.BytesIO(frame["bytes"])))] for frame in rows[0]["frames"]]
    assert np.allclose(shown, [3, 3.5, 4, 4.5])
    lines = (tmp_path / "output" / "failures.jsonl").read_text().splitlines()
    failures = {failure["id"]: failure["reason"] for failure in map(json.loads, lines)}
    assert failures == {
        "CCCCCCCCCCC_30.000": "too_short",
        "DDDDDDDDDDD_30.000": "missing",
        "line-8": "bad_index",
        "line-9": "bad_index",
    }
    make_video(tmp_path / "DDDDDDDDDDD_30.mp4", 10, fps=2, video="mpeg4")  # has come since
    assert run(index, tmp_path / "output", "--frames", "4", "--refresh") == 0
    ids = pq.read_table(tmp_path / "output" / "shards")["id"].to_pylist()
    assert ids == ["AAAAAAAAAAA_3.000", "BBBBBBBBBBB_30.000", "DDDDDDDDDDD_30.000"]


def test_hostile_sources_cost_little_and_write_nothing_outside(videos, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(videos / "a.mp4", outside / "secret.mp4")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(videos / "a.mp4", source / "good.mp4")
    shutil.copy(videos / "a.mp4", source / "evil; rm -rf ~ $(x) .. .mp4")
    shutil.copy(videos / "a.mp4", os.fsencode(source) + b"/caf\xe9.mp4")
    (source / "link.mp4").symlink_to(outside / "secret.mp4")
    (source / "loop.mp4").symlink_to(source / "loop.mp4")
    (source / "zero.mp4").symlink_to("/dev/zero")
    (source / "inside.mp4").symlink_to(source / "good.mp4")
    os.mkfifo(source / "pipe.mp4")
    (source / "folder.mp4").mkdir()
    with (source / "endless.mpg").open("wb") as file:  # a terabyte of nothing, after a start that looks right
        file.write(b"\x00\x00\x01\xba" + b"\x44" * 10 + b"\x00\x00\x01\xe0" + bytes(200))
        file.truncate(1 << 40)
    (source / "playlist.mp4").write_text(f"ffconcat version 1.0\nfile {outside / 'secret.mp4'}\n")
    with (source / "huge.mp4").open("wb") as file:
        file.write((videos / "a.mp4").read_bytes())
        file.truncate(1 << 40)
    before = content(outside), sorted(path.name for path in source.iterdir())
    output = tmp_path / "output"
    assert run(source, output, "--timeout", "4") == 0
    lines = (output / "failures.jsonl").read_text().splitlines()
    failures = {failure["id"]: failure["reason"] for failure in map(json.loads, lines)}
    assert failures.pop("endless") in ("timeout", "damaged")
    assert failures.pop("huge", "timeout") in ("timeout", "damaged")
    assert failures.pop("loop") in ("damaged", "not_a_file")
    assert failures == {
        "link": "outside_source",
        "zero": "outside_source",
        "pipe": "not_a_file",
        "playlist": "damaged",
    }
    assert (content(outside), sorted(path.name for path in source.iterdir())) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "outside", "source"]
    ids = pq.read_table(output / "shards")["id"].to_pylist()
    assert {"good", "inside", "evil; rm -rf ~ $(x) .. ", "caf\ufffd"} <= set(ids)


def test_a_list_stays_below_its_folder_unless_it_says_otherwise(videos, tmp_path):
    (tmp_path / "lists").mkdir()
    shutil.copy(videos / "a.mp4", tmp_path / "secret.mp4")
    shutil.copy(videos / "a.mp4", tmp_path / "lists" / "a.mp4")
    names = ["a.mp4", "../secret.mp4", "x/../../secret.mp4", str(videos / "a.mp4"), "gone.mp4"]
    (tmp_path / "lists" / "files.txt").write_text("# a comment\n\n" + "\n".join(names) + "\n")
    assert run(tmp_path / "lists" / "files.txt", tmp_path / "output") == 0
    assert pq.read_table(tmp_path / "output" / "shards")["id"].to_pylist() == ["a", str(videos / "a")]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "output" / "failures.jsonl").open()]
    assert reasons == ["outside_source", "outside_source", "missing"]


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    requests = [ClipRequest("a", "a.mp4", "."), ClipRequest("b", "b.mp4", "."), ClipRequest("a", "c.mp4", ".")]
    with pytest.raises(ValueError, match="'a' occurs twice"):
        prepare(lambda: requests, tmp_path, progress=False)


@pytest.mark.parametrize("wrong", [{"frames": -1}, {"shard_size": 0}, {"frame_size": 3}, {"sampling_rate": 16}])
def test_senseless_settings(wrong):
    with pytest.raises(ValueError):
        Settings(**wrong)


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_record", small_record)
    process = psutil.Process()

    def peak(count):
        def requests():
            return (ClipRequest(f"clip-{i:07d}", "", "") for i in range(count))

        most = 0

        def watch(n):
            nonlocal most
            most = max(most, process.memory_info().rss)

        monkeypatch.setattr(module.tqdm, "update", lambda self, n=1: watch(n))
        prepare(requests, tmp_path / str(count), Settings(shard_size=100), Limits(), 1)
        return most

    peak(500)
    assert peak(4000) - peak(1000) < 8 << 20
