"""Clips of YouTube data sets: only the segments that their indexes name, at a polite rate.

    python -m datasets_scripts.download audioset balanced_train_segments.csv --output videos/
    python -m datasets_scripts.download audiocaps test.csv --output videos/ --sleep 2

yt-dlp (pip install 'dali-audio[download]') finds where a video lies, and PyAV copies the segment from there without
decoding it: `videos/YTID_START.mp4`, which `prepare` and the builders find. The same command goes on after an
interruption: `archive.txt` lists what is done, `unavailable.jsonl` what is gone and why. Mind the terms of the site,
and the rights of those whose videos these are.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from tqdm.auto import tqdm

from datasets_scripts.builders.tables import read_table, text, wrong
from datasets_scripts.clips import Segment, check_youtube_id, clip_id, parse_seconds, parse_segment, segment_lines
from datasets_scripts.commands import run_command
from datasets_scripts.files import locked, sweep, write_whole

NETWORK = {
    "protocol_whitelist": "http,https,tls,tcp,crypto,httpproxy",
    "rw_timeout": "30000000",  # microseconds without a byte
    "reconnect": "1",
    "reconnect_streamed": "1",
    "reconnect_delay_max": "5",
}
BLOCKED = 20  # clips in a row that fail for other reasons than being gone: then something else is wrong


@dataclass(frozen=True)
class Media:
    """Where a video's tracks can be read: both in one place, or each in its own."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()


class Unavailable(Exception):
    """A video that is gone for good: private, removed, closed to this country. It is listed, and not tried again."""


def download(
    segments: Iterable[Segment],
    output: str | Path,
    extract: Callable[[str], Sequence[Media]],
    attempts: int = 4,
    sleep: float = 1.0,
    wait: Callable[[float], None] = time.sleep,
    progress: bool = True,
) -> dict[str, int]:
    """Downloads segments that are not there yet.

    Args:
        segments: the segments to download.
        output: folder for `YTID_START.mp4`, `archive.txt` and `unavailable.jsonl`.
        extract: takes a YouTube id, gives where its tracks lie; raises `Unavailable`, or anything else for faults
            that may pass.
        attempts: how often a clip is tried, with pauses that double.
        sleep: seconds between clips, and the first pause.
        wait: is called with the seconds of each pause.
        progress: whether to show a bar.

    Returns:
        Numbers of clips: "downloaded", "present" (from an earlier run), "unavailable" (in all), "failed" (this time).

    Raises:
        RuntimeError: if another run is writing to the output folder; or after twenty failures in a row, where what was
            downloaded stays.
    """
    folder = Path(output)
    with locked(folder):
        sweep(folder)
        return _fetch_all(segments, folder, extract, attempts, sleep, wait, progress)


def _fetch_all(
    segments: Iterable[Segment],
    folder: Path,
    extract: Callable[[str], Sequence[Media]],
    attempts: int,
    sleep: float,
    wait: Callable[[float], None],
    progress: bool,
) -> dict[str, int]:
    archive, gone = folder / "archive.txt", folder / "unavailable.jsonl"
    present = set(_whole_lines(archive))
    unavailable = {json.loads(line)["id"] for line in _whole_lines(gone)}
    counts = {"downloaded": 0, "present": 0, "unavailable": 0, "failed": 0}
    in_a_row = 0
    for segment in tqdm(segments, unit="clip", disable=not progress):
        name = clip_id(check_youtube_id(segment.youtube_id), segment.start)
        if name in present:
            counts["present"] += 1
            continue
        if name in unavailable:
            counts["unavailable"] += 1
            continue
        try:
            _with_retries(lambda: _fetch(segment, extract, folder / f"{name}.mp4"), attempts, sleep, wait)  # noqa: B023
        except Unavailable as error:
            _append(gone, json.dumps({"id": name, "reason": str(error)}, ensure_ascii=False))
            unavailable.add(name)
            counts["unavailable"] += 1
            in_a_row = 0
        except Exception as error:  # whatever the site, the network or the file did: the next run tries again
            tqdm.write(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            counts["failed"] += 1
            in_a_row += 1
            if in_a_row == BLOCKED:
                raise RuntimeError(
                    f"{BLOCKED} clips in a row failed, last {name}: {error}; try again later"
                ) from error
        else:
            _append(archive, name)
            present.add(name)
            counts["downloaded"] += 1
            in_a_row = 0
        wait(sleep * random.uniform(0.5, 1.5))
    return counts


def _with_retries(call: Callable[[], None], attempts: int, pause: float, wait: Callable[[float], None]) -> None:
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Unavailable:
            raise
        except Exception:
            if attempt == attempts:
                raise
            wait(pause * 2 ** (attempt - 1) * random.uniform(1, 1.5))


def _fetch(segment: Segment, extract: Callable[[str], Sequence[Media]], path: Path) -> None:
    media = extract(segment.youtube_id)
    with write_whole(path) as partial:
        copy_segment(media, segment.start, segment.end, partial)


def copy_segment(media: Sequence[Media], start: float, end: float, path: Path) -> None:
    """Copies the packets of a segment into an mp4 file, without decoding them.

    The video begins at the keyframe before `start`; an edit list makes the file begin at `start` all the same.

    Args:
        media: where the tracks lie; of each place the first video and the first audio track are taken, once.
        start: of the segment, in seconds.
        end: of the segment, in seconds.
        path: of the file.

    Raises:
        ValueError: if there is nothing in this segment.
        av.FFmpegError: if something cannot be read.
    """
    inputs = []
    try:
        for place in media:
            headers = "".join(f"{name}: {value}\r\n" for name, value in place.headers)
            options = NETWORK | ({"headers": headers} if headers else {})
            inputs.append(av.open(place.url, options=options, timeout=60))
        with av.open(str(path), "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as output:
            tracks: dict[Any, Any] = {}
            for container in inputs:
                for stream in container.streams.best("video"), container.streams.best("audio"):
                    if stream and stream.type not in {taken.type for taken in tracks}:
                        tracks[stream] = output.add_stream_from_template(stream)
            if not tracks:
                raise ValueError("no audio and no video track")
            for container in inputs:
                _copy_packets(
                    container, {s: t for s, t in tracks.items() if s.container is container}, output, start, end
                )
    finally:
        for container in inputs:
            container.close()


def _copy_packets(container: Any, tracks: dict[Any, Any], output: Any, start: float, end: float) -> None:
    if not tracks:
        return
    origin = Fraction(max(0, container.start_time or 0), av.time_base)
    container.seek(int((Fraction(start) + origin) * av.time_base))
    reached = dict.fromkeys(tracks, False)
    copied = dict.fromkeys(tracks, 0)
    for packet in container.demux(list(tracks)):
        if packet.dts is None or packet.pts is None:
            continue
        stream, length = packet.stream, packet.duration or 0
        shift = round((Fraction(start) + origin) / packet.time_base)
        limit = round((Fraction(end) + origin) / packet.time_base)
        if packet.dts >= limit:
            reached[stream] = True
            if all(reached.values()):
                break
        elif stream.type == "video" or packet.pts + length > shift - round(Fraction(1, 10) / packet.time_base):
            packet.pts -= shift  # what is left below zero is decoded but not shown
            packet.dts -= shift
            copied[stream] += packet.pts + length > 0
            packet.stream = tracks[stream]
            output.mux(packet)
    for stream, count in copied.items():
        if not count:
            raise ValueError(f"the {stream.type} track holds nothing between {start:g} and {end:g} s")


class YtDlp:
    """Finds with yt-dlp where a YouTube video lies.

    Args:
        height: largest height of the pictures, in pixels; training needs little.
        cookies: file of cookies, for videos that want an age confirmed.

    Raises:
        ImportError: if yt-dlp is not installed.
    """

    # What yt-dlp's messages say of videos that are gone; requests for a login may be about bots, and pass.
    GONE = (
        "video unavailable",
        "private video",
        "been removed",
        "no longer available",
        "is not available",
        "not made this video available",
        "account associated with this video has been terminated",
        "copyright",
        "members-only",
        "confirm your age",
        "violat",
    )

    def __init__(self, height: int = 360, cookies: Path | None = None):
        try:
            import yt_dlp
        except ImportError as error:
            raise ImportError("downloading needs yt-dlp: pip install 'dali-audio[download]'") from error
        self._error = yt_dlp.utils.DownloadError
        low = f"[height<={height}]"
        self._client = yt_dlp.YoutubeDL(
            {
                "format": f"b{low}[ext=mp4]/bv{low}[ext=mp4]+ba[ext=m4a]/b{low}/w",
                "quiet": True,
                "no_warnings": True,
                "noprogress": True,
                "noplaylist": True,
                "skip_download": True,
                "retries": 0,  # retries and pauses are ours
                "extractor_retries": 0,
                "cookiefile": None if cookies is None else str(cookies),
            }
        )

    def __call__(self, youtube_id: str) -> list[Media]:
        """Gives where the tracks of a video lie."""
        try:
            info = self._client.extract_info(f"https://www.youtube.com/watch?v={youtube_id}", download=False)
        except self._error as error:
            message = str(error).removeprefix("ERROR: ")
            if any(sign in message.lower() for sign in self.GONE):
                raise Unavailable(message) from error
            raise
        formats = info.get("requested_formats") or [info]
        return [Media(one["url"], tuple((one.get("http_headers") or {}).items())) for one in formats]


def read_segments(name: str, table: str | Path) -> list[Segment]:
    """Reads the segments that a data set's table names, each once.

    Args:
        name: "audioset", "audiocaps" or "vggsound".
        table: the official CSV.

    Raises:
        ValueError: for another name, or naming the first wrong line.
    """
    return list(dict.fromkeys(_segments(name, table)))


def _segments(name: str, table: str | Path) -> Iterator[Segment]:
    if name == "audioset":
        for line, fields in segment_lines(table):
            try:
                segment = parse_segment(fields)
            except ValueError as error:
                raise wrong(table, line, str(error)) from error
            yield Segment(segment.youtube_id, segment.start, segment.end, ())
    elif name == "audiocaps":
        for _, row in read_table(table, {"youtube_id": check_youtube_id, "start_time": parse_seconds}):
            yield Segment(row["youtube_id"], row["start_time"], row["start_time"] + 10, ())
    elif name == "vggsound":
        columns = {"youtube_id": check_youtube_id, "start": parse_seconds, "label": text, "split": text}
        for _, row in read_table(table, columns, header=False):
            yield Segment(row["youtube_id"], row["start"], row["start"] + 10, ())
    else:
        raise ValueError(f"{name!r} is none of audioset, audiocaps, vggsound")


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that were written to their end; what a kill left of the last one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode().split("\n")[:-1]  # a reason may hold what `splitlines` takes for a line's end


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser("datasets_scripts.download", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("audioset", "audiocaps", "vggsound"))
    parser.add_argument("table", type=Path, help="the official CSV file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--height", type=int, default=360, help="largest height of the pictures in pixels")
    parser.add_argument("--cookies", type=Path, help="file of cookies for yt-dlp")
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds between clips")
    parser.add_argument("--attempts", type=int, default=4, help="how often a clip is tried, with pauses that double")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return run_command(parser, _download, arguments)


def _download(options: argparse.Namespace) -> int:
    segments = read_segments(options.name, options.table)
    extract = YtDlp(options.height, options.cookies)
    counts = download(segments, options.output, extract, options.attempts, options.sleep, progress=not options.quiet)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
