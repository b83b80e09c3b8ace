"""The Python of the documentation runs as it is printed, on real files at their own rates."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText

from datasets_scripts.prepare import Settings, clips_of, prepare
from tests.datasets_scripts.videos import make_video
from tests.modeling_dali.test_audio_io import write_video
from tests.modeling_dali.test_convert_original import released_audio_backbone
from tests.tiny import tiny_dali
from tests.tiny_captioners import save_gemma3
from tests.tiny_vipant import tiny_processor, tiny_vipant
from tests.trainers.stages import clips
from trainers.dali.data_collator import DaliDataCollator

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the models and files that the pages name."""
    model, processor = tiny_dali()
    model.save_pretrained(tmp_path / "runs/demo/model")
    processor.save_pretrained(tmp_path / "runs/demo/model")
    tiny_vipant().save_pretrained(tmp_path / "runs/va")
    tiny_processor().save_pretrained(tmp_path / "runs/va")
    waveform = (np.random.default_rng(0).standard_normal(60_000) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "sound.wav", waveform, 44_100)
    shutil.copy(tmp_path / "sound.wav", tmp_path / "a.wav")
    for name in ("b.mp4", "clip.mp4"):
        write_video(tmp_path / name)
    Image.new("RGB", (30, 20), "green").save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    return {"waveform": waveform, "VIPANT": "runs/va"}


def run(page: str, names: dict) -> None:
    code = blocks(page)
    assert code
    for block in code:
        exec(block, names)


@pytest.mark.parametrize("page", ["serving.md", "vipant.md"])
def test_python_of_a_page_runs_in_order(workplace, page):
    if any("sentence_transformers" in block for block in blocks(page)):
        pytest.importorskip("sentence_transformers")
    run(page, workplace)


def test_python_of_training_runs(workplace):
    model, processor = tiny_dali()
    run("training.md", {"model": model, "processor": processor, "rows": clips(2)})


def test_python_of_data_runs(workplace):
    Path("videos").mkdir()
    make_video(Path("videos/clip.mp4"), seconds=1.0)
    prepare(clips_of("videos", seconds=1.0), "prepared", Settings(frames=2, frame_size=32), workers=1, progress=False)
    collator = DaliDataCollator(tiny_dali()[1], "audio_image", captions=False)
    names = {"collator": collator}
    run("data.md", names)
    assert len(list(names["stream"])) == 1


def test_python_of_captioners_runs(workplace):
    """The captioner is a tiny one under the name on the page; the released encoder's weights are random."""
    save_gemma3(Path("google/gemma-3-4b-it"))
    torch.save(released_audio_backbone(width=768, depth=12, mlp=3072, proj=False), "audio_backbone.pth")
    captioner = AutoModelForImageTextToText.from_pretrained("google/gemma-3-4b-it")
    run("captioners.md", {"AutoModel": AutoModel, "captioner": captioner})
