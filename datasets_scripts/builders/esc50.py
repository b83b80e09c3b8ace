"""ESC-50: 2000 environmental sounds of five seconds, 50 classes, five folds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, existing, file_name, read_table, text, wrong

CARD = Card(
    name="esc50",
    description="Environmental sounds of five seconds in 50 classes of 40 clips, arranged in five folds.",
    homepage="https://github.com/karolpiczak/ESC-50",
    license="CC BY-NC 3.0",
    citation="Piczak: ESC: Dataset for environmental sound classification, ACM Multimedia 2015",
    sizes={"all": 2000},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "labels": TEXTS,
    "target": datasets.Value("int64"),
    "fold": datasets.Value("int64"),
}
_NAME = re.compile(r"([1-5])-(\d+)-([A-Z])-(\d+)\.wav")


def esc50(folder: str | Path) -> datasets.Dataset:
    """All clips of ESC-50.

    Args:
        folder: the repository as unpacked, with `meta/esc50.csv` and `audio/`.

    Returns:
        Columns `id` (file name without extension), `audio`, `labels` (one name), `target` (its number), `fold` (1 to
        5, from the file name).

    Raises:
        ValueError: naming the first wrong line, also where the table contradicts a file's name.
        FileNotFoundError: if the table or a sound is missing.
    """
    return assemble(rows(folder, "all"), FEATURES, CARD, "all", folder)


def rows(folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows; `audio` is None where the file is missing."""
    table = Path(folder, "meta", "esc50.csv")
    for line, row in read_table(table, {"filename": file_name, "fold": int, "target": int, "category": text}):
        parts = _NAME.fullmatch(row["filename"])
        if not parts:
            raise wrong(table, line, f"{row['filename']!r} is not like FOLD-CLIP-TAKE-TARGET.wav")
        fold, target = int(parts[1]), int(parts[4])
        if (fold, target) != (row["fold"], row["target"]):
            raise wrong(
                table, line, f"{row['filename']} is of fold {fold} and target {target} by its name, not by the table"
            )
        yield {
            "id": Path(row["filename"]).stem,
            "audio": existing(Path(folder, "audio", row["filename"])),
            "labels": [row["category"]],
            "target": target,
            "fold": fold,
        }
