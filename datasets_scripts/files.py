"""How files are written: whole or not at all, under settings that must match, in a folder that one run holds.

- `write_whole` lets a file appear under its name only when it is complete,
- `claim` notes the settings that decide what a folder holds, and refuses a run with others,
- `locked` keeps a second run out of a folder,
- `Folder` does the same on any path that fsspec knows, such as an object store,
- `json_lines` reads a file of JSON lines and names the line that is wrong.

What an interrupted write leaves behind has a name of this package (`.NAME.PID.dali-partial`), and `sweep` removes
such files only.
"""

import fcntl
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

_PARTIAL = "dali-partial"
_LOCK = ".dali-lock"


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it to `path` when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`):
            The file. Its folder is made if there is none; a file that is there is replaced.

    Yields:
        `Path`: where to write, with the same suffix as `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.{_PARTIAL}{path.suffix}")
    partial.unlink(missing_ok=True)  # a link of this name would lead what is written elsewhere
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before what was written
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike) -> None:
    """Removes what interrupted calls of `write_whole` left in a folder and in the folders directly below it.

    Args:
        folder (`str` or `os.PathLike`):
            Must be held by the caller (see `locked`): another run's unfinished files go, too.
    """
    for pattern in (f".*.{_PARTIAL}*", f"*/.*.{_PARTIAL}*"):
        for leftover in Path(folder).glob(pattern):
            leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a folder for one run; the kernel lets go of it when the process ends, however it ends.

    Args:
        folder (`str` or `os.PathLike`):
            A local folder, made if there is none.

    Raises:
        RuntimeError: if another process holds the folder; says which one.
    """
    path = Path(folder, _LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "unknown"
            file.close()
            raise RuntimeError(
                f"{folder} is in use by another run ({holder}): wait for its end, or choose another output folder"
            ) from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # the former holder removed the file after it was opened here
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def claim(folder: "str | os.PathLike | Folder", settings: dict[str, Any], name: str = "settings.json") -> None:
    """Notes what decides a folder's content, or compares it with what an earlier run noted.

    Args:
        folder (`str`, `os.PathLike` or `Folder`):
            Local path or URL.
        settings (`dict`):
            Values that JSON can hold, by names that the user knows.
        name (`str`, *optional*, defaults to `"settings.json"`):
            Name of the note.

    Raises:
        ValueError: if a setting differs; names each with both its values.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
    if not folder.exists(name):
        folder.write_json(name, settings)
        return
    try:
        found = json.loads(folder.read(name))
    except ValueError as error:
        raise ValueError(f"{folder.path}/{name} is damaged ({error}): choose another output folder") from error
    changes = [
        f"{key} was {_short(found.get(key))}, is {_short(settings.get(key))}"
        for key in sorted(settings.keys() | found.keys())
        if settings.get(key) != found.get(key)
    ]
    if changes:
        raise ValueError(
            f"{folder.path} holds what was made with other settings ({'; '.join(changes)}): "
            "choose another output folder, or remove this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Folder:
    """A folder on any fsspec path, with whole-file writes.

    Args:
        path (`str` or `os.PathLike`):
            Local path or URL, such as `s3://bucket/audioset`.

    Attributes:
        path (`str`): the absolute path, or the URL.
        local (`bool`): whether it is on a local disk.
    """

    def __init__(self, path: str | os.PathLike):
        self.filesystem, self.root = fsspec.core.url_to_fs(os.fspath(path).rstrip("/"))
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self.path = self.root if self.local else os.fspath(path).rstrip("/")

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.filesystem.exists(self._full(name))

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """The sorted names, with their folder, of the files in one of the folders here."""
        if not self.filesystem.isdir(self._full(folder)):
            return []
        self.filesystem.invalidate_cache()
        found = (path.rsplit("/", 1)[1] for path in self.filesystem.ls(self._full(folder), detail=False))
        return sorted(f"{folder}/{name}" for name in found if name.endswith(suffix) and not name.startswith("."))

    def open(self, name: str) -> Any:
        """Opens a file for reading bytes."""
        return self.filesystem.open(self._full(name), "rb")

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        with self.open(name) as file:
            return file.read()

    def size(self, name: str) -> int:
        """The number of bytes of a file."""
        return self.filesystem.size(self._full(name))

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        if self.exists(name):
            self.filesystem.rm(self._full(name))

    @contextmanager
    def writing(self, name: str) -> Iterator["HashingFile"]:
        """Opens a file that appears under its name only when the block ends without an error.

        Object stores do so by themselves; on a local disk see `write_whole`.
        """
        if self.local:
            with write_whole(self._full(name)) as path, path.open("wb") as file:
                yield HashingFile(file)
        else:
            self.filesystem.makedirs(self._full(name).rsplit("/", 1)[0], exist_ok=True)
            with self.filesystem.open(self._full(name), "wb") as file:
                yield HashingFile(file)

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file."""
        with self.writing(name) as file:
            file.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON, the same bytes for the same value."""
        self.write(name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    def held(self) -> AbstractContextManager[None]:
        """Keeps other runs out of a local folder (see `locked`); object stores have no locks."""
        return locked(self.root) if self.local else nullcontext()

    def sweep(self) -> None:
        """Removes what interrupted writes left on a local disk (see `sweep`)."""
        if self.local:
            sweep(self.root)


class HashingFile(io.RawIOBase):
    """A file that counts and sums up what is written to it.

    Args:
        file: A file open for writing bytes; whoever opened it closes it.
    """

    def __init__(self, file: Any):
        self._file = file
        self._sum = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self._sum.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Number of bytes written."""
        return self.size

    def digest(self) -> str:
        """SHA-256 of all that was written."""
        return self._sum.hexdigest()


def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Reads a file of JSON lines, whose texts may hold any character but a line feed.

    Args:
        path (`str` or `os.PathLike`):
            The file; empty lines are left out.

    Yields:
        `tuple[int, Any]`: number of the line, from 1, and its value.

    Raises:
        ValueError: naming the first line that is not JSON.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: is not JSON: {error}") from error
                yield number, value
