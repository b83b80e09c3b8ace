"""VIP-ANT's own index of AudioSet and AudioCaps (`src_*.csv`): JSON lines that name the sound and frames of each clip.

vipant_index("src_audiocaps_train.csv", "audioset/")
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.audioset import label_names
from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, existing, is_prepared, wrong
from datasets_scripts.clips import check_youtube_id, clip_id, parse_seconds
from datasets_scripts.files import json_lines

CARD = Card(
    name="vipant_index",
    description="Clips of AudioSet with four frames each, and with captions where they are AudioCaps', as VIP-ANT's "
    "authors list them.",
    homepage="https://github.com/zhaoyanpeng/audioset-dl",
    license="that of AudioSet and of AudioCaps",
    citation="Zhao et al.: Connecting the Dots between Audio and Text without Parallel Data, NAACL 2022",
    sizes={},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "frames": datasets.List(datasets.Image(decode=False)),
    "captions": TEXTS,
    "labels": TEXTS,
    "label_ids": TEXTS,
    "start": datasets.Value("float64"),
    "end": datasets.Value("float64"),
}


def vipant_index(index: str | Path, media: str | Path, labels: str | Path | None = None) -> datasets.Dataset:
    """The clips of VIP-ANT's index that are there, with their frames and captions.

    Args:
        index (`str` or `Path`):
            `src_audiocaps_train.csv` or another of the authors' files.
        media (`str` or `Path`):
            The authors' folder: sounds in `DIR/aclip/ID.p0.mp3` and frames in `DIR/frame/ID.p0.4_01.jpg`, by the
            index; or shards made by `prepare`.
        labels (`str` or `Path`, *optional*):
            `class_labels_indices.csv` or `ontology.json`, for names instead of ids in `labels`.

    Returns:
        `datasets.Dataset`: columns `id` (`YTID_start`), `audio`, `frames`, `captions` (none but for AudioCaps),
        `labels`, `label_ids`, `start`, `end`; the frames of the shards if there are any. Clips that are missing are
        counted in a warning.

    Raises:
        ValueError: naming the first wrong line.
        FileNotFoundError: if a table or all clips are missing.
    """
    features = {name: feature for name, feature in FEATURES.items() if name != "frames" or not is_prepared(media)}
    return assemble(rows(index, media, labels), features, CARD, Path(index).stem, media, may_be_missing=True)


def rows(index: str | Path, media: str | Path, labels: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of an index; `audio` is None where the file is missing."""
    names = label_names(labels) if labels else None
    for line, clip in json_lines(index):
        try:
            folder = Path(media, clip["dir"])
            sounds = "clip" if "clip" in clip else "aclip"  # of balanced AudioSet and of the others
            start, label_ids = parse_seconds(clip["bos"]), list(clip.get("labels", []))
            row = {
                "id": clip_id(check_youtube_id(clip["id"]), start),
                "audio": existing(folder / sounds / f"{clip['id']}.{clip[sounds][0]}"),
                "captions": list(clip.get("captions", [])),
                "labels": [names[label] for label in label_ids] if names else label_ids,
                "label_ids": label_ids,
                "start": start,
                "end": parse_seconds(clip["eos"]),
            }
            frames = [folder / "frame" / f"{clip['id']}.{frame}" for frame in clip["frame"]]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise wrong(index, line, f"is no clip of VIP-ANT's index, or has an unknown label: {error!r}") from error
        row["frames"] = [{"bytes": None, "path": str(frame)} for frame in frames if frame.is_file()]
        yield row
