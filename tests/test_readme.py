"""The README's Python runs as it stands, and its commands exist."""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.tiny import tiny_dali, tiny_llava

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with everything the README's code names."""
    model, processor = tiny_dali()
    model.save_pretrained(tmp_path / "runs/demo/model")
    processor.save_pretrained(tmp_path / "runs/demo/model")
    tiny_llava().save_pretrained(tmp_path / "llava")
    soundfile.write(tmp_path / "sound.wav", np.random.default_rng(0).standard_normal(22_050) * 0.1, 44_100)
    Image.new("RGB", (30, 20), "green").save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_in_order(workplace):
    namespace = {}
    for code in blocks("python"):
        exec(code, namespace)
    assert isinstance(namespace["captions"][0], str) and namespace["captions"][0]


def commands():
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def test_modules_and_recipes_of_the_commands_exist():
    named = [words for words in commands() if words[:2] == ["python", "-m"]]
    assert len(named) >= 6
    for words in named:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), words
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), word


def test_options_of_the_commands_exist(capsys):
    for words in commands():
        if words[:2] == ["python", "-m"]:
            with pytest.raises(SystemExit):
                importlib.import_module(words[2]).main(["--help"])
            help_text = capsys.readouterr().out
            for option in (word for word in words if word.startswith("--")):
                assert option in help_text, (words, option)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("files", [[], ["FILES="]], ids=["none", "empty"])
def test_make_demo_captions_samples_that_are_not_there_yet(files, tmp_path):
    clone = tmp_path / "clone"  # with no data beside it
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, clone)
    done = subprocess.run(["make", "-n", "demo", *files], cwd=clone, capture_output=True, text=True, check=True)
    assert "dali caption --model runs/demo/model runs/demo/samples/*.wav" in done.stdout


def test_caption_commands_run(workplace, capsys):
    from tests.modeling_dali.test_audio_io import write_video
    from trainers.dali.cli import main

    write_video(workplace / "clip.mp4")
    run = [words for words in commands() if words[:2] == ["dali", "caption"]]
    assert len(run) == 2
    for words in run:
        assert main(words[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 2


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
