"""`dali caption` as a person runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from modeling_dali.cli import main
from tests.tiny import tiny_dali


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
    assert run(folder, *files, "--json", "--batch-size", batch_size) == 0
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
        run(folder, file, "--json", "--batch-size", 1)
        alone += json_lines(capsys)
    assert lines == alone


def test_a_bad_file_is_reported_and_the_others_go_on(folder, capsys):
    assert run(folder, folder / "a.wav", folder / "bad.wav", folder / "none.wav", folder / "c.ogg", "--json") == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["file"].rsplit("/")[-1] for line in lines] == ["a.wav", "bad.wav", "none.wav", "c.ogg"]
    assert "damaged" in lines[1]["error"] and "no such file" in lines[2]["error"]
    assert lines[3]["caption"] is not None
    assert "2 of 4 files could not be captioned" in captured.err


def test_pictures(folder, capsys, tmp_path):
    from tests.modeling_dali.test_audio_io import write_video

    video = write_video(tmp_path / "v.mp4")
    assert run(folder, video, "--json") == 0
    sound_only = json_lines(capsys)
    assert run(folder, video, "--with-video", "--json") == 0
    with_frame = json_lines(capsys)
    assert run(folder, video, "--image", folder / "scene.png", "--json") == 0
    with_image = json_lines(capsys)
    assert len(sound_only) == len(with_frame) == len(with_image) == 2
    assert sound_only != with_frame or sound_only != with_image
    assert run(folder, folder / "a.wav", "--with-video") == 1
    assert "no video track" in capsys.readouterr().err


def test_what_cannot_start(folder, capsys):
    assert main(["caption", "a.wav", "--model", str(folder / "nothing")]) == 2
    assert "cannot start" in capsys.readouterr().err
    assert run(folder, folder / "a.wav", "--image", folder / "a.wav") == 2
    with pytest.raises(SystemExit) as stop:
        run(folder, folder / "a.wav", "--batch-size", "0")
    assert stop.value.code == 2


def test_the_installed_command(folder):
    command = [sys.executable, "-m", "modeling_dali.cli", "caption", folder / "a.wav", folder / "bad.wav"]
    done = subprocess.run([*command, "--model", folder / "model", "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [
        {"file", "start", "end", "caption"},
        {"file", "error"},
    ]
    assert "Traceback" not in done.stderr
