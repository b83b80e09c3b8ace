"""`dali caption` as a person runs it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.tiny import tiny_dali
from trainers.dali.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model, processor = tiny_dali()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, seconds, rate in (("a.wav", 0.5, 16_000), ("b.flac", 1.5, 44_100), ("c.ogg", 0.6, 8_000)):
        soundfile.write(folder / name, rng.standard_normal(int(seconds * rate)) * 0.1, rate)
    (folder / "bad.wav").write_text("no sound")
    Image.new("RGB", (30, 20), "red").save(folder / "scene.png")
    return folder


def run(folder, *arguments):
    return main(["caption", "--model", str(folder / "model"), "--max-new-tokens", "5", *map(str, arguments)])


def test_one_line_per_window(folder, capsys):
    assert run(folder, folder / "a.wav", folder / "b.flac") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(folder / "a.wav")] + [str(folder / "b.flac")] * 3
    assert "0.64 s" in lines[2] and "1.28 s" in lines[3]


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_json_lines_do_not_depend_on_the_batch(folder, capsys, batch_size):
    files = [folder / "a.wav", folder / "b.flac", folder / "c.ogg"]
    assert run(folder, *files, "--format", "jsonl", "--batch-size", batch_size) == 0
    lines = json_lines(capsys)
    assert [(line["file"], line["start"]) for line in lines] == [
        (str(files[0]), 0.0),
        (str(files[1]), 0.0),
        (str(files[1]), 0.64),
        (str(files[1]), 1.28),
        (str(files[2]), 0.0),
    ]
    assert lines[0]["end"] == 0.5 and lines[3]["end"] == 1.5
    alone = []
    for file in files:
        run(folder, file, "--format", "jsonl", "--batch-size", 1)
        alone += json_lines(capsys)
    assert lines == alone


def test_a_bad_file_is_reported_and_the_others_go_on(folder, capsys):
    assert (
        run(folder, folder / "a.wav", folder / "bad.wav", folder / "none.wav", folder / "c.ogg", "--format", "jsonl")
        == 1
    )
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["file"].rsplit("/")[-1] for line in lines] == ["a.wav", "bad.wav", "none.wav", "c.ogg"]
    assert "damaged" in lines[1]["error"] and "no such file" in lines[2]["error"]
    assert lines[3]["caption"] is not None
    assert "2 of 4 files could not be captioned" in captured.err


def test_pictures(folder, capsys, tmp_path):
    from tests.modeling_dali.test_audio_io import write_video

    video = write_video(tmp_path / "v.mp4")
    assert run(folder, video, "--format", "jsonl") == 0
    sound_only = json_lines(capsys)
    assert run(folder, video, "--with-video", "--format", "jsonl") == 0
    with_frame = json_lines(capsys)
    assert run(folder, video, "--image", folder / "scene.png", "--format", "jsonl") == 0
    with_image = json_lines(capsys)
    assert len(sound_only) == len(with_frame) == len(with_image) == 2
    assert sound_only != with_frame or sound_only != with_image
    assert run(folder, folder / "a.wav", "--with-video") == 1
    assert "no video track" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "{}/nothing"], "nothing: there is no such folder"),
        (["--image", "{}/a.wav"], "cannot identify image file"),
        (["--image", "{}/none.png"], "none.png"),
        (["--device", "cuda"], "no usable GPU"),
        (["--device", "gpu"], "no such device"),
        (["--format", "doc"], "choose one of text, jsonl, csv, srt, vtt, html"),
        (["--format", "csv"], "needs --output"),
        (["--output", "{}"], "choose a name that ends in"),
        (["--output", "{}", "--format", "csv"], "is a folder"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(folder, capsys, arguments, told):
    assert run(folder, folder / "a.wav", *(argument.format(folder) for argument in arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


def test_wrong_usage(folder):
    assert run(folder, folder / "a.wav", "--batch-size", "0") == 2
    assert main(["caption", str(folder / "a.wav")]) == 2


def test_a_file_that_breaks_its_batch_does_not_stop_the_others(folder, capsys):
    soundfile.write(folder / "short.wav", np.zeros(80), 16_000)  # 5 ms: less than a frame
    assert run(folder, folder / "a.wav", folder / "short.wav", folder / "c.ogg", "--format", "jsonl") == 1
    lines = json_lines(capsys)
    assert [("caption" in line, line["file"].rsplit("/")[-1]) for line in lines] == [
        (True, "a.wav"),
        (False, "short.wav"),
        (True, "c.ogg"),
    ]


def test_folders_are_searched(folder, tmp_path, capsys):
    (tmp_path / "below").mkdir()
    for name in ("x.wav", "below/y.wav"):
        shutil.copy(folder / "a.wav", tmp_path / name)
    (tmp_path / "notes.txt").write_text("no sound")
    assert run(folder, tmp_path, "--format", "jsonl") == 0
    assert [Path(line["file"]).name for line in json_lines(capsys)] == ["y.wav", "x.wav"]
    (tmp_path / "empty").mkdir()
    assert run(folder, tmp_path / "empty") == 1


def test_captions_go_into_a_file(folder, tmp_path, capsys):
    target = tmp_path / "captions.csv"
    assert run(folder, folder / "a.wav", folder / "bad.wav", "--output", target) == 1
    assert capsys.readouterr().out == f"{target}\n"
    lines = target.read_text().splitlines()
    assert lines[0] == "file,start,end,caption,error" and len(lines) == 3


def test_the_installed_command(folder):
    command = [sys.executable, "-m", "trainers.dali.cli", "caption", folder / "a.wav", folder / "bad.wav"]
    done = subprocess.run([*command, "--model", folder / "model", "--format", "jsonl"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [
        {"file", "start", "end", "caption"},
        {"file", "error"},
    ]
    assert "Traceback" not in done.stderr
