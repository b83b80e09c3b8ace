"""Curated captions: those that CLIP found nearest to the frames of clips, as VIP-ANT releases them.

audiotxt("index.jsonl", "captions.jsonl", "prepared/")
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, MEDIA_EXTENSIONS, TEXTS, Card, assemble, is_prepared, wrong
from datasets_scripts.files import json_lines
from datasets_scripts.shards import open_shards

CARD = Card(
    name="audiotxt",
    description="Clips with captions that were found for their frames by CLIP in a pool, without any audio-text pair.",
    homepage="https://github.com/zhaoyanpeng/vipant",
    license="that of the clips and of the caption pool",
    citation="Zhao et al.: Connecting the Dots between Audio and Text without Parallel Data, NAACL 2022",
    sizes={},
)
FEATURES = {"id": datasets.Value("string"), "audio": AUDIO, "captions": TEXTS}
_FRAME = re.compile(r"(.+)\.p0\.\d+_\d+")


def audiotxt(index: str | Path, captions: str | Path, media: str | Path) -> datasets.Dataset:
    """Clips with their curated captions.

    Args:
        index: lines of `["CLIP.p0.N_i", [caption ids]]`, best first, for frame i of N.
        captions: lines of `[id, "caption"]`.
        media: folder of files named by their clips, or of shards made by `prepare`.

    Returns:
        Columns `id`, `audio`, `captions` (of all frames, each once, the best of every frame first); those of the
        shards if there are any. Clips that are missing are counted in a warning.

    Raises:
        ValueError: naming the first wrong line.
        FileNotFoundError: if all clips are missing.
    """
    return assemble(rows(index, captions, media), FEATURES, CARD, "train", media, may_be_missing=True)


def rows(index: str | Path, captions: str | Path, media: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one row a clip; `audio` is None where the file is missing."""
    pool: dict[Any, str] = {}
    for line, value in json_lines(captions):
        match value:
            case [int() | str() as number, str() as caption] if caption.strip() and number not in pool:
                pool[number] = caption
            case _:
                raise wrong(captions, line, f'expected [id, "caption"] with a new id, found {value!r}')
    clips: dict[str, list[list[Any]]] = {}
    for line, value in json_lines(index):
        match value:
            case [str() as frame, list() as ids] if (parts := _FRAME.fullmatch(frame)) and "/" not in frame:
                if unknown := [number for number in ids if number not in pool]:
                    raise wrong(index, line, f"{captions} has no caption {unknown[0]!r}")
                clips.setdefault(parts[1], []).append(ids)
            case _:
                raise wrong(index, line, f'expected ["CLIP.p0.N_i", [caption ids]], found {value!r}')
    names = _names(media)
    for clip, frames in clips.items():
        longest = max(map(len, frames))
        ranked = [ids[rank] for rank in range(longest) for ids in frames if rank < len(ids)]
        name, audio = names.get(clip, (clip, None))
        yield {"id": name, "audio": audio, "captions": [pool[number] for number in dict.fromkeys(ranked)]}


def _names(media: str | Path) -> dict[str, tuple[str, str | None]]:
    """Id and file of the clips that are there, by their ids and by these without start times, as in the releases."""
    if is_prepared(media):
        found: list[tuple[str, str | None]] = [(name, None) for name in open_shards(media)["id"]]
    else:
        paths = sorted(path for path in Path(media).iterdir() if path.suffix.lower() in MEDIA_EXTENSIONS)
        found = [(path.stem, str(path)) for path in paths]
    names = {name.rpartition("_")[0]: (name, path) for name, path in reversed(found) if "_" in name}
    return names | {name: (name, path) for name, path in found}
