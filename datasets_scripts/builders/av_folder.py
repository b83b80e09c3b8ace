"""Any folder of sounds and pictures: files with the same name belong together.

bell.ogg   bell.png                 a sound and its picture
rain.flac  rain/0.jpg rain/1.jpg    a sound and its frames
captions.csv                        file,caption (optional; several lines a file give several captions)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, is_prepared, read_table, text, wrong
from datasets_scripts.clips import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS
from datasets_scripts.shards import open_shards

CARD = Card(
    name="av_folder",
    description="Sounds and pictures of a folder, paired by their names.",
    homepage="",
    license="that of the files",
    citation="",
    sizes={},
)
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "frames": datasets.List(datasets.Image(decode=False)),
    "captions": TEXTS,
}


def av_folder(folder: str | Path) -> datasets.Dataset:
    """The sounds of a folder with their pictures and captions; or the shards that `prepare` has made of a folder.

    Args:
        folder: is searched with the folders in it.

    Returns:
        Columns `id` (path without extension), `audio`, `frames` (one, several or none), `captions` (may be empty).

    Raises:
        ValueError: if there is nothing but videos (which `prepare` takes), two sounds have one name, or naming the
            first wrong line of `captions.csv`.
        FileNotFoundError: if there is no sound.
    """
    if is_prepared(folder):
        dataset = open_shards(folder)
        assert isinstance(dataset, datasets.Dataset)
        return dataset
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    dataset = assemble(rows(folder), FEATURES, CARD, "train", folder)
    if not len(dataset):
        if any(path.suffix.lower() in VIDEO_EXTENSIONS for path in Path(folder).rglob("*")):
            raise ValueError(f"{folder} holds videos: run `python -m datasets_scripts.prepare {folder} --output DIR`")
        raise FileNotFoundError(f"{folder} holds no sound ({', '.join(AUDIO_EXTENSIONS)})")
    return dataset


def rows(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one row a sound."""
    root = Path(folder)
    sounds: dict[str, Path] = {}
    pictures: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if path.suffix.lower() in AUDIO_EXTENSIONS and path.is_file():
            if name in sounds:
                raise ValueError(f"{sounds[name]} and {path} have one name: rename one of them")
            sounds[name] = path
        elif path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file():
            pictures.setdefault(name, []).append(str(path))
            pictures.setdefault(path.parent.relative_to(root).as_posix(), []).append(str(path))
    captions = _captions(root / "captions.csv", set(sounds) | set(pictures))
    for name, path in sounds.items():
        frames = [{"bytes": None, "path": picture} for picture in pictures.get(name, [])]
        yield {"id": name, "audio": str(path), "frames": frames, "captions": captions.get(name, [])}


def _captions(table: Path, names: set[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    if table.is_file():
        for line, row in read_table(table, {"name": text, "caption": text}):
            name = row["name"] if row["name"] in names else Path(row["name"]).with_suffix("").as_posix()
            if name not in names:
                raise wrong(table, line, f"there is no file {row['name']!r}")
            captions.setdefault(name, []).append(row["caption"])
    return captions
