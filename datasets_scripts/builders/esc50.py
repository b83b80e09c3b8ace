"""ESC-50: 2000 environmental sounds of five seconds, 50 classes, five folds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import FOLD_FEATURES, Card, assemble, fold_rows

CARD = Card(
    name="esc50",
    description="Environmental sounds of five seconds in 50 classes of 40 clips, arranged in five folds.",
    homepage="https://github.com/karolpiczak/ESC-50",
    license="CC BY-NC 3.0",
    citation="Piczak: ESC: Dataset for environmental sound classification, ACM Multimedia 2015",
    sizes={"all": 2000},
)
_NAME = re.compile(r"(?P<fold>[1-5])-\d+-[A-Z]-(?P<target>\d+)\.wav")


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
    return assemble(rows(folder, "all"), FOLD_FEATURES, CARD, "all", folder)


def rows(folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows; `audio` is None where the file is missing."""
    table, columns = Path(folder, "meta", "esc50.csv"), ("filename", "fold", "target", "category")
    return fold_rows(table, columns, _NAME, "FOLD-CLIP-TAKE-TARGET.wav", lambda fold: Path(folder, "audio"))
