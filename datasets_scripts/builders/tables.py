"""What the builders share: tables read line by line, rows made into a data set."""

import csv
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from datasets_scripts.clips import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, find_media
from datasets_scripts.files import Folder
from datasets_scripts.shards import grouped, open_shards

logger = logging.getLogger(__name__)

MEDIA_EXTENSIONS = AUDIO_EXTENSIONS + VIDEO_EXTENSIONS
AUDIO = datasets.Audio(decode=False)  # path or bytes; decoding by `datasets` would need torchcodec
TEXTS = datasets.List(datasets.Value("string"))
FOLD_FEATURES = {
    "id": datasets.Value("string"),
    "audio": AUDIO,
    "labels": TEXTS,
    "fold": datasets.Value("int64"),
    "target": datasets.Value("int64"),
}


@dataclass(frozen=True)
class Card:
    """What there is to know about a data set.

    Attributes:
        name: of the data set.
        description: in a few sentences.
        homepage: where it comes from.
        license: of its annotations or sounds.
        citation: of its paper.
        sizes: number of clips in the official list of each split.
    """

    name: str
    description: str
    homepage: str
    license: str
    citation: str
    sizes: dict[str, int]


def read_table(
    path: str | Path, columns: Mapping[str, Callable[[str], Any]], header: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a CSV file line by line.

    Args:
        path: of the file.
        columns: what turns the text of each column into its value, or raises ValueError.
        header: whether the first line names the columns, of which there may be more; otherwise they are in order.

    Yields:
        Line number and values by column.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the first line that is wrong, and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no table {path}")
    with Path(path).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])] if header else list(columns)
            if absent := [name for name in columns if name not in names]:
                raise ValueError(f"there is no column {', '.join(absent)} in {', '.join(names)}")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise ValueError(f"expected {len(names)} fields, found {len(fields)}: {fields}")
                row = dict(zip(names, fields, strict=True))
                yield reader.line_num, {name: _value(convert, name, row[name]) for name, convert in columns.items()}
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error


def _value(convert: Callable[[str], Any], name: str, text: str) -> Any:
    try:
        return convert(text.strip())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def text(value: str) -> str:
    """A text that must not be empty."""
    if not value:
        raise ValueError("is empty")
    return value


def file_name(value: str) -> str:
    """The name of a file, which must not lead to another folder."""
    if not value or value in (".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise ValueError(f"{value!r} is not the name of a file")
    return value


def wrong(path: str | Path, line: int, what: str) -> ValueError:
    """An error that names a line of a file."""
    return ValueError(f"{path}, line {line}: {what}")


def fold_rows(
    table: Path, columns: Sequence[str], name: re.Pattern, example: str, sounds: Callable[[int], Path]
) -> Iterator[dict[str, Any]]:
    """Yields rows of a data set of classes in folds; `audio` is None where the file is missing.

    Args:
        table: of the data set.
        columns: of the file's name, the fold, the number of the class and its name.
        name: what file names are like; its groups `fold` and `target` must agree with the table.
        example: of a file name, for the error.
        sounds: gives the folder of a fold's files.

    Raises:
        ValueError: naming the first wrong line.
    """
    file, fold, target, label = columns
    for line, row in read_table(table, {file: file_name, fold: int, target: int, label: text}):
        parts = name.fullmatch(row[file])
        if not parts:
            raise wrong(table, line, f"{row[file]!r} is not like {example}")
        found = {"fold": row[fold], "target": row[target]}
        for what, told in parts.groupdict().items():
            if int(told) != found[what]:
                raise wrong(table, line, f"{row[file]} is of {what} {told} by its name, not {found[what]}")
        yield {
            "id": Path(row[file]).stem,
            "audio": existing(sounds(row[fold]) / row[file]),
            "labels": [row[label]],
            **found,
        }


def assemble(
    rows: Iterable[dict[str, Any]],
    features: dict[str, Any],
    card: Card,
    split: str,
    media: str | Path,
    may_be_missing: bool = False,
    needed: str = "audio",
) -> datasets.Dataset:
    """Makes a data set from rows.

    Args:
        rows: with `id` and the other columns; `audio` is a path, or None for a clip whose file is not there.
        features: of the columns.
        card: becomes the data set's info.
        split: name of the split.
        media: folder of the files; or a folder of shards written by `prepare`, whose sounds and frames are taken
            for the rows with the same ids.
        may_be_missing: whether clips without a file are left out, with a warning that counts them.
        needed: what a row must have; None stands for a file that is not there.

    Raises:
        FileNotFoundError: if a file is missing, or all are.
    """
    info = datasets.DatasetInfo(
        description=card.description,
        homepage=card.homepage,
        license=card.license,
        citation=card.citation,
        dataset_name=card.name,
    )
    listed = 0
    missing: list[str] = []

    def present() -> Iterator[dict[str, Any]]:
        nonlocal listed
        for row in rows:
            listed += 1
            if row[needed] is None:
                missing.append(row["id"])
            else:
                audio = None if row["audio"] is None else {"bytes": None, "path": row["audio"]}
                yield {**row, "audio": audio}

    if is_prepared(media):
        table = {row["id"]: row for row in rows}
        listed = len(table)
        dataset = _join(table, features, media)
        missing = sorted(set(table) - set(dataset["id"]))
        info.features = dataset.features
        dataset = datasets.Dataset(dataset.data, info=info, split=split, indices_table=dataset._indices)
    else:
        info.features = datasets.Features(features)
        schema = info.features.arrow_schema
        tables = [pa.Table.from_pylist(group, schema=schema) for group in grouped(present(), 10_000)]
        dataset = datasets.Dataset(
            pa.concat_tables(tables) if tables else schema.empty_table(), info=info, split=split
        )
    if missing and not (may_be_missing and len(dataset)):
        lists = f"; `python -m datasets_scripts.check {card.name} DIR` lists them" if card.sizes else ""
        raise FileNotFoundError(
            f"{len(missing)} of {listed} clips of {card.name} ({split}) are not in {media}, "
            f"first {missing[0]!r}{lists}"
        )
    if missing:
        logger.warning("%s (%s): %d of %d listed clips are not in %s", card.name, split, len(missing), listed, media)
    return dataset


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds shards written by `prepare`."""
    return Folder(folder).exists("manifest.json")


def _join(rows: dict[str, dict[str, Any]], features: dict[str, Any], shards: str | Path) -> datasets.Dataset:
    prepared = open_shards(shards)
    assert isinstance(prepared, datasets.Dataset)
    own = [name for name in features if name not in ("id", "audio")]
    kept = [i for i, name in enumerate(prepared["id"]) if name in rows]
    prepared = prepared.remove_columns([name for name in own if name in prepared.column_names]).select(kept)
    for name in own:
        column = [rows[row][name] for row in prepared["id"]]
        prepared = prepared.add_column(name, column, feature=features[name])
    return prepared


def find_segment(media: str | Path, youtube_id: str, start: float, end: float | None = None) -> str | None:
    """The path of the file of a YouTube segment in a folder, or None."""
    path = find_media(media, youtube_id, start, end, MEDIA_EXTENSIONS)
    return None if path is None else str(path)


def find_moved(path: str, folder: str | Path | None) -> str | None:
    """Finds a file under the path that a list gives, or where it was moved to.

    Args:
        path (`str`):
            In the list, of any machine.
        folder (`str` or `Path`, *optional*):
            Where to look for it: by the longest end of its path that is there.

    Returns:
        `str` or `None`: its path, None if it is not there.
    """
    if folder is None:
        return existing(Path(path))
    parts = Path(path).parts
    ends = (Path(folder, *parts[first:]) for first in range(1 if Path(path).is_absolute() else 0, len(parts)))
    return next((str(end) for end in ends if end.is_file()), None)


def existing(path: Path) -> str | None:
    """The path as text, or None if there is no such file."""
    return str(path) if path.is_file() else None
