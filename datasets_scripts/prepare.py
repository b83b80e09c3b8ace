"""From videos to shards: mono FLAC (16 kHz by default), evenly spaced JPEG frames and metadata.

    python -m datasets_scripts.prepare videos/ --output prepared/
    python -m datasets_scripts.prepare balanced_train_segments.csv --videos videos/ --output s3://bucket/balanced
    python -m datasets_scripts.prepare files.txt --output prepared/ --engine ray --workers 64

SOURCE is a folder, a text file with one path a line, or an index CSV in AudioSet's format. A run that was stopped is
continued by the same command, and gives the shards that it would have given. Clips that cannot be read are listed in
`failures.jsonl` with their reasons.
"""

import argparse
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from datasets_scripts.clips import ClipRequest, from_folder, from_index, from_list
from datasets_scripts.commands import run_command
from datasets_scripts.files import Folder, claim, locked
from datasets_scripts.records import Limits, Settings, failure, read_record
from datasets_scripts.shards import Journal, commit_shard, finish, grouped, read_report, shard_name
from datasets_scripts.workers import Casualty, Engine, guarded_map, run_tasks


def prepare(
    requests: Callable[[], Iterable[ClipRequest]],
    output: str | os.PathLike,
    settings: Settings = Settings(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    workers: int | None = None,
    engine: Engine = "local",
    refresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes clips to shards; continues where an earlier run was stopped.

    Args:
        requests: gives the clips, the same ones in the same order whenever it is called.
        output: local folder or URL.
        settings: what decides the content of the shards.
        limits: for each clip.
        workers: number of processes (all CPU cores by default), or of Ray actors.
        engine: "local", or "ray", where each task is a shard; the records are the same.
        refresh: makes shards anew that hold failures (files may have come since), or clips whose files have changed.
        progress: shows a bar with rate and time left.

    Returns:
        The manifest: counts, checksums, and numbers of failures by reason.

    Raises:
        ValueError: if an id occurs twice, there is no clip, the output folder belongs to another source or to other
            settings, or a file has changed since its shard was made.
        RuntimeError: if another run is writing to the output folder.
    """
    workers = workers or os.cpu_count() or 1
    folder = Folder(output)
    count, fingerprint = _survey(requests)
    plan = {"clips": count, "fingerprint": fingerprint, "settings": asdict(settings)}
    work = _work_folder(folder, plan)
    with locked(folder.root if folder.local else work):
        _begin(folder, work, plan)
        finished = _finished(folder, grouped(requests(), settings.shard_size), refresh)
        if len(finished) < -(-count // settings.shard_size):
            folder.remove("manifest.json")  # says that all shards are there
        shards = (shard for shard in enumerate(grouped(requests(), settings.shard_size)) if shard[0] not in finished)
        writer = _ShardWriter(folder.path, work, settings, limits)
        done = sum(finished.values())
        with tqdm(total=count, initial=done, unit="clip", disable=not progress, smoothing=0.05) as bar:
            if engine == "local":
                for _ in writer.write(shards, workers, bar.update):
                    pass
            else:
                for clips in run_tasks(writer, shards, engine, workers):
                    bar.update(clips)
        for journal in work.glob("*.sqlite*"):  # of a run that was killed between a report and its clean-up
            journal.unlink()
        if folder.local:
            work.rmdir()
        return finish(folder, plan)


def _finished(folder: Folder, shards: Iterable[list[ClipRequest]], refresh: bool) -> dict[int, int]:
    """Index and number of clips of the shards that are to stay as they are."""
    finished = {}
    for index, clips in enumerate(shards):
        report = read_report(folder, index)
        if report is None:
            continue
        changed = _changed(clips, report["sources"])
        if changed and not refresh:
            raise ValueError(
                f"the file of {changed.id!r} has changed since {shard_name(index)} was made of it: let --refresh make "
                "such shards anew, or choose another output folder"
            )
        if not changed and not (refresh and report["failures"]):
            finished[index] = len(clips)
    return finished


def _changed(clips: list[ClipRequest], sources: list[list[int] | None]) -> ClipRequest | None:
    """The first clip whose file is not the one that was read; files that have come or gone since are no change."""
    for clip, then in zip(clips, sources, strict=True):
        if then is not None and clip.file_state() not in (then, None):
            return clip
    return None


class _ShardWriter:
    """Writes shards, wherever it is called: the task that Ray spreads over machines."""

    def __init__(self, output: str, work: Path, settings: Settings, limits: Limits):
        self.output, self.work, self.settings, self.limits = output, work, settings, limits

    def __call__(self, shard: tuple[int, list[ClipRequest]]) -> int:
        """Writes one shard in a single process; gives its number of clips."""
        return sum(report["clips"] for report in self.write([shard], 1, lambda clips: None))

    def write(
        self, shards: Iterable[tuple[int, list[ClipRequest]]], workers: int, advance: Callable[[int], Any]
    ) -> Iterator[dict[str, Any]]:
        """Reads clips in child processes, and writes each shard when its last clip is in. Yields the reports."""
        journals: dict[int, tuple[Journal, set[int]]] = {}  # by shard: finished clips, positions still to come

        def items() -> Iterator[tuple[Any, Any]]:
            for index, clips in shards:
                journal = Journal(self.work / f"{shard_name(index)}.sqlite")
                finished = journal.finished(clips)
                advance(len(finished))
                missing = set(range(len(clips))) - finished
                journals[index] = journal, missing
                for position in sorted(missing):
                    yield (index, position, clips[position]), (clips[position], self.settings)

        folder, limits = Folder(self.output), self.limits
        for (index, position, clip), outcome in guarded_map(
            read_record, items(), workers, limits.timeout, limits.memory
        ):
            if isinstance(outcome, Casualty):
                outcome = {"file": clip.file_state(), **failure(clip.id, outcome.reason, outcome.detail)}
            journal, missing = journals[index]
            journal.add(position, outcome)
            missing.discard(position)
            advance(1)
            # A shard that was whole in its journal already gives no item of its own, so all are looked at.
            for index in [index for index, (_, missing) in journals.items() if not missing]:
                yield _commit(folder, index, journals.pop(index)[0])
        for index in sorted(journals):
            yield _commit(folder, index, journals.pop(index)[0])


def _commit(folder: Folder, index: int, journal: Journal) -> dict[str, Any]:
    report = commit_shard(folder, index, journal.outcomes())
    journal.remove()
    return report


def _survey(requests: Callable[[], Iterable[ClipRequest]]) -> tuple[int, str]:
    """Counts the clips and sums up what is asked of them; eight bytes of memory a clip."""
    total = hashlib.sha256()
    hashes = array("Q")
    for request in requests():
        total.update(repr((request.id, request.path, request.start, request.end, request.labels)).encode())
        hashes.append(_hash(request.id))
    values = np.sort(np.frombuffer(hashes, np.uint64)) if hashes else np.zeros(0, np.uint64)
    if not len(values):
        raise ValueError("there is no clip in this source")
    repeated = set(values[1:][values[1:] == values[:-1]].tolist())
    if repeated:
        seen = set()
        for request in requests():
            if _hash(request.id) in repeated:
                if request.id in seen:
                    raise ValueError(f"the id {request.id!r} occurs twice in this source: rename or drop one")
                seen.add(request.id)
    return len(values), total.hexdigest()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _begin(folder: Folder, work: Path, plan: dict[str, Any]) -> None:
    """Compares the plan with that of an earlier run, or writes it down."""
    if not folder.exists("plan.json"):
        if folder.names("shards") or folder.names("reports"):
            raise ValueError(f"{folder.path} holds shards but no plan.json: choose another output folder")
        for journal in work.glob("*.sqlite"):  # of a run whose output was removed
            journal.unlink()
    settings = {name: value for name, value in plan.items() if name != "settings"} | plan["settings"]
    claim(folder, settings, "plan.json")
    folder.sweep()
    work.mkdir(parents=True, exist_ok=True)


def _work_folder(folder: Folder, plan: dict[str, Any]) -> Path:
    """Where unfinished shards are kept: in a local output folder, or in the user's cache for a remote one."""
    if folder.local:
        return Path(folder.root, "_work")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    name = json.dumps([folder.path, plan], sort_keys=True)  # what is left there of another run must not be taken
    return cache / "dali-audio" / "prepare" / hashlib.sha256(name.encode()).hexdigest()[:16]


def clips_of(
    source: str | Path,
    videos: str | Path | None = None,
    seconds: float | None = 10.0,
    allow_short: bool = False,
    follow_links: bool = False,
) -> Callable[[], Iterable[ClipRequest]]:
    """The clips of a folder, a list of files or an index CSV, as `prepare` wants them.

    Args:
        source: folder; text file with one path a line; or CSV in AudioSet's format.
        videos: folder of an index' files; its own folder by default.
        seconds: length of the clips of a folder or list, from the start of each file; None for whole files.
        allow_short: whether videos that end before an index' segments will do.
        follow_links: whether links may lead out of the folder.

    Raises:
        FileNotFoundError: if there is no such source.
    """
    source = Path(source).absolute()  # workers may run elsewhere
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder, a list of files, or an index CSV")
    if source.is_dir():
        return lambda: from_folder(source, seconds, follow_links)
    if source.suffix.lower() == ".csv":
        return lambda: from_index(source, Path(videos or source.parent).absolute(), allow_short, follow_links)
    return lambda: from_list(source, seconds, follow_links)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser("datasets_scripts.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder, list of files, or index CSV in AudioSet's format")
    parser.add_argument("--output", required=True, help="local folder or fsspec URL")
    parser.add_argument("--videos", type=Path, help="folder of the videos that an index names (default: the CSV's)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how much of each file to take; 0 for whole files")
    parser.add_argument("--frames", type=int, default=Settings.frames, help="frames a clip; 0 for sound alone")
    parser.add_argument(
        "--frame-size", type=int, default=Settings.frame_size, help="shorter side in pixels; 0 as it is"
    )
    parser.add_argument("--jpeg-quality", type=int, default=Settings.jpeg_quality)
    parser.add_argument("--shard-size", type=int, default=Settings.shard_size, help="clips a shard")
    parser.add_argument(
        "--sampling-rate",
        type=int,
        default=Settings.sampling_rate,
        help="rate of the sound in Hz (44100 for VIP-ANT); 0 keeps each file's own",
    )
    parser.add_argument("--allow-short", action="store_true", help="take videos that end before their segment does")
    parser.add_argument("--follow-links", action="store_true", help="let links lead out of the source folder")
    parser.add_argument("--refresh", action="store_true", help="redo the shards that hold failures or changed files")
    parser.add_argument("--timeout", type=float, default=Limits.timeout, help="seconds for one clip")
    parser.add_argument("--memory", type=int, default=Limits.memory >> 20, help="MiB for one process")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, help="processes or Ray actors (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return run_command(parser, _prepare, arguments)


def _prepare(options: argparse.Namespace) -> int:
    manifest = prepare(
        clips_of(options.source, options.videos, options.seconds or None, options.allow_short, options.follow_links),
        options.output,
        Settings(
            options.frames,
            options.frame_size or None,
            options.jpeg_quality,
            options.shard_size,
            options.sampling_rate or None,
        ),
        Limits(options.timeout, options.memory << 20),
        options.workers,
        options.engine,
        options.refresh,
        not options.quiet,
    )
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["failures"].items()))
    print(f"{manifest['rows']} of {manifest['clips']} clips in {len(manifest['files'])} shards: {options.output}")
    if failures:
        print(f"failures: {failures} (see failures.jsonl)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
