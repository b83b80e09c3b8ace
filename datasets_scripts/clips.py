"""Which clips there are: requests for clips from a folder, a list of files, or an index CSV in AudioSet's format."""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets_scripts.decode import ClipError

VIDEO_EXTENSIONS = (
    ".mp4",
    ".webm",
    ".mkv",
    ".mov",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".3gp",
    ".wmv",
    ".ogv",
)
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".aac", ".wma")

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


@dataclass(frozen=True)
class ClipRequest:
    """One clip to be read.

    Attributes:
        id: unique in its source.
        path: of the file, below `root` unless it is absolute or a URL; None to look it up by `youtube_id`.
        root: folder of the files.
        start: in seconds.
        end: in seconds; None for the end of the file.
        allow_short: whether a file that ends before `end` will do.
        labels: as the index gives them.
        youtube_id: of an index line.
        error: what is wrong with an index line that cannot be read.
        follow_links: whether links may lead out of `root`.
    """

    id: str
    path: str | None
    root: str
    start: float = 0.0
    end: float | None = None
    allow_short: bool = True
    labels: tuple[str, ...] = ()
    youtube_id: str | None = None
    error: str | None = None
    follow_links: bool = False

    def locate(self) -> tuple[str, float, float | None]:
        """Finds the file.

        Returns:
            Its path, and start and end of the clip in it: a file that was cut already holds the clip from 0 on.

        Raises:
            ClipError: if there is none, or if it is not below `root`.
        """
        if self.error:
            raise ClipError("bad_index", self.error)
        if self.path is None:
            return self._look_up()
        if "://" in self.path:
            return self.path, self.start, self.end
        return self._inside(Path(self.root, self.path)), self.start, self.end

    def file_state(self) -> list[int] | None:
        """Size and time of the last change (ns) of the file, by which a changed one is known; None if there is none.

        What a URL names is taken to stay as it is.
        """
        try:
            path, _, _ = self.locate()
            status = Path(path).stat()
        except (ClipError, OSError):
            return None
        return [status.st_size, status.st_mtime_ns]

    def _look_up(self) -> tuple[str, float, float | None]:
        assert self.youtube_id is not None and self.end is not None
        found = find_media(self.root, self.youtube_id, self.start, self.end, VIDEO_EXTENSIONS + AUDIO_EXTENSIONS)
        if found is None:
            raise ClipError("missing", f"no {clip_id(self.youtube_id, self.start)}.* or {self.youtube_id}.*")
        path = self._inside(found)
        if found.stem == self.youtube_id:
            return path, self.start, self.end
        return path, 0.0, self.end - self.start

    def _inside(self, path: Path) -> str:
        """Refuses what leads out of the root: `..`, and links unless they may be followed."""
        if self.path is not None and Path(self.path).is_absolute():  # is meant as it is written
            return str(path)
        if not Path(os.path.normpath(path.absolute())).is_relative_to(Path(self.root).absolute()):
            raise ClipError("outside_source", str(self.path))
        try:
            target = path.resolve()
        except RuntimeError as error:
            raise ClipError("not_a_file", "a link that leads in a circle") from error
        if not self.follow_links and not target.is_relative_to(Path(self.root).resolve()):
            raise ClipError("outside_source", f"{path.name} links to {target}")
        return str(path)


def printable(text: str) -> str:
    """Replaces what is not Unicode in the name of a file."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def clip_id(youtube_id: str, start: float) -> str:
    """The name of a YouTube segment: id and start in seconds, as in `00W1lcxW-WU_40.000`."""
    return f"{youtube_id}_{start:.3f}"


def find_media(
    folder: str | Path, youtube_id: str, start: float, end: float | None, extensions: tuple[str, ...]
) -> Path | None:
    """Finds the file of a YouTube segment, under the names that are in use.

    Args:
        folder: where the files lie.
        youtube_id: of the video.
        start: of the segment, in seconds.
        end: of the segment, in seconds, if known.
        extensions: that may be, with their dots.

    Returns:
        `ID_40.000.*`, `ID_000040.*`, `ID_40.*`, `ID_40_50.*` or `ID_40000_50000.*` (cut), else `ID.*` (usually the
        whole video), or None.
    """
    names = [clip_id(youtube_id, start)]
    if start == int(start):
        names += [f"{youtube_id}_{int(start):06d}", f"{youtube_id}_{int(start)}"]
    if end is not None and start == int(start) and end == int(end):
        names += [f"{youtube_id}_{int(start)}_{int(end)}", f"{youtube_id}_{int(start) * 1000}_{int(end) * 1000}"]
    for name in [*names, youtube_id]:
        for extension in extensions:
            path = Path(folder, name + extension)
            if os.path.lexists(path):
                return path
    return None


@dataclass(frozen=True)
class Segment:
    """A line of an index in AudioSet's format: YouTube id, start and end in seconds, label ids."""

    youtube_id: str
    start: float
    end: float
    labels: tuple[str, ...]


def parse_segment(row: list[str]) -> Segment:
    """Reads one line of an index in AudioSet's format.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if len(row) != 4:
        raise ValueError(f"expected YTID, start_seconds, end_seconds, positive_labels; found {len(row)} fields: {row}")
    youtube_id = check_youtube_id(row[0].strip())
    labels = tuple(label.strip() for label in row[3].split(",") if label.strip())
    start, end = parse_seconds(row[1]), parse_seconds(row[2])
    if end <= start:
        raise ValueError(f"the segment ends at {end:g} s, not after its start at {start:g} s")
    return Segment(youtube_id, start, end, labels)


def parse_seconds(text: str) -> float:
    """Reads a time that is finite and not negative.

    Raises:
        ValueError: if it is not.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e7:
        raise ValueError(f"{text.strip()!r} is no time in seconds")
    return seconds


def check_youtube_id(text: str) -> str:
    """Returns a YouTube id as it is.

    Raises:
        ValueError: if it is none.
    """
    if not _YOUTUBE_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no YouTube id")
    return text


def segment_lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yields line number and fields of the lines of an index that are neither empty nor comments."""
    with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file, skipinitialspace=True)
        for row in reader:
            if row and not row[0].startswith("#"):
                yield reader.line_num, row


def from_folder(folder: str | Path, seconds: float | None = 10.0, follow_links: bool = False) -> Iterator[ClipRequest]:
    """Requests the first seconds of every video below a folder, in order of their paths.

    Args:
        folder: is searched with the folders in it. Files with no video's extension are left out.
        seconds: length of the clips; None takes the whole files.
        follow_links: whether links may lead out of the folder. Otherwise they are requested, and fail.
    """
    root = Path(folder)
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=follow_links):
        if follow_links:  # links may lead in circles
            if (place := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith("."):
                path = Path(parent, name).relative_to(root)
                name = printable(path.with_suffix("").as_posix())
                yield ClipRequest(name, path.as_posix(), str(root), end=seconds, follow_links=follow_links)


def from_list(file: str | Path, seconds: float | None = 10.0, follow_links: bool = False) -> Iterator[ClipRequest]:
    """Requests the first seconds of each file in a list.

    Args:
        file: text, one path or URL a line, relative to the folder of the list; empty lines and # comments are left
            out. Absolute paths and URLs are taken as they are, relative ones must stay below that folder.
        seconds: length of the clips; None takes the whole files.
        follow_links: whether links may lead out of the folder.
    """
    root = str(Path(file).parent)
    with Path(file).open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if (path := line.strip()) and not path.startswith("#"):
                name = printable(path.removesuffix(Path(path).suffix))
                yield ClipRequest(name, path, root, end=seconds, follow_links=follow_links)


def from_index(
    file: str | Path, videos: str | Path, allow_short: bool = False, follow_links: bool = False
) -> Iterator[ClipRequest]:
    """Requests the segments of an index CSV in AudioSet's format.

    Args:
        file: lines of `YTID, start_seconds, end_seconds, positive_labels`. A line that cannot be read becomes a
            request that fails.
        videos: folder of the files, whole or cut; `find_media` says under which names.
        allow_short: whether a video that ends before its segment will do.
        follow_links: whether links may lead out of the folder.
    """
    for number, row in segment_lines(file):
        try:
            segment = parse_segment(row)
        except ValueError as error:
            yield ClipRequest(f"line-{number}", None, str(videos), error=f"line {number}: {error}")
            continue
        yield ClipRequest(
            clip_id(segment.youtube_id, segment.start),
            None,
            str(videos),
            segment.start,
            segment.end,
            allow_short,
            segment.labels,
            segment.youtube_id,
            follow_links=follow_links,
        )
