"""Any CSV file as a data set: which column holds the sound's file, which the caption.

csv_table("clips.csv", {"audio": "file", "captions": "text"})
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.builders.tables import AUDIO, TEXTS, Card, assemble, existing, read_table, text, wrong

CARD = Card(
    name="csv_table",
    description="Sounds with captions or labels, as a CSV file lists them.",
    homepage="",
    license="that of the files",
    citation="",
    sizes={},
)
FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "image": datasets.Image(decode=False),
    "captions": TEXTS,
    "labels": TEXTS,
    "fold": datasets.Value("int64"),
}
ALIASES = {"caption": "captions", "label": "labels"}


def csv_table(
    table: str | Path, columns: dict[str, str] | None = None, media: str | Path | None = None
) -> datasets.Dataset:
    """The sounds that a CSV file lists. Lines of the same sound become one row with several captions or labels.

    Args:
        table: CSV file whose first line names its columns.
        columns: of the table, by what they hold: `audio` and `image` (files), `captions` and `labels` (a text a
            line), `id`, `fold`. By default the columns that have these names.
        media: folder that the files are relative to, that of the table by default; or shards made by `prepare`,
            whose ids are then the files' names without extension.

    Returns:
        The columns that were asked for, and `id`: by default the file's name without extension.

    Raises:
        ValueError: if no column holds the sound, what a column holds is not one of these, or naming the first wrong
            line.
        FileNotFoundError: if the table or all sounds are missing; those that are missing are counted in a warning.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"there is no table {table}")
    columns = _columns(table, columns)
    media = table.parent if media is None else media
    features = {name: feature for name, feature in FEATURES.items() if name in columns or name == "id"}
    return assemble(rows(table, columns, media), features, CARD, "train", media, may_be_missing=True)


def rows(table: Path, columns: dict[str, str], media: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one row a sound, in the order of the table; `audio` is None where the file is missing."""
    convert: dict[str, Callable[[str], Any]] = dict.fromkeys(FEATURES, text) | {"fold": int}
    found: dict[str, dict[str, Any]] = {}
    for line, values in read_table(table, {source: convert[name] for name, source in columns.items()}):
        row = {name: values[source] for name, source in columns.items()}
        file = row["audio"]
        new: dict[str, Any] = {
            **row,
            "id": row.get("id", Path(file).with_suffix("").as_posix()),
            "audio": existing(Path(media, file)),
            **({"image": {"bytes": None, "path": str(Path(media, row["image"]))}} if "image" in row else {}),
            **{name: [] for name in ("captions", "labels") if name in row},
        }
        kept = found.setdefault(new["id"], new)
        if any(kept[name] != new[name] for name in new if name not in ("captions", "labels")):
            raise wrong(table, line, f"{new['id']!r} is an earlier line's, with another file or fold")
        for name in ("captions", "labels"):
            if name in row and row[name] not in kept[name]:
                kept[name].append(row[name])
    yield from found.values()


def _columns(table: Path, columns: dict[str, str] | None) -> dict[str, str]:
    """What the columns of a table hold, by the names that the trainers know."""
    if columns is None:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
        columns = {name: name for name in header if ALIASES.get(name, name) in FEATURES}
    columns = {ALIASES.get(name, name): source for name, source in columns.items()}
    if unknown := sorted(columns.keys() - FEATURES.keys()):
        raise ValueError(f"a column can hold {', '.join(FEATURES)}, not {unknown[0]!r}")
    if "audio" not in columns:
        raise ValueError(f"no column of {table} is known to hold the sound: name it by --columns audio=NAME")
    return columns
