"""Shards on any fsspec path: how prepared clips are written, committed, resumed and opened again.

A folder of shards:

    plan.json           what was asked: settings, number of clips, fingerprint of the source
    shards/*.parquet    (or .tar) the records
    reports/*.json      one a shard, written last: counts, checksum, failures. A shard without one does not count.
    manifest.json       counts and checksums of all
    failures.jsonl      id, reason and detail of every clip that could not be read
    README.md           the data set card, by which `datasets.load_dataset(folder)` finds the shards
"""

import hashlib
import io
import json
import os
import pickle
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.files import Folder

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(sampling_rate=16_000, decode=False),
        "frames": datasets.List(datasets.Image(decode=False)),
        "frame_times": datasets.List(datasets.Value("float32")),
        "labels": datasets.List(datasets.Value("string")),
        "source": datasets.Value("string"),
        "start": datasets.Value("float64"),
        "duration": datasets.Value("float64"),
    }
)
ROW_GROUP = 32  # rows that a reader holds at a time


class Journal:
    """Finished clips of a shard that is not finished, on local disk: what a killed run leaves for the next one.

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
        self._database.execute("CREATE TABLE IF NOT EXISTS clips (position INTEGER PRIMARY KEY, outcome BLOB)")

    def positions(self) -> set[int]:
        """Of the clips that are in."""
        return {position for (position,) in self._database.execute("SELECT position FROM clips")}

    def add(self, position: int, outcome: dict[str, Any]) -> None:
        """Keeps the outcome of the clip at a position in the shard."""
        self._database.execute("INSERT OR REPLACE INTO clips VALUES (?, ?)", (position, pickle.dumps(outcome)))

    def outcomes(self) -> Iterator[dict[str, Any]]:
        """In order of position, one at a time."""
        for (outcome,) in self._database.execute("SELECT outcome FROM clips ORDER BY position"):
            yield pickle.loads(outcome)

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


def write_parquet(file: Any, rows: Iterable[dict[str, Any]], features: datasets.Features = FEATURES) -> int:
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


def write_tar(file: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as a webdataset tar: `KEY.json`, `KEY.flac`, `KEY.00.jpg`, `KEY.01.jpg`, ...

    KEY is the id with everything but letters, digits, `_` and `-` escaped as in URLs, so that it names no folder.

    Returns:
        Number of rows.
    """
    count = 0
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for count, row in enumerate(rows, 1):  # noqa: B007
            key = tar_key(row["id"])
            meta = {name: value for name, value in row.items() if name not in ("audio", "frames")}
            _add_member(archive, f"{key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
            _add_member(archive, f"{key}.flac", row["audio"]["bytes"])
            for number, frame in enumerate(row["frames"]):
                _add_member(archive, f"{key}.{number:02d}.jpg", frame["bytes"])
    return count


def tar_key(name: str) -> str:
    """Escapes an id for use as a file name; long ones are cut and end in their checksum."""
    key = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    return key if len(key) <= 80 else f"{key[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # with no time and no owner: the same records give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


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
    shard_format: str = "parquet",
    features: datasets.Features = FEATURES,
) -> dict[str, Any]:
    """Writes one shard and then its report, which makes it count.

    Args:
        folder: of the shards.
        index: of the shard.
        outcomes: in order, a record each, or `{"failure": {"id", "reason", "detail"}}`.
        shard_format: "parquet" or "tar".
        features: of the records in parquet.

    Returns:
        The report.
    """
    failures: list[dict[str, str]] = []
    seconds = 0.0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal seconds
        for outcome in outcomes:
            if "failure" in outcome:
                failures.append(outcome["failure"])
            else:
                seconds += outcome["duration"]
                yield outcome

    name = f"shards/{shard_name(index)}.{shard_format}"
    with folder.writing(name) as file:
        count = write_tar(file, rows()) if shard_format == "tar" else write_parquet(file, rows(), features)
    report = {
        "file": {"name": name, "rows": count, "bytes": file.size, "sha256": file.digest()},
        "clips": count + len(failures),
        "seconds": round(seconds, 3),
        "failures": failures,
    }
    if not count:
        folder.remove(name)
        report["file"] = None
    folder.write_json(f"reports/{shard_name(index)}.json", report)
    return report


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
    glob = f"shards/*.{settings['shard_format']}"
    rule = manifest["plan"].get("filter")
    kept = f"Kept of {rule['of']} by the smallest `score`: {rule['score']}." if rule else ""
    failures = "".join(f"- {reason}: {count}\n" for reason, count in sorted(manifest["failures"].items()))
    return f"""---
configs:
- config_name: default
  data_files: {glob}
task_categories:
- audio-classification
- audio-to-audio
---
# Prepared clips

{manifest["rows"]} of {manifest["clips"]} clips, {manifest["seconds"] / 3600:.2f} hours of sound (mono, 16 kHz, FLAC),
{settings["frames"]} JPEG frames each, made by `python -m datasets_scripts.prepare`.

Columns: `id`, `audio` (bytes), `frames` (list of bytes), `frame_times` (seconds from the clip's start), `labels`,
`source` (file), `start` (of the clip in its file, seconds), `duration` (of the sound, seconds).
{kept}

Clips that could not be read (see `failures.jsonl`):

{failures or "- none" + chr(10)}"""


def open_shards(path: str | os.PathLike, streaming: bool = False) -> "datasets.Dataset | datasets.IterableDataset":
    """Opens a folder of parquet shards with `datasets`.

    Args:
        path: local folder or URL, written by `prepare` or `filter_pairs`.
        streaming: gives an `IterableDataset` that reads as it goes; otherwise `datasets` keeps a copy in its cache.

    Returns:
        The data set. For training over many shards see also `datasets_scripts.streaming`.

    Raises:
        FileNotFoundError: if there is no finished parquet shard.
    """
    folder = Folder(path)
    files = [f"{folder.path}/{file['name']}" for file in read_manifest(path)["files"]]
    return datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=streaming)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the manifest of a folder of parquet shards.

    Raises:
        FileNotFoundError: if there is none, or no parquet shard.
    """
    folder = Folder(path)
    if not folder.exists("manifest.json"):
        raise FileNotFoundError(f"{path} has no manifest.json: not a folder of shards, or prepare has not finished")
    manifest = json.loads(folder.read("manifest.json"))
    if not manifest["files"] or not manifest["files"][0]["name"].endswith(".parquet"):
        raise FileNotFoundError(f"{path} holds no parquet shard")
    return manifest
