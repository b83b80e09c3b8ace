"""UrbanSound8K: 8732 sounds of up to four seconds, ten classes, ten folds."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, existing, file_name, read_table, text, wrong

CARD = Card(
    name="urbansound8k",
    description="Sounds of a city of up to four seconds in ten classes, arranged in ten folds.",
    homepage="https://urbansounddataset.weebly.com/urbansound8k.html",
    license="CC BY-NC 3.0",
    citation="Salamon et al.: A dataset and taxonomy for urban sound research, ACM Multimedia 2014",
    sizes={"all": 8732},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "labels": TEXTS,
    "target": datasets.Value("int64"),
    "fold": datasets.Value("int64"),
}
_NAME = re.compile(r"(\d+)-(\d)-(\d+)-(\d+)\.wav")


def urbansound8k(folder: str | Path) -> datasets.Dataset:
    """All clips of UrbanSound8K.

    Args:
        folder: as unpacked, with `metadata/UrbanSound8K.csv` and `audio/fold1` to `audio/fold10`.

    Returns:
        Columns `id` (file name without extension), `audio`, `labels` (one name), `target` (its number), `fold` (1 to
        10).

    Raises:
        ValueError: naming the first wrong line, also where the table contradicts a file's name.
        FileNotFoundError: if the table or a sound is missing.
    """
    return assemble(rows(folder, "all"), FEATURES, CARD, "all", folder)


def rows(folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows; `audio` is None where the file is missing."""
    table = Path(folder, "metadata", "UrbanSound8K.csv")
    columns: dict[str, Callable[[str], Any]] = {
        "slice_file_name": file_name,
        "fold": int,
        "classID": int,
        "class": text,
    }
    for line, row in read_table(table, columns):
        parts = _NAME.fullmatch(row["slice_file_name"])
        if not parts:
            raise wrong(table, line, f"{row['slice_file_name']!r} is not like ID-CLASS-OCCURRENCE-SLICE.wav")
        if int(parts[2]) != row["classID"]:
            raise wrong(
                table, line, f"{row['slice_file_name']} is of class {parts[2]} by its name, not {row['classID']}"
            )
        if not 1 <= row["fold"] <= 10:
            raise wrong(table, line, f"fold must be 1 to 10, not {row['fold']}")
        yield {
            "id": Path(row["slice_file_name"]).stem,
            "audio": existing(Path(folder, "audio", f"fold{row['fold']}", row["slice_file_name"])),
            "labels": [row["class"]],
            "target": row["classID"],
            "fold": row["fold"],
        }
