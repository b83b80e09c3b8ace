"""LLaVA's JSON of conversations, as DALI's `prefixDS.json` (16 pairs) and its pseudo-captions.

llava_chat("prefixDS.json", "frames/")
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, find_moved

CARD = Card(
    name="llava_chat",
    description="Pictures or sounds with what is to be said of them, in the format of LLaVA's training data.",
    homepage="https://github.com/hugomalard/AnEyeForAnEar",
    license="that of the files and captions",
    citation="Malard et al.: An Eye for an Ear, NeurIPS 2024",
    sizes={},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "image": datasets.Image(decode=False),
    "captions": TEXTS,
}


def llava_chat(table: str | Path, media: str | Path | None = None) -> datasets.Dataset:
    """The conversations of a list whose picture, or where they have none, whose sound is there.

    Args:
        table (`str` or `Path`):
            JSON file: a list of `{"id", "image", "audio", "conversations"}`, where `gpt` answers `human` once.
        media (`str` or `Path`, *optional*):
            Folder to which the files were moved: a file is looked for by the end of its path, such as
            `frame_5/ID.jpg` or `ID.jpg`. By default the paths of the list.

    Returns:
        `datasets.Dataset`: columns `id`, `audio` and `image` (None where there is no file), `captions` (the one
        answer). What is asked is left to the trainers. Rows without their file are counted in a warning.

    Raises:
        ValueError: if the file is no such list, naming the first wrong entry.
        FileNotFoundError: if the table or all files are missing.
    """
    return assemble(
        rows(table, media), FEATURES, CARD, "train", media or Path(table).parent, may_be_missing=True, needed="file"
    )


def rows(table: str | Path, media: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields one row a conversation; `file` is None where the file that it is about is missing."""
    try:
        chats = json.loads(Path(table).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{table} is no JSON: {error}") from error
    for number, chat in enumerate(chats, 1):
        match chat:
            case {
                "id": str() | int() as name,
                "conversations": [{"from": "human"}, {"from": "gpt", "value": str() as answer}],
            }:
                paths = {kind: chat[kind] for kind in ("image", "audio") if chat.get(kind)}
            case _:
                raise ValueError(f"{table}, entry {number}: expected an id, and one question with one answer")
        if not paths:
            raise ValueError(f"{table}, entry {number}: it has neither image nor audio")
        found = {kind: find_moved(path, media) for kind, path in paths.items()}
        picture = found.get("image")
        yield {
            "id": str(name),
            "audio": found.get("audio"),
            "image": None if picture is None else {"bytes": None, "path": picture},
            "captions": [answer],
            "file": found[next(iter(paths))],
        }
