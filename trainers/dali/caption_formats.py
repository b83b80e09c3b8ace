"""Captions of windows of sound, as text, JSON lines, CSV, subtitles (SRT, WebVTT) or a page with players."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from datasets_scripts.clips import VIDEO_EXTENSIONS
from datasets_scripts.files import write_whole

FORMATS = ("text", "jsonl", "csv", "srt", "vtt", "html")
SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".srt": "srt", ".vtt": "vtt", ".html": "html"}
PER_FILE = ("srt", "vtt")  # subtitles belong to one sound or video


@dataclass(frozen=True)
class Line:
    """
    What is said of a stretch of a file, or why the file could not be captioned.

    Attributes:
        file (`str`): Path or URL, as it was given.
        start (`float`): Where the window begins, in seconds of the file.
        end (`float`): Where it ends.
        caption (`str`): What is heard.
        error (`str`): In place of a caption, the reason why there is none.
    """

    file: str
    start: float = 0.0
    end: float = 0.0
    caption: str = ""
    error: str = ""


def chosen_format(output: str | None, given: str | None) -> str:
    """
    The format of an output.

    Args:
        output (`str`, *optional*): File or folder that is written; None for the terminal.
        given (`str`, *optional*): What the user chose; by default the suffix of `output` says it.

    Raises:
        ValueError: if neither says it.
    """
    if given is not None:
        if given not in FORMATS:
            raise ValueError(f"there is no format {given!r}: choose one of {', '.join(FORMATS)}")
        return given
    if output is None:
        return "text"
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{output}: choose a name that ends in one of {', '.join(SUFFIXES)}, or give --format")
    return SUFFIXES[suffix]


def as_text(line: Line) -> str:
    """One line for the terminal."""
    return f"{line.file}  {line.start:7.2f} s  {line.caption}" if not line.error else f"{line.file}  {line.error}"


def as_json(line: Line) -> str:
    """One JSON object: `file` with `start`, `end`, `caption`, or with `error`."""
    if line.error:
        return json.dumps({"file": line.file, "error": line.error}, ensure_ascii=False)
    times = {"start": round(line.start, 3), "end": round(line.end, 3)}
    return json.dumps({"file": line.file, **times, "caption": line.caption}, ensure_ascii=False)


def as_csv(lines: Iterable[Line]) -> str:
    """A table with the columns `file`, `start`, `end`, `caption`, `error`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "start", "end", "caption", "error"])
    for line in lines:
        writer.writerow([line.file, f"{line.start:.3f}", f"{line.end:.3f}", line.caption, line.error])
    return text.getvalue()


def clock(seconds: float, comma: str = ".") -> str:
    """Hours, minutes, seconds and milliseconds as subtitles write them: `00:01:02.500`."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{comma}{rest % 1000:03d}"


def as_subtitles(lines: Iterable[Line], kind: str) -> str:
    """
    Subtitles of one file.

    Args:
        lines (`Iterable[Line]`): Its windows, in order.
        kind (`str`): `"srt"` or `"vtt"`.
    """
    comma = "," if kind == "srt" else "."
    cues = [
        f"{number}\n{clock(line.start, comma)} --> {clock(line.end, comma)}\n{cue_text(line.caption)}\n"
        for number, line in enumerate((line for line in lines if not line.error), 1)
    ]
    return ("" if kind == "srt" else "WEBVTT\n\n") + "\n".join(cues)


def cue_text(caption: str) -> str:
    """A caption as the text of a cue: one line, without what would be markup or the end of the cue."""
    return " ".join(caption.split()).replace("&", "&amp;").replace("<", "&lt;").replace("-->", "→").strip()


def distinct_names(files: Sequence[str]) -> dict[str, str]:
    """
    A short name for each file, no two alike: its stem, with as many of its folders in front as are needed.

    Args:
        files (`Sequence[str]`): Paths or URLs; the same one twice has one name.
    """
    parts = {file: [part for part in Path(file).with_suffix("").parts if part not in ("/", "..")] for file in files}
    names: dict[str, str] = {}
    for file, own in parts.items():
        others = [other for name, other in parts.items() if name != file]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        name = "_".join(own[-count:])
        while name in names.values():
            name += "_"  # the same path but for its suffix
        names[file] = name
    return names


def as_page(lines: Sequence[Line], title: str, folder: Path) -> str:
    """
    A page with a player for each file and its captions on a timeline; a click on a caption plays it.

    Args:
        lines (`Sequence[Line]`): Windows of all files.
        title (`str`): Title of the page.
        folder (`Path`): Where the page will lie; media are linked relative to it.
    """
    files = []
    for name in dict.fromkeys(line.file for line in lines):
        own = [line for line in lines if line.file == name]
        video = Path(name).suffix.lower() in VIDEO_EXTENSIONS
        files.append({"name": name, "source": media_source(name, folder), "lines": own, "video": video})
    loader = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    loader.filters["clock"] = lambda seconds: clock(seconds).removeprefix("00:")[:-2]
    return loader.get_template("captions.html").render(title=title, files=files)


def media_source(file: str, folder: Path) -> str:
    """The address of a file on a page in a folder."""
    if "://" in file:
        return file
    return quote(os.path.relpath(Path(file).resolve(), folder.resolve()))


def write_captions(lines: Sequence[Line], output: str, kind: str) -> list[Path]:
    """
    Writes captions into a file, or subtitles of several files into a folder.

    Args:
        lines (`Sequence[Line]`): Windows of all files, in order.
        output (`str`): The file; for subtitles of more than one sound, the folder.
        kind (`str`): One of [`FORMATS`].

    Returns:
        `list[Path]`: what was written.

    Raises:
        ValueError: if subtitles of several sounds are to go into one file.
    """
    target, files = Path(output), list(dict.fromkeys(line.file for line in lines))
    if kind in PER_FILE and target.suffix.lower() not in SUFFIXES:
        names = distinct_names(files)
        contents = {
            target / f"{names[file]}.{kind}": as_subtitles((line for line in lines if line.file == file), kind)
            for file in files
        }
    elif kind in PER_FILE:
        if len(files) > 1:
            raise ValueError(f"{output}: subtitles of {len(files)} files do not fit in one; name a folder instead")
        contents = {target: as_subtitles(lines, kind)}
    elif kind == "html":
        contents = {target: as_page(lines, "What is heard", target.parent)}
    elif kind == "csv":
        contents = {target: as_csv(lines)}
    else:
        one = as_text if kind == "text" else as_json
        contents = {target: "".join(f"{one(line)}\n" for line in lines)}
    for path, text in contents.items():
        with write_whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(contents)
