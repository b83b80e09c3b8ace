"""`dali run`: from a folder of videos to a captioner by one recipe, interrupted or not."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_dali import DaliForConditionalGeneration
from tests.datasets_scripts.videos import make_video
from tests.trainers.stages import ROOT, clips, environment, run_command, save_llava
from trainers.dali.run import RunConfig, read_run

QUICK = {"use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Videos, a LLaVA, pictures for the prefix, and a recipe that names none of them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "videos").mkdir()
    for number in range(6):
        make_video(folder / "videos" / f"clip{number}.mp4", seconds=1.0, amplitude=0.2 + 0.1 * number)
    save_llava(folder / "llava")
    clips(4).save_to_disk(str(folder / "pairs"))
    recipe = {
        "prepare": {"seconds": 1.0, "frames": 2, "frame_size": 32, "workers": 1},
        "prefix": QUICK | {"prefix_length": 2},
        "align": QUICK | {"loss": "ot"},
        "pseudo_caption": {"batch_size": 4, "max_new_tokens": 4},
        "distill": QUICK,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def arguments(place, output):
    given = {"model": "llava", "videos": "videos", "prefix_dataset": "pairs", "output_dir": output}
    return ["-m", "trainers.dali.cli", "run", str(place / "recipe.yaml")] + [
        part for name, value in given.items() for part in (f"--{name}", str(place / value))
    ]


@pytest.fixture(scope="module")
def whole(place):
    """An undisturbed run."""
    run_command(*arguments(place, "whole"))
    return place / "whole"


def test_the_run_ends_with_a_model_and_its_notes(whole):
    model = DaliForConditionalGeneration.from_pretrained(whole / "model")
    assert model.config.prefix_length == 0
    notes = {path.stem: json.loads(path.read_text()) for path in (whole / "done").iterdir()}
    assert set(notes) == {"prepare", "prefix", "align", "pseudo-caption", "distill"}
    assert all(note["memory"] > 0 for note in notes.values())


def test_killed_twice_it_ends_with_the_same_bits(place, whole):
    notes = place / "killed" / "done"
    for stage in ("prefix", "pseudo-caption"):  # killed in the stage after it
        process = subprocess.Popen(
            [sys.executable, *arguments(place, "killed")], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (notes / f"{stage}.json").exists():
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_command(*arguments(place, "killed"))
    for folder in ("prefix", "aligned", "model"):
        (file,) = (whole / folder).glob("[ae]*.safetensors")  # the adapter, then ears: LLaVA's own weights stay
        one, other = load_file(file), load_file(place / "killed" / folder / file.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file


def test_a_finished_run_does_nothing_and_other_settings_are_refused(place, whole):
    before = (whole / "model" / "ear.safetensors").stat().st_mtime_ns
    assert "distill: already done" in run_command(*arguments(place, "whole")).stdout
    assert (whole / "model" / "ear.safetensors").stat().st_mtime_ns == before
    refused = run_command(*arguments(place, "whole"), "--seed", "7", expect=1)
    assert refused.stderr.startswith("error: ") and "seed was 42, is 7" in refused.stderr


def test_unknown_settings_are_named(place, tmp_path):
    (tmp_path / "wrong.yaml").write_text("alignment: {}")
    with pytest.raises(ValueError, match=r"no setting `alignment`.*align"):
        read_run(str(tmp_path / "wrong.yaml"), {})


def test_videos_or_a_data_set_are_needed():
    with pytest.raises(ValueError, match="`videos`"):
        RunConfig(model="m", output_dir="o")
