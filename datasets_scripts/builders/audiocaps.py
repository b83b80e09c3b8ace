"""AudioCaps: captions of AudioSet clips, one each in the training split, five in the others."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, find_segment, read_table, text, wrong
from datasets_scripts.clips import check_youtube_id, clip_id, parse_seconds

CARD = Card(
    name="audiocaps",
    description="Captions written by people who heard (and, in part, saw) ten-second clips of AudioSet.",
    homepage="https://github.com/cdjkim/audiocaps",
    license="MIT (captions)",
    citation="Kim et al.: AudioCaps: Generating captions for audios in the wild, NAACL 2019",
    sizes={"train": 49_838, "val": 495, "test": 975},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "captions": TEXTS,
    "start": datasets.Value("float64"),
}


def audiocaps(table: str | Path, media: str | Path) -> datasets.Dataset:
    """The clips of an AudioCaps split that are there, with all their captions.

    Args:
        table: `train.csv`, `val.csv` or `test.csv` (audiocap_id, youtube_id, start_time, caption).
        media: folder of audio or video files, or of shards made by `prepare`.

    Returns:
        Columns `id` (`YTID_start`), `audio`, `captions`, `start`; those of the shards if there are any. Clips that
        are missing are counted in a warning.

    Raises:
        ValueError: naming the first wrong line.
        FileNotFoundError: if the table or all clips are missing.
    """
    return assemble(rows(table, media), FEATURES, CARD, Path(table).stem, media, may_be_missing=True)


def rows(table: str | Path, media: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one row a clip; `audio` is None where the file is missing."""
    clips: dict[tuple[str, float], list[str]] = {}
    columns: dict[str, Callable[[str], Any]] = {
        "audiocap_id": int,
        "youtube_id": check_youtube_id,
        "start_time": parse_seconds,
        "caption": text,
    }
    seen = set()
    for line, row in read_table(table, columns):
        if row["audiocap_id"] in seen:
            raise wrong(table, line, f"the audiocap_id {row['audiocap_id']} occurs twice")
        seen.add(row["audiocap_id"])
        clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row["caption"])
    for (youtube_id, start), captions in clips.items():
        audio = find_segment(media, youtube_id, start, start + 10)
        yield {"id": clip_id(youtube_id, start), "audio": audio, "captions": captions, "start": start}
