"""`pipeline("audio-captioning")`: what it takes, what it gives, and that a saved folder brings its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import pipeline

from modeling_dali.pipeline_dali import AudioCaptioningPipeline
from tests.modeling_dali.test_audio_io import write_video
from tests.tiny import tiny_dali
from trainers.dali.cli import main

RATE = 16_000

STRANGER = """
import json, sys

class Absent:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("modeling_dali", "modeling_vipant", "trainers", "datasets_scripts"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Absent())
from transformers import pipeline

pipe = pipeline("audio-captioning", model=sys.argv[1], trust_remote_code=True, device="cpu")
print(json.dumps(pipe(sys.argv[2:], batch_size=2, generate_kwargs={"max_new_tokens": 5})))
pipe.model.save_pretrained(sys.argv[1] + "-again")  # a loaded pipeline leaves its model fit to be saved
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    model, processor = tiny_dali()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, seconds, rate in (("a.wav", 0.5, RATE), ("b.flac", 1.5, 44_100), ("c.ogg", 0.6, 8_000)):
        soundfile.write(folder / name, rng.standard_normal(int(seconds * rate)) * 0.1, rate)
    Image.new("RGB", (30, 20), "red").save(folder / "scene.png")
    write_video(folder / "v.mp4")
    return folder


@pytest.fixture(scope="module")
def pipe():
    model, processor = tiny_dali()
    return AudioCaptioningPipeline(
        model=model, processor=processor, device="cpu", generate_kwargs={"max_new_tokens": 5}
    )


def files(folder):
    return [str(folder / name) for name in ("a.wav", "b.flac", "c.ogg")]


def test_windows_with_their_times(pipe, folder):
    one, long, short = pipe(files(folder))
    assert [(window["start"], window["end"]) for window in long] == [(0.0, 0.64), (0.64, 1.28), (1.28, 1.5)]
    assert [(window["start"], window["end"]) for window in one + short] == [(0.0, 0.5), (0.0, 0.6)]
    assert all(isinstance(window["caption"], str) for window in one + long + short)
    assert pipe(files(folder)[1]) == long


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_do_not_show(pipe, folder, batch_size):
    assert pipe(files(folder), batch_size=batch_size) == pipe(files(folder))


def test_every_form_of_sound(pipe, folder):
    path = files(folder)[0]
    waveform, rate = soundfile.read(path, dtype="float32")
    expected = pipe(path)
    forms = [Path(path).read_bytes(), {"array": waveform, "sampling_rate": rate}, {"audio": path}]
    assert [pipe(form) for form in forms] == [expected] * 3
    assert pipe(waveform, sampling_rate=rate) == expected
    assert list(pipe(source for source in [path, path])) == [expected] * 2


def test_pictures_and_questions(pipe, folder):
    video, scene = str(folder / "v.mp4"), str(folder / "scene.png")
    alone, with_frame, with_scene = pipe(video), pipe(video, with_video=True), pipe(video, image=scene)
    assert len(alone) == len(with_frame) == len(with_scene) == 2
    assert alone != with_frame or alone != with_scene
    assert pipe([{"audio": video, "image": Image.open(scene)}, {"audio": video}], batch_size=4) == [with_scene, alone]
    assert pipe(video, question="a dog ?") != alone
    with pytest.raises(ValueError, match="no video track"):
        pipe(files(folder)[0], with_video=True)
    with pytest.raises(TypeError, match="those for `generate` go into `generate_kwargs`"):
        pipe(video, temperature=0.2)


def test_a_saved_folder_brings_the_pipeline_along(folder, tmp_path, capsys):
    """In an interpreter where the project does not exist; it says what `dali caption` says."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, folder / "model", *files(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    arguments = ["caption", "--model", str(folder / "model"), "--max-new-tokens", "5", "--format", "jsonl"]
    assert main([*arguments, *files(folder)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [
        {"file": file, **window} for file, windows in zip(files(folder), results, strict=True) for window in windows
    ]
    assert lines == expected
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("model", "model-again")]
    assert configs[0]["custom_pipelines"] == configs[1]["custom_pipelines"]


def test_the_package_knows_its_task(pipe, folder):
    again = pipeline("audio-captioning", model=pipe.model, processor=pipe.processor, device="cpu")
    assert type(again) is AudioCaptioningPipeline
    assert again(files(folder)[0], generate_kwargs={"max_new_tokens": 5}) == pipe(files(folder)[0])
