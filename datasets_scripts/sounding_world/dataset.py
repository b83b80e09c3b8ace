"""The splits of the world as data sets."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import soundfile
from PIL import Image

from datasets_scripts.sounding_world.captions import HEARD_QUESTIONS, SEEN_QUESTIONS
from datasets_scripts.sounding_world.scenes import scene
from datasets_scripts.sounding_world.sounds import SAMPLING_RATE

MIN_DURATION = 1.0  # seconds; every thing is heard at least once in it
DEFAULT_SIZES = {"captions": 8000, "prefix": 16, "video": 3000, "distillation": 1000, "supervised": 3000, "test": 300}

_STRING = datasets.Value("string")
_STRINGS = datasets.List(_STRING)
_AUDIO = {"path": _STRING, "bytes": datasets.Value("binary")}
_VIDEO_COLUMNS = {"audio": _AUDIO, "frames": datasets.List(datasets.Image())}
_COLUMNS: dict[str, dict] = {
    "captions": {"image": datasets.Image(), "question": _STRING, "captions": _STRINGS},
    "prefix": {"image": datasets.Image(), "captions": _STRINGS},
    "video": _VIDEO_COLUMNS,
    "distillation": _VIDEO_COLUMNS,
    "supervised": {"audio": _AUDIO, "captions": _STRINGS},
    "test": {
        "audio": _AUDIO,
        "image": datasets.Image(),
        "captions": _STRINGS,
        "seen_captions": _STRINGS,
        "labels": _STRINGS,
        "things": datasets.List(
            {
                "name": _STRING,
                "box": datasets.List(datasets.Value("float32"), length=4),
                "mask": datasets.Image(),
                "sounds": datasets.Value("bool"),
            }
        ),
    },
}


def _features(split: str) -> datasets.Features:
    return datasets.Features({"id": _STRING, **_COLUMNS[split]})


def _png(picture: Image.Image) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return {"path": None, "bytes": buffer.getvalue()}


def _wav(waveform: np.ndarray) -> dict:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return {"path": None, "bytes": buffer.getvalue()}


def _rows(
    indices: list[int], split: str, seed: int, variant: str, image_size: int, duration: float, frames: int
) -> Iterator[dict]:
    columns = _COLUMNS[split]
    for index in indices:
        current = scene(split, index, seed, variant)
        row: dict = {"id": f"{split}-{variant}-{seed}-{index:06d}"}
        if "image" in columns:
            row["image"] = _png(current.picture(image_size))
        if "audio" in columns:
            row["audio"] = _wav(current.sound(duration))
        if "frames" in columns:
            row["frames"] = [_png(current.picture(image_size, frame)) for frame in range(frames)]
        if "question" in columns:
            style: Literal["seen", "heard"] = "heard" if index % 2 else "seen"
            questions = HEARD_QUESTIONS if index % 2 else SEEN_QUESTIONS
            row["question"] = questions[index // 2 % len(questions)]
            row["captions"] = current.captions(style)
        elif "captions" in columns:
            row["captions"] = current.captions("heard")
        if split == "test":
            row["seen_captions"] = current.captions("seen")
            row["labels"] = [thing.name for thing in current.heard]
            shown = zip(current.seen, current.boxes(image_size), current.masks(image_size), strict=True)
            row["things"] = [
                {"name": thing.name, "box": box, "mask": _png(mask), "sounds": thing in current.heard}
                for thing, box, mask in shown
            ]
        yield row


def sounding_world(
    split: str,
    size: int | None = None,
    seed: int = 0,
    variant: str = "standard",
    *,
    image_size: int = 64,
    duration: float = 2.56,
    frames: int = 4,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Builds one split of the world; the columns of each are listed at the top of this package.

    Args:
        split: One of `SPLITS`.
        size: Number of examples, `DEFAULT_SIZES[split]` if None.
        seed: Seed of the whole world: other seeds give other scenes throughout.
        variant: One of `VARIANTS`.
        image_size: Side of the pictures in pixels.
        duration: Length of the sounds in seconds.
        frames: Pictures per video.
        cache_dir: Where the examples are kept for the next call with the same arguments, the cache folder of
            `datasets` if None.
        num_proc: Processes that draw and synthesise, one if None.

    Returns:
        The examples, mapped from disk.

    Raises:
        ValueError: If an argument is out of range, there is no such split or variant, or the variant is for the test
            split alone.
    """
    size = DEFAULT_SIZES.get(split, 1) if size is None else size
    for name, value, least in (("size", size, 1), ("image_size", image_size, 16), ("frames", frames, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}.")
    if duration < MIN_DURATION:
        raise ValueError(
            f"duration must be at least {MIN_DURATION} seconds, not {duration}: shorter scenes can be silent."
        )
    scene(split, 0, seed, variant)  # says what is wrong before anything is written
    arguments = {
        "split": split,
        "seed": seed,
        "variant": variant,
        "image_size": image_size,
        "duration": duration,
        "frames": frames,
    }
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    recipe = json.dumps([arguments, size], sort_keys=True).encode() + b"".join(sources)
    return datasets.Dataset.from_generator(
        _rows,
        features=_features(split),
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"indices": list(range(size)), **arguments},
        num_proc=num_proc,
        fingerprint=hashlib.sha256(recipe).hexdigest()[:16],  # a change of its code makes the world anew
    )
