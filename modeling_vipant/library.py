"""A searchable library of sounds: embeddings of a folder's files, found again by text, sound or picture.

On disk an index is a folder of three files: `index.json` names the model and the two data files beside it, an array of
embeddings (memory-mapped on loading) and a table of files. New data files are written first and `index.json` is
replaced last, so that an interrupted run leaves the index as it was.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F

from modeling_dali.audio_io import read_image
from modeling_vipant import VipAntModel, VipAntProcessor

SOUND_SUFFIXES = frozenset(
    ".aac .aif .aiff .avi .flac .m4a .mkv .mov .mp3 .mp4 .oga .ogg .opus .wav .webm .wma".split()
)
WINDOWS_AT_ONCE = 16
TABLE = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("seconds", pa.float64())])


class LibraryError(ValueError):
    """A sound library cannot be used, or not as asked; the message says what to do."""


@dataclass
class Embedder:
    """A VIP-ANT model with its processor; everything it gives is a unit vector on the CPU.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        name: Where both came from; kept in the index.
    """

    model: VipAntModel
    processor: VipAntProcessor
    name: str

    @classmethod
    def load(cls, name: str, device: str | None = None) -> "Embedder":
        """Loads a model's folder or Hub name, onto a GPU where there is one."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = VipAntModel.from_pretrained(name).eval().to(device)
        return cls(model, VipAntProcessor.from_pretrained(name), name)

    def fingerprint(self) -> str:
        """Changes with anything that changes the embedding of a sound: front end, audio tower, projection."""
        digest = hashlib.blake2b(digest_size=16)
        front_end = {
            name: value
            for name, value in self.processor.feature_extractor.to_dict().items()
            if name != "processor_class"
        }
        digest.update(json.dumps(front_end, sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.model.config.audio_config.to_diff_dict(), sort_keys=True, default=str).encode())
        for module in (self.model.audio_model, self.model.audio_projection):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def windows(self, path: Path) -> dict[str, torch.Tensor]:
        """A file's spectrograms, one for each stretch of the model's length.

        Args:
            path: A sound or video file.

        Returns:
            `input_features` `[windows, frames, bins]`, and `window_seconds` `[windows]`, which add up to the file's
            length.

        Raises:
            ValueError, OSError: If the file cannot be read.
        """
        extractor = self.processor.feature_extractor
        windows, seconds = extractor.split(extractor.read([path])[0])
        features = extractor(windows, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_features": features["input_features"], "window_seconds": torch.tensor(seconds)}

    @torch.inference_mode()
    def sounds(self, files: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Embeddings of several files, each the normalised mean over its windows, weighted by their duration.

        Args:
            files: What `windows` gave.

        Returns:
            `[files, dim]`.
        """
        parts = [
            self.model.get_audio_features(part.to(self.model.device)).pooler_output.float().cpu()
            for part in torch.cat([file["input_features"] for file in files]).split(WINDOWS_AT_ONCE)
        ]
        by_file = torch.cat(parts).split([len(file["window_seconds"]) for file in files])
        sums = [file["window_seconds"] @ part for file, part in zip(files, by_file, strict=True)]
        return F.normalize(torch.stack(sums), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """`[texts, dim]`."""
        inputs = self.processor(text=list(texts), return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**inputs).pooler_output.float().cpu()

    @torch.inference_mode()
    def image(self, path: Path) -> torch.Tensor:
        """`[1, dim]`; raises ValueError if the file is no picture."""
        inputs = self.processor(images=[read_image(path)], return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output.float().cpu()


@dataclass
class Hit:
    """One found file: its path relative to the library, cosine similarity to the query, and length in seconds."""

    path: str
    score: float
    seconds: float


@dataclass
class SoundLibrary:
    """An index in memory.

    Args:
        embeddings: `[files, dim]` unit vectors, float32.
        files: Path, size, mtime_ns and seconds of each file.
        model_name: Where the model came from.
        fingerprint: Fingerprint of the model (`Embedder.fingerprint`).
    """

    embeddings: np.ndarray
    files: pa.Table
    model_name: str
    fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> "SoundLibrary":
        """Opens an index; embeddings are mapped from disk, not read.

        Raises:
            LibraryError: If there is no index, or it is damaged.
        """
        try:
            header = json.loads((folder / "index.json").read_text())
            embeddings = np.load(folder / header["embeddings"], mmap_mode="c")  # "c": torch wants it writable
            files = pa.parquet.read_table(folder / header["files"], memory_map=True)
        except FileNotFoundError:
            raise LibraryError(f"there is no index in {folder}: make one with `vipant index`") from None
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise LibraryError(f"the index in {folder} is damaged ({error}): delete it and index again") from error
        if len(embeddings) != len(files):
            raise LibraryError(f"the index in {folder} is damaged (lengths differ): delete it and index again")
        return cls(embeddings, files, header["model"], header["fingerprint"])

    def save(self, folder: Path) -> None:
        """Replaces the index in `folder` as a whole; at any moment it is either the old or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        generation = uuid.uuid4().hex[:12]
        header = {
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "embeddings": f"embeddings-{generation}.npy",
            "files": f"files-{generation}.parquet",
        }
        with (folder / header["embeddings"]).open("wb") as file:
            np.save(file, self.embeddings)
            os.fsync(file.fileno())
        with (folder / header["files"]).open("wb") as file:
            pa.parquet.write_table(self.files, file)
            os.fsync(file.fileno())
        temporary = folder / f".index-{generation}.json"
        temporary.write_text(json.dumps(header, indent=2))
        temporary.replace(folder / "index.json")
        for path in [*folder.glob("embeddings-*.npy"), *folder.glob("files-*.parquet"), *folder.glob(".index-*.json")]:
            if path.name not in header.values():
                path.unlink(missing_ok=True)

    def search(self, query: torch.Tensor, top_k: int = 10) -> list[Hit]:
        """Files nearest to a query, by exact search.

        One matrix product over the mapped embeddings: as fast as memory is read, and nothing to build or keep in step.

        Args:
            query: `[dim]` unit vector.
            top_k: Number of files wanted.

        Returns:
            At most `top_k` hits, best first.
        """
        matrix = torch.from_numpy(np.asarray(self.embeddings))
        scores, rows = (matrix @ query).topk(min(top_k, len(matrix)))
        found = self.files.take(pa.array(rows.numpy())).to_pylist()
        return [Hit(row["path"], score, row["seconds"]) for row, score in zip(found, scores.tolist(), strict=True)]


@dataclass
class IndexReport:
    """What a run of `index_folder` did: numbers of files, and (path, reason) of those that could not be read."""

    added: int
    changed: int
    unchanged: int
    removed: int
    unreadable: list[tuple[str, str]]


class _Windows(torch.utils.data.Dataset):
    """Reads files in the data loader's processes; an unreadable file gives its reason in place of windows."""

    def __init__(self, root: Path, paths: Sequence[str], embedder: Embedder):
        self.root, self.paths = root, paths
        self.read = embedder.windows

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int):
        path = self.paths[index]
        stat = (self.root / path).stat() if (self.root / path).exists() else None
        try:
            return path, stat, self.read(self.root / path), None
        except (ValueError, OSError) as error:
            return path, stat, None, str(error)


def sound_files(root: Path) -> Iterator[str]:
    """Sound and video files below `root` by suffix, as sorted relative paths; hidden files and folders are skipped."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SOUND_SUFFIXES and not name.startswith("."):
                yield str((Path(folder) / name).relative_to(root))


def _read_index(index: Path, embedder: Embedder, fingerprint: str) -> dict[str, tuple[dict, np.ndarray]]:
    """Rows and embeddings of an index by path; raises LibraryError if another model made the index."""
    if not (index / "index.json").exists():
        return {}
    library = SoundLibrary.load(index)
    check_model(library, fingerprint, embedder.name, index)
    return {row["path"]: (row, library.embeddings[i]) for i, row in enumerate(library.files.to_pylist())}


def index_folder(
    root: Path,
    index: Path,
    embedder: Embedder,
    *,
    workers: int = 0,
    save_every: int = 20_000,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> IndexReport:
    """Brings the index of a folder up to date: only new and changed files (by size and time) are read.

    What is done is saved every `save_every` files and whenever the run is cut off; the next run goes on from there.

    Args:
        root: Folder with sounds.
        index: Folder of the index.
        embedder: Must be the model that the index was made with.
        workers: Processes that read files; 0 reads in this one.
        save_every: Files after which the index is saved.
        progress: Wraps the iteration over batches of files, given the number of files to read.

    Returns:
        What was done.

    Raises:
        LibraryError: If `root` has no sounds, none can be read, or the index was made by another model. The index on
            disk is then as it was before.
    """
    if not root.is_dir():
        raise LibraryError(f"{root} is no folder")
    present = {path: (root / path).stat() for path in sound_files(root)}
    if not present:
        raise LibraryError(f"{root} holds no sounds (looked for {' '.join(sorted(SOUND_SUFFIXES))})")
    fingerprint = embedder.fingerprint()
    old = _read_index(index, embedder, fingerprint)
    kept = {
        path: entry
        for path, entry in old.items()
        if path in present and (entry[0]["size"], entry[0]["mtime_ns"]) == _signature(present[path])
    }
    todo = [path for path in present if path not in kept]
    report = IndexReport(0, 0, len(kept), len([path for path in old if path not in present]), [])
    done = dict(kept)

    def save() -> None:
        rows = [done[path] for path in sorted(done)]
        table = pa.Table.from_pylist([row for row, _ in rows], schema=TABLE)
        SoundLibrary(np.stack([vector for _, vector in rows]), table, embedder.name, fingerprint).save(index)

    loader = torch.utils.data.DataLoader(
        _Windows(root, todo, embedder), batch_size=8, collate_fn=list, num_workers=workers
    )
    since_saved = 0
    try:
        for batch in progress(loader, len(todo)):
            readable = [item for item in batch if item[2] is not None]
            report.unreadable += [(path, reason) for path, _, windows, reason in batch if windows is None]
            if not readable:
                continue
            vectors = embedder.sounds([windows for _, _, windows, _ in readable]).numpy()
            for (path, stat, windows, _), vector in zip(readable, vectors, strict=True):
                size, mtime_ns = _signature(stat)
                seconds = windows["window_seconds"].sum().item()
                done[path] = ({"path": path, "size": size, "mtime_ns": mtime_ns, "seconds": seconds}, vector)
                report.changed += path in old
                report.added += path not in old
            since_saved += len(readable)
            if since_saved >= save_every:
                save()
                since_saved = 0
    except BaseException:  # whatever ends the run, what is done is kept
        if done:
            save()
        raise
    if not done:
        count, reason = len(report.unreadable), report.unreadable[0][1]
        raise LibraryError(f"none of the {count} sound files in {root} can be read; the first: {reason}")
    if report.added or report.changed or report.removed or not old:
        save()
    return report


def check_model(library: SoundLibrary, fingerprint: str, name: str, index: Path) -> None:
    """Refuses an index whose embeddings another model made than the one of this fingerprint and name.

    Raises:
        LibraryError: If the fingerprints differ.
    """
    if library.fingerprint != fingerprint:
        raise LibraryError(
            f"the index in {index} was made by another model ({library.model_name}) than {name}: its "
            "embeddings cannot be compared. Use that model, or another --index."
        )


def _signature(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def check_labels(labels: Sequence[str]) -> list[str]:
    """Label names as they are put into prompts: "_" becomes a space.

    Raises:
        LibraryError: If a label is empty or occurs twice, or there are fewer than two.
    """
    names = [" ".join(label.replace("_", " ").split()) for label in labels]
    if any(not name for name in names):
        raise LibraryError(f"a label is empty in {', '.join(map(repr, labels))}")
    folded = [name.casefold() for name in names]
    if twice := sorted({name for name, fold in zip(names, folded, strict=True) if folded.count(fold) > 1}):
        raise LibraryError(f"labels occur twice: {', '.join(twice)}")
    if len(names) < 2:
        raise LibraryError(f"{len(names)} label given: classification chooses among at least two")
    return names


def classify(
    embedder: Embedder, paths: Sequence[Path], labels: Sequence[str], prompt: str = "the sound of {}"
) -> list[list[tuple[str, float]]]:
    """Zero-shot classification of sounds.

    Args:
        embedder: The model.
        paths: Sound files.
        labels: At least two different names.
        prompt: Sentence with `{}` for the name.

    Returns:
        For each file the labels and their probabilities, best first.

    Raises:
        LibraryError: For bad labels, or a prompt without `{}`.
        ValueError, OSError: If a file cannot be read.
    """
    names = check_labels(labels)
    if "{}" not in prompt:
        raise LibraryError(f"the prompt {prompt!r} has no {{}} for the label")
    texts = embedder.texts([prompt.replace("{}", name) for name in names])
    sounds = embedder.sounds([embedder.windows(path) for path in paths])
    scale = embedder.model.audio_text_logit_scale.detach().float().exp().cpu()
    probabilities = (scale * sounds @ texts.T).softmax(-1).tolist()
    return [sorted(zip(names, row, strict=True), key=lambda pair: -pair[1]) for row in probabilities]
