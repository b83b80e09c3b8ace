"""VGGSound: ten-second clips of YouTube videos in which the sound's source is seen, one of 309 classes each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, find_segment, read_table, text
from datasets_scripts.clips import check_youtube_id, clip_id, parse_seconds

CARD = Card(
    name="vggsound",
    description="Ten-second clips of YouTube videos in which the source of the sound is seen, of 309 classes.",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/vggsound/",
    license="CC BY 4.0",
    citation="Chen et al.: VGGSound: A large-scale audio-visual dataset, ICASSP 2020",
    sizes={"train": 183_730, "test": 15_446},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "labels": TEXTS,
    "start": datasets.Value("float64"),
}


def vggsound(table: str | Path, media: str | Path, split: str = "test") -> datasets.Dataset:
    """The clips of a split of VGGSound that are there.

    Args:
        table: `vggsound.csv` (YouTube id, start in seconds, label, split; without header).
        media: folder of audio or video files, or of shards made by `prepare`.
        split: "train" or "test".

    Returns:
        Columns `id` (`YTID_start`), `audio`, `labels` (one), `start`; those of the shards if there are any. Clips
        that are missing are counted in a warning.

    Raises:
        ValueError: naming the first wrong line.
        FileNotFoundError: if the table or all clips are missing.
    """
    _split(split)
    return assemble(rows(table, media, split), FEATURES, CARD, split, media, may_be_missing=True)


def rows(table: str | Path, media: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split; `audio` is None where the file is missing."""
    columns = {"youtube_id": check_youtube_id, "start": parse_seconds, "label": text, "split": _split}
    for _, row in read_table(table, columns, header=False):
        if row["split"] == split:
            yield {
                "id": clip_id(row["youtube_id"], row["start"]),
                "audio": find_segment(media, row["youtube_id"], row["start"], row["start"] + 10),
                "labels": [row["label"]],
                "start": row["start"],
            }


def _split(name: str) -> str:
    if name not in CARD.sizes:
        raise ValueError(f"split must be train or test, not {name!r}")
    return name
