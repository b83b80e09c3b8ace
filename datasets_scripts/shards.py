"""Shards on any fsspec path: how prepared clips are written, committed, resumed and opened again.

A folder of shards:

    plan.json           what was asked: settings, number of clips, fingerprint of the source
    shards/*.parquet    the records
    reports/*.json      one a shard, written last: counts, checksum, failures, states of the source files. A shard
                        without one does not count.
    manifest.json       counts and checksums of all
    failures.jsonl      id, reason and detail of every clip that could not be read
    README.md           the data set card, by which `datasets.load_dataset(folder)` finds the shards
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.clips import ClipRequest
from datasets_scripts.files import Folder

if TYPE_CHECKING:
    import datasets

ROW_GROUP = 32  # rows that a reader holds at a time


@cache
def prepared_features() -> "datasets.Features":
    """The columns of prepared shards."""
    import datasets  # a second of every child process that only reads clips

    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "audio": datasets.Audio(decode=False),
            "frames": datasets.List(datasets.Image(decode=False)),
            "frame_times": datasets.List(datasets.Value("float32")),
            "labels": datasets.List(datasets.Value("string")),
            "source": datasets.Value("string"),
            "start": datasets.Value("float64"),
            "duration": datasets.Value("float64"),
        }
    )


class Journal:
    """Finished clips of a shard that is not finished, on local disk: what a killed run leaves for the next one.

    Outcomes are JSON and bytes: nothing that is read back can run code.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except sqlite3.DatabaseError:  # what a full disk or a power cut may leave; its clips are read again
            path.unlink()
            self._open()

    def _open(self) -> None:
        self._database = sqlite3.connect(self.path, isolation_level=None, timeout=60)
        # A process that is killed loses nothing without syncs; only a power cut does.
        self._database.execute("PRAGMA synchronous = OFF")
        if self._database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(f"{self.path} is damaged")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS clips (position INTEGER PRIMARY KEY, file TEXT, outcome TEXT, media BLOB)"
        )

    def finished(self, clips: Sequence[ClipRequest]) -> set[int]:
        """Positions of the clips that are in, and whose files have not changed since."""
        states = self._database.execute("SELECT position, file FROM clips").fetchall()
        return {position for position, state in states if json.loads(state) == clips[position].file_state()}

    def add(self, position: int, outcome: dict[str, Any]) -> None:
        """Keeps the outcome of the clip at a position in the shard."""
        rest = {name: value for name, value in outcome.items() if name not in ("audio", "frames")}
        media = [part["bytes"] for part in (outcome["audio"], *outcome["frames"])] if "audio" in outcome else []
        row = position, json.dumps(rest["file"]), json.dumps([rest, [len(data) for data in media]]), b"".join(media)
        self._database.execute("INSERT OR REPLACE INTO clips VALUES (?, ?, ?, ?)", row)

    def outcomes(self) -> Iterator[dict[str, Any]]:
        """In order of position, one at a time."""
        for text, media in self._database.execute("SELECT outcome, media FROM clips ORDER BY position"):
            outcome, sizes = json.loads(text)
            ends = accumulate(sizes)
            pieces = [{"bytes": media[end - size : end], "path": None} for size, end in zip(sizes, ends, strict=True)]
            yield {**outcome, "audio": pieces[0], "frames": pieces[1:]} if pieces else outcome

    def close(self) -> None:
        """Closes the file, and keeps it."""
        self._database.close()

    def remove(self) -> None:
        """Closes and removes the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def shard_name(index: int) -> str:
    """The name of a shard, without folder and extension."""
    return f"shard-{index:06d}"


def write_parquet(file: Any, rows: Iterable[dict[str, Any]], features: "datasets.Features") -> int:
    """Writes rows as parquet, a row group at a time, in a form that `datasets` reads with these features.

    Returns:
        Number of rows.
    """
    schema = features.arrow_schema
    count = 0
    # The sounds and pictures are compressed already.
    with pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, compression="none", use_dictionary=False) as writer:
        for group in grouped(rows, ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def grouped(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of up to `size` items."""
    group: list[Any] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def commit_shard(
    folder: Folder,
    index: int,
    outcomes: Iterable[dict[str, Any]],
    features: "datasets.Features | None" = None,
) -> dict[str, Any]:
    """Writes one shard and then its report, which makes it count.

    Args:
        folder: of the shards.
        index: of the shard.
        outcomes: in order, a record each, or `{"failure": {"id", "reason", "detail"}}`; either with `file`, the state
            of its source, if there is one.
        features: of the records; those of prepared clips by default.

    Returns:
        The report.
    """
    failures: list[dict[str, str]] = []
    files: list[list[int] | None] = []
    seconds = 0.0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal seconds
        for outcome in outcomes:
            files.append(outcome.get("file"))
            if "failure" in outcome:
                failures.append(outcome["failure"])
            else:
                seconds += outcome["duration"]
                yield outcome

    name = f"shards/{shard_name(index)}.parquet"
    with folder.writing(name) as file:
        count = write_parquet(file, rows(), features or prepared_features())
    report = {
        "file": {"name": name, "rows": count, "bytes": file.size, "sha256": file.digest()},
        "clips": count + len(failures),
        "seconds": round(seconds, 3),
        "failures": failures,
        "sources": files,
    }
    if not count:
        folder.remove(name)
        report["file"] = None
    folder.write_json(f"reports/{shard_name(index)}.json", report)
    return report


def read_report(folder: Folder, index: int) -> dict[str, Any] | None:
    """The report of a shard; None if there is none, it is damaged, or its shard is not there as a whole."""
    try:
        report = json.loads(folder.read(f"reports/{shard_name(index)}.json"))
        file = report["file"]
        return report if file is None or folder.size(file["name"]) == file["bytes"] else None
    except (FileNotFoundError, ValueError):
        return None


def finish(folder: Folder, plan: dict[str, Any]) -> dict[str, Any]:
    """Sums the reports up in `manifest.json`, `failures.jsonl` and the card.

    Returns:
        The manifest.
    """
    reasons: Counter[str] = Counter()
    manifest: dict[str, Any] = {"clips": 0, "rows": 0, "seconds": 0.0, "files": []}
    with folder.writing("failures.jsonl") as file:
        for name in folder.names("reports", ".json"):
            report = json.loads(folder.read(name))
            manifest["clips"] += report["clips"]
            manifest["seconds"] = round(manifest["seconds"] + report["seconds"], 3)
            if report["file"]:
                manifest["files"].append(report["file"])
                manifest["rows"] += report["file"]["rows"]
            for failure in report["failures"]:
                reasons[failure["reason"]] += 1
                file.write(json.dumps(failure, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    manifest["failures"] = dict(reasons)
    manifest["plan"] = plan
    folder.write("README.md", _card(manifest).encode())
    folder.write_json("manifest.json", manifest)
    return manifest


def _card(manifest: dict[str, Any]) -> str:
    settings = manifest["plan"]["settings"]
    rule = manifest["plan"].get("filter")
    kept = f"Kept of {rule['of']} by the smallest `score`: {rule['score']}." if rule else ""
    failures = "".join(f"- {reason}: {count}\n" for reason, count in sorted(manifest["failures"].items()))
    return f"""---
configs:
- config_name: default
  data_files: shards/*.parquet
task_categories:
- audio-classification
- audio-to-audio
---
# Prepared clips

{manifest["rows"]} of {manifest["clips"]} clips, {manifest["seconds"] / 3600:.2f} hours of sound (mono FLAC),
{settings["frames"]} JPEG frames each, made by `python -m datasets_scripts.prepare`.

Columns: `id`, `audio` (bytes), `frames` (list of bytes), `frame_times` (seconds from the clip's start), `labels`,
`source` (file), `start` (of the clip in its file, seconds), `duration` (of the sound, seconds).
{kept}

Clips that could not be read (see `failures.jsonl`):

{failures or "- none" + chr(10)}"""


def open_shards(path: str | os.PathLike, streaming: bool = False) -> "datasets.Dataset | datasets.IterableDataset":
    """Opens a folder of shards with `datasets`.

    Args:
        path: local folder or URL, written by `prepare` or `filter_pairs`.
        streaming: gives an `IterableDataset` that reads as it goes; otherwise `datasets` keeps a copy in its cache.

    Returns:
        The data set. For training over many shards see also `datasets_scripts.streaming`.

    Raises:
        FileNotFoundError: if there is no finished shard.
    """
    import datasets

    folder = Folder(path)
    files = [f"{folder.path}/{file['name']}" for file in read_manifest(path)["files"]]
    return datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=streaming)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the manifest of a folder of shards.

    Raises:
        FileNotFoundError: if there is none, or it lists no clip.
    """
    folder = Folder(path)
    if not folder.exists("manifest.json"):
        raise FileNotFoundError(f"{path} has no manifest.json: not a folder of shards, or prepare has not finished")
    manifest = json.loads(folder.read("manifest.json"))
    if not manifest["files"]:
        raise FileNotFoundError(f"{path} holds no clip: prepare could read none (see its failures.jsonl)")
    return manifest
