"""AudioSet: index CSVs and label names.

audioset("balanced_train_segments.csv", "videos/", labels="class_labels_indices.csv")
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, find_segment, read_table, text, wrong
from datasets_scripts.clips import clip_id, parse_segment, segment_lines

CARD = Card(
    name="audioset",
    description="Ten-second segments of YouTube videos, each with one or several labels of 527 classes of sound.",
    homepage="https://research.google.com/audioset/",
    license="CC BY 4.0 (index), CC BY-SA 4.0 (ontology)",
    citation="Gemmeke et al.: Audio Set: An ontology and human-labeled dataset for audio events, ICASSP 2017",
    # as the headers of the released files count them
    sizes={"eval": 20_371, "balanced_train": 22_160, "unbalanced_train": 2_041_789},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "labels": TEXTS,
    "label_ids": TEXTS,
    "start": datasets.Value("float64"),
    "end": datasets.Value("float64"),
}


def audioset(index: str | Path, media: str | Path, labels: str | Path | None = None) -> datasets.Dataset:
    """The clips of an AudioSet index that are there.

    Args:
        index: `eval_segments.csv` or another of the official CSVs.
        media: folder of audio or video files, or of shards made by `prepare`.
        labels: `class_labels_indices.csv` or `ontology.json`, for names instead of ids in `labels`.

    Returns:
        Columns `id` (`YTID_start`), `audio`, `labels`, `label_ids`, `start`, `end`; those of the shards if there are
        any. Clips that are missing are counted in a warning.

    Raises:
        ValueError: naming the first wrong line, or if the index does not hold as many clips as its header says.
        FileNotFoundError: if a table or all clips are missing.
    """
    split = Path(index).stem.removesuffix("_segments")
    return assemble(rows(index, media, labels), FEATURES, CARD, split, media, may_be_missing=True)


def rows(index: str | Path, media: str | Path, labels: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of an index; `audio` is None where the file is missing."""
    names = label_names(labels) if labels else None
    if not Path(index).is_file():
        raise FileNotFoundError(f"{index} does not exist: get it from {CARD.homepage}download.html")
    count = 0
    for line, fields in segment_lines(index):
        try:
            segment = parse_segment(fields)
        except ValueError as error:
            raise wrong(index, line, str(error)) from error
        if names is not None and (unknown := [label for label in segment.labels if label not in names]):
            raise wrong(index, line, f"{labels} does not know the label {unknown[0]!r}")
        count += 1
        yield {
            "id": clip_id(segment.youtube_id, segment.start),
            "audio": find_segment(media, segment.youtube_id, segment.start, segment.end),
            "labels": [names[label] if names else label for label in segment.labels],
            "label_ids": list(segment.labels),
            "start": segment.start,
            "end": segment.end,
        }
    told = re.search(r"num_segs=(\d+)", "".join(_head(index)))
    if told and int(told[1]) != count:
        raise ValueError(f"{index} has {count} clips, its header says {told[1]}: the file is not whole")


def _head(path: str | Path) -> list[str]:
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        return [line for line, _ in zip(file, range(3), strict=False) if line.startswith("#")]


def label_names(path: str | Path) -> dict[str, str]:
    """Reads the names of the labels by their ids, in the order of the classes.

    Args:
        path: `class_labels_indices.csv` (index, mid, display_name) or `ontology.json`.

    Raises:
        ValueError: if the file is not like one of these.
    """
    if Path(path).suffix == ".json":
        try:
            return {node["id"]: node["name"] for node in json.loads(Path(path).read_text(encoding="utf-8"))}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no ontology (a list of nodes with id and name): {error!r}") from error
    names: dict[str, str] = {}
    for line, row in read_table(path, {"index": int, "mid": text, "display_name": text}):
        if row["index"] != len(names):
            raise wrong(path, line, f"expected index {len(names)}, found {row['index']}")
        names[row["mid"]] = row["display_name"]
    return names
