"""What tests of the stages share: a small audiovisual data set, models on disk, runs in processes of their own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import LlavaProcessor

from tests.tiny import tiny_dali, tiny_llava, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = [["a dog barks", "the dog barks loudly"], ["rain falls"], ["a bell rings"], ["a man speaks softly"]]


def wav(index: int, seconds: float = 0.64) -> dict:
    """A tone whose pitch follows from the index."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 173 * index) * time)
    file = io.BytesIO()
    soundfile.write(file, tone.astype(np.float32), 16_000, format="WAV")
    return {"bytes": file.getvalue(), "path": None}


def picture(index: int, frame: int = 0) -> Image.Image:
    """A picture whose pattern follows from the index."""
    rng = np.random.default_rng([index, frame])
    base = np.random.default_rng(index).integers(0, 200, (4, 4, 3))
    pixels = base.repeat(4, 0).repeat(4, 1) + rng.integers(0, 50, (16, 16, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def clips(count: int = 8, frames: int = 3) -> datasets.Dataset:
    """Rows with every column that some stage reads."""
    return datasets.Dataset.from_list(
        [
            {
                "id": f"clip{i}",
                "audio": wav(i),
                "frames": [picture(i, frame) for frame in range(frames)],
                "image": picture(i),
                "captions": CAPTIONS[i % len(CAPTIONS)],
            }
            for i in range(count)
        ],
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "frames": datasets.List(datasets.Image()),
                "image": datasets.Image(),
                "captions": datasets.List(datasets.Value("string")),
            }
        ),
    )


def save_world(folder: Path, count: int = 8, **kwargs) -> dict:
    """A model and data on disk, as recipes name them."""
    model, processor = tiny_dali(**kwargs)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    clips(count).save_to_disk(str(folder / "data"))
    return {"model": str(folder / "model"), "dataset": str(folder / "data")}


def save_llava(folder: Path) -> str:
    """A LLaVA checkpoint on disk with its processor."""
    tiny_llava().save_pretrained(folder)
    image_processor = tiny_dali()[1].image_processor
    sizes = {"patch_size": 4, "vision_feature_select_strategy": "default"}
    LlavaProcessor(image_processor, tiny_tokenizer(), **sizes).save_pretrained(folder)
    return str(folder)


def settings(folder: Path, **kwargs) -> dict:
    """Settings of quick runs."""
    quick = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return {"output_dir": str(folder), **quick, **kwargs}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ from a copy."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}


def image_caption(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy caption of a picture, without prefix: what must not change in any stage."""
    model.eval()
    prompt = processor.caption_prompt("image", prefix=False)
    inputs = processor(text=prompt, images=[picture(99)], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)


def environment() -> dict[str, str]:
    """Of a process of its own: offline, one thread, this project's code."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_command(*arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess:
    """
    `python ARGUMENTS` in a process of its own.

    Returns:
        The finished process; checked to end with `expect`, unless that is None.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert expect is None or done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done
