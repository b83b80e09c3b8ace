"""Clotho: sounds from Freesound, 15 to 30 seconds long, with five captions each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, existing, file_name, read_table, text

CARD = Card(
    name="clotho",
    description="Sounds of 15 to 30 seconds from Freesound, with five captions each (version 2.1).",
    homepage="https://zenodo.org/records/4783391",
    license="Tampere University license (captions, non-commercial), Creative Commons (sounds)",
    citation="Drossos et al.: Clotho: An audio captioning dataset, ICASSP 2020",
    sizes={"development": 3839, "validation": 1045, "evaluation": 1045},
)
FEATURES = {"id": datasets.Value("string"), "audio": AUDIO, "captions": TEXTS}


def clotho(folder: str | Path, split: str = "evaluation") -> datasets.Dataset:
    """A split of Clotho.

    Args:
        folder: holds `clotho_captions_SPLIT.csv` and the folder `SPLIT` of sounds, as unpacked.
        split: "development", "validation" or "evaluation".

    Returns:
        Columns `id` (file name without extension), `audio`, `captions` (five).

    Raises:
        ValueError: naming the first wrong line.
        FileNotFoundError: if the table or a sound is missing.
    """
    if split not in CARD.sizes:
        raise ValueError(f"split must be one of {', '.join(CARD.sizes)}, got {split!r}")
    return assemble(rows(folder, split), FEATURES, CARD, split, folder)


def rows(folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split; `audio` is None where the file is missing."""
    captions = [f"caption_{i}" for i in range(1, 6)]
    columns = {"file_name": file_name} | dict.fromkeys(captions, text)
    for _, row in read_table(Path(folder, f"clotho_captions_{split}.csv"), columns):
        yield {
            "id": Path(row["file_name"]).stem,
            "audio": existing(Path(folder, split, row["file_name"])),
            "captions": [row[name] for name in captions],
        }
