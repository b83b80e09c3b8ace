"""The README's Python runs as it stands, and its commands exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer.main
from PIL import Image

from tests.tiny import tiny_dali, tiny_llava
from trainers.dali import cli as dali
from trainers.recipes import find_recipe
from trainers.vipant import cli as vipant

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


def test_python_blocks_run_with_a_real_sound(workplace, shared_data):
    samples, rate = soundfile.read(shared_data / "stamps" / "animals__birds__crow.ogg")
    soundfile.write(workplace / "sound.wav", samples, rate)  # at its true rate
    test_python_blocks_run_in_order(workplace)


def commands():
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


TREES = {"dali": dali, "vipant": vipant}


@pytest.mark.parametrize("words", [words for words in commands() if words[0] in TREES], ids=" ".join)
def test_commands_and_their_options_exist(words, capsys):
    program, *arguments = words
    command, path = typer.main.get_command(TREES[program].app), []
    while getattr(command, "commands", None) and arguments:
        command = command.commands[arguments[0]]
        path.append(arguments.pop(0))
    assert not getattr(command, "commands", None), words
    assert TREES[program].main([*path, "--help"]) == 0
    help_text = capsys.readouterr().out
    for option in (word for word in arguments if word.startswith("--")):
        assert option in help_text, (words, option)
    for recipe in (word for word in arguments if re.fullmatch(r"(dali|vipant|one_gpu)/[a-z0-9_.]+", word)):
        assert find_recipe(recipe).is_file()


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

    write_video(workplace / "clip.mp4")
    run = [words for words in commands() if words[:2] == ["dali", "caption"]]
    assert len(run) == 3
    for words in run:
        assert dali.main(words[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 2 + 1


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
