"""Files are whole or not there, settings match or are named, and a folder has one writer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_scripts.files import Folder, claim, json_lines, locked, sweep, write_whole

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "numbers.npy"
    with write_whole(path) as part:
        np.save(part, np.arange(3))
        assert not path.exists()
    assert np.load(path).tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="disk full"), write_whole(path) as part:
        part.write_bytes(b"half")
        raise OSError("disk full")
    assert np.load(path).tolist() == [0, 1, 2] and [file.name for file in path.parent.iterdir()] == ["numbers.npy"]


def test_a_link_in_place_of_the_unfinished_file_leads_nowhere(tmp_path):
    target = tmp_path / "theirs"
    target.write_text("kept")
    (tmp_path / f".a.{os.getpid()}.dali-partial.txt").symlink_to(target)
    with write_whole(tmp_path / "a.txt") as part:
        part.write_text("new")
    assert target.read_text() == "kept" and (tmp_path / "a.txt").read_text() == "new"


def test_only_our_own_leftovers_are_swept(tmp_path):
    kept = [
        ".download.partial",
        ".x.partial",
        "shards/.y.mp4.partial",
        ".env",
        "dali-partial",
        "deep/er/.a.1.dali-partial",
    ]
    swept = [".a.123.dali-partial.json", "shards/.shard-000000.9.dali-partial.parquet"]
    for name in kept + swept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


HOLDING = """
import sys, time
from datasets_scripts.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_is_free_when_that_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with (
                pytest.raises(RuntimeError, match=f"in use by another run .process {process.pid} on"),
                locked(tmp_path),
            ):
                pass
        finally:
            process.kill()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["local", "remote"])
def test_settings_must_match(tmp_path, place):
    folder = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}/claimed"
    claim(folder, {"frames": 10, "sizes": (1, 2)})
    claim(folder, {"sizes": (1, 2), "frames": 10})
    with pytest.raises(ValueError, match=r"frames was 10, is 3; speed was null, is \"fast\""):
        claim(folder, {"frames": 3, "sizes": (1, 2), "speed": "fast"})
    Folder(folder).write("settings.json", b"")
    with pytest.raises(ValueError, match="is damaged"):
        claim(folder, {"frames": 10})


def test_a_remote_folder_gets_whole_files():
    folder = Folder("memory://bucket/whole")
    with folder.writing("a/b.bin") as file:
        file.write(b"12")
        file.write(b"3")
    assert (file.size, fsspec.filesystem("memory").cat("/bucket/whole/a/b.bin")) == (3, b"123")
    assert folder.names("a") == ["a/b.bin"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_json_lines_hold_any_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lines") / "texts.jsonl"
    path.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [value for _, value in json_lines(path)] == texts


def test_a_wrong_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\u2028"}\n\n{"a"\n')
    lines = json_lines(tmp_path / "a.jsonl")
    assert next(lines) == (1, {"a": "\u2028"})
    with pytest.raises(ValueError, match="line 3: is not JSON"):
        next(lines)
