"""What of a data set is there, and what is missing against its official lists.

    python -m datasets_scripts.check esc50 ESC-50-master/
    python -m datasets_scripts.check audiocaps tables/ --media videos/ --output report.json
    python -m datasets_scripts.check shards prepared/

Videos vanish, and papers differ by 5 to 15 % in the clips that they had: keep the report with every evaluation.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets_scripts.builders.tables import MEDIA_EXTENSIONS, is_prepared
from datasets_scripts.commands import run_command
from datasets_scripts.files import Folder, write_whole
from datasets_scripts.shards import open_shards, read_manifest

TABLES = {
    "audioset": "{}_segments.csv",
    "audiocaps": "{}.csv",
    "clotho": "clotho_captions_{}.csv",
    "vggsound": "vggsound.csv",
    "esc50": "meta/esc50.csv",
    "urbansound8k": "metadata/UrbanSound8K.csv",
}


@dataclass
class Report:
    """What was found of one split.

    Attributes:
        split: name of the split.
        official: number of clips that the release lists.
        listed: number of clips in the table at hand.
        missing: ids of listed clips that are not there.
        damaged: names of shards that are not as their manifest says.
    """

    split: str
    official: int
    listed: int
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all is there."""
        return self.listed == self.official and not self.missing and not self.damaged

    def __str__(self) -> str:
        """One line, and the first of what is missing."""
        present = self.listed - len(self.missing)
        share = present / self.official if self.official else 1.0
        line = f"{self.split}: {present} of {self.official} clips are there ({share:.1%})"
        if self.listed != self.official:
            line += f"; the table lists {self.listed}"
        for what, names in (("missing", self.missing), ("damaged", self.damaged)):
            if names:
                line += f"\n  {what}: {', '.join(names[:5])}" + (
                    f" and {len(names) - 5} more" if len(names) > 5 else ""
                )
        return line


def check(name: str, folder: str | Path, media: str | Path | None = None) -> list[Report]:
    """Compares what is there with the official lists.

    Args:
        name: name of a data set with official tables, or "shards" for a folder that `prepare` or `filter_pairs` wrote.
        folder: holds the official tables.
        media: folder of the files, or of shards made of them; the folder of the tables by default.

    Returns:
        A report for each split whose table is there.

    Raises:
        ValueError: if there is no such data set, or naming the first wrong line of a table.
        FileNotFoundError: if there is no table.
    """
    if name == "shards":
        return [_check_shards(folder)]
    if name not in TABLES:
        raise ValueError(f"{name!r} has no official list; known are shards, {', '.join(TABLES)}")
    module = import_module(f"datasets_scripts.builders.{name}")
    media = media or folder
    held = set(open_shards(media)["id"]) if is_prepared(media) else None
    reports = []
    for split, official in module.CARD.sizes.items():
        table = Path(folder, TABLES[name].format(split))
        if table.is_file():
            rows = _rows(module, name, table, Path(folder), media, split)
            reports.append(_compare(split, official, rows, held))
    if not reports:
        tables = ", ".join(TABLES[name].format(split) for split in module.CARD.sizes)
        raise FileNotFoundError(f"{folder} holds none of {tables}: get them from {module.CARD.homepage}")
    return reports


def _rows(
    module: Any, name: str, table: Path, folder: Path, media: str | Path, split: str
) -> Iterator[dict[str, Any]]:
    if name == "vggsound":
        return module.rows(table, media, split)
    if name in ("audioset", "audiocaps"):
        return module.rows(table, media)
    return module.rows(folder, split)


def _compare(split: str, official: int, rows: Iterable[dict[str, Any]], held: set[str] | None) -> Report:
    report = Report(split, official, 0)
    for row in rows:
        report.listed += 1
        if row["id"] not in held if held is not None else row["audio"] is None:
            report.missing.append(row["id"])
    return report


def _check_shards(path: str | Path) -> Report:
    folder, manifest = Folder(path), read_manifest(path)
    report = Report("shards", manifest["rows"], 0)
    for file in manifest["files"]:
        digest = hashlib.sha256()
        if folder.exists(file["name"]):
            with folder.open(file["name"]) as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
        if digest.hexdigest() == file["sha256"]:
            report.listed += file["rows"]
        else:
            report.damaged.append(file["name"])
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's description. The exit code is 2 if something is missing."""
    parser = argparse.ArgumentParser("datasets_scripts.check", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"what to check: shards, {', '.join(TABLES)}")
    parser.add_argument("folder", type=Path, help="folder of the official tables, or of shards")
    parser.add_argument("--media", type=Path, help=f"folder of files ({', '.join(MEDIA_EXTENSIONS)}) or of shards")
    parser.add_argument("--output", type=Path, help="JSON file for the whole report, with all missing ids")
    return run_command(parser, _check, arguments)


def _check(options: argparse.Namespace) -> int:
    reports = check(options.name, options.folder, options.media)
    print("\n".join(map(str, reports)))
    if options.output:
        with write_whole(options.output) as part:
            part.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 0 if all(report.complete for report in reports) else 2


if __name__ == "__main__":
    sys.exit(main())
