"""CAV-MAE's JSON, the format of DALI's lists too: sounds, and frames in the folders `frame_0` to `frame_9`.

cav_mae("AS500k.json")
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.audioset import label_names
from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, find_moved, is_prepared

CARD = Card(
    name="cav_mae",
    description="Clips with ten frames each, as CAV-MAE and DALI list them.",
    homepage="https://github.com/YuanGongND/cav-mae",
    license="that of the clips",
    citation="Gong et al.: Contrastive Audio-Visual Masked Autoencoder, ICLR 2023",
    sizes={},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "frames": datasets.List(datasets.Image(decode=False)),
    "labels": TEXTS,
    "label_ids": TEXTS,
}
FRAMES = 10


def cav_mae(table: str | Path, media: str | Path | None = None, labels: str | Path | None = None) -> datasets.Dataset:
    """The clips of a CAV-MAE list that are there, with their frames in order.

    Args:
        table (`str` or `Path`):
            JSON file: `{"data": [{"video_id", "wav", "video_path", "labels"}]}`.
        media (`str` or `Path`, *optional*):
            Folder to which the files were moved, in folders named as in the list: a sound or frame is looked for by
            the end of its path. By default the paths of the list. Or shards made by `prepare`.
        labels (`str` or `Path`, *optional*):
            `class_labels_indices.csv` or `ontology.json`, for names instead of ids in `labels`.

    Returns:
        `datasets.Dataset`: columns `id`, `audio`, `frames` (those that are there), `labels`, `label_ids`; the frames
        of the shards if there are any. Clips whose sound is missing are counted in a warning.

    Raises:
        ValueError: if the file is no such list, naming the first wrong entry.
        FileNotFoundError: if the table or all clips are missing.
    """
    prepared = media is not None and is_prepared(media)
    features = {name: feature for name, feature in FEATURES.items() if name != "frames" or not prepared}
    found = rows(table, media, labels)
    return assemble(found, features, CARD, Path(table).stem, media or Path(table).parent, may_be_missing=True)


def rows(
    table: str | Path, media: str | Path | None = None, labels: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yields one row a clip; `audio` is None where the file is missing."""
    names = label_names(labels) if labels else None
    try:
        clips = json.loads(Path(table).read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{table} is no list of CAV-MAE, {{"data": [...]}}: {error!r}') from error
    for number, clip in enumerate(clips, 1):
        try:
            name, folder = clip["video_id"], clip["video_path"]
            label_ids = [label for label in clip.get("labels", "").split(",") if label]
            frames = [find_moved(f"{folder}/frame_{i}/{name}.jpg", media) for i in range(FRAMES)]
            row = {
                "id": name,
                "audio": find_moved(clip["wav"], media),
                "frames": [{"bytes": None, "path": frame} for frame in frames if frame is not None],
                "labels": [names[label] for label in label_ids] if names else label_ids,
                "label_ids": label_ids,
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{table}, clip {number}: it lacks, or does not know, {error!r}") from error
        yield row
