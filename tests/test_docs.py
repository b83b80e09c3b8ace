"""The Python of the documentation runs as it is printed, on real files at their own rates."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.modeling_dali.test_audio_io import write_video
from tests.tiny import tiny_dali
from tests.tiny_vipant import tiny_processor, tiny_vipant

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


@pytest.mark.parametrize("page", ["serving.md", "vipant.md"])
def test_python_of_a_page_runs_in_order(workplace, page):
    code = blocks(page)
    if any("sentence_transformers" in block for block in code):
        pytest.importorskip("sentence_transformers")
    assert code
    for block in code:
        exec(block, workplace)
