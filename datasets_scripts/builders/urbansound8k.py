"""UrbanSound8K: 8732 sounds of up to four seconds, ten classes, ten folds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import FOLD_FEATURES, Card, assemble, fold_rows

CARD = Card(
    name="urbansound8k",
    description="Sounds of a city of up to four seconds in ten classes, arranged in ten folds.",
    homepage="https://urbansounddataset.weebly.com/urbansound8k.html",
    license="CC BY-NC 3.0",
    citation="Salamon et al.: A dataset and taxonomy for urban sound research, ACM Multimedia 2014",
    sizes={"all": 8732},
)
_NAME = re.compile(r"\d+-(?P<target>\d)-\d+-\d+\.wav")


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
    return assemble(rows(folder, "all"), FOLD_FEATURES, CARD, "all", folder)


def rows(folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows; `audio` is None where the file is missing."""
    table, columns = Path(folder, "metadata", "UrbanSound8K.csv"), ("slice_file_name", "fold", "classID", "class")
    return fold_rows(
        table, columns, _NAME, "ID-CLASS-OCCURRENCE-SLICE.wav", lambda fold: Path(folder, "audio", f"fold{fold}")
    )
