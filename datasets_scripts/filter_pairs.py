"""Keeps the clips whose picture goes with their sound.

    python -m datasets_scripts.filter_pairs prepared/ --output filtered/ --keep 500000 \
        --captioner Salesforce/blip2-opt-2.7b --embedder all-MiniLM-L6-v2 --labels class_labels_indices.csv
    python -m datasets_scripts.filter_pairs prepared/ --output filtered/ --keep 500000 --score my_module:distance

Each clip gets a score, smaller for a better match, and the K clips with the smallest ones are kept, with their scores
as a column. The paper's rule (appendix C) is the first form: captions of the frames, their distance to the names of
the clip's labels, mean over the frames. The second form takes any function of rows, such as the distance of a model's
audio tokens from its image tokens, which needs no labels. A run that was stopped goes on where it was.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from datasets_scripts.builders.audioset import label_names
from datasets_scripts.commands import run_command
from datasets_scripts.files import Folder, claim
from datasets_scripts.shards import commit_shard, finish, read_manifest, shard_name
from datasets_scripts.workers import Engine, run_tasks

Rows = list[dict[str, Any]]
Score = Callable[[Rows], Sequence[float]]


def filter_pairs(
    source: str | os.PathLike,
    output: str | os.PathLike,
    score: Score,
    keep: int,
    name: str,
    batch_size: int = 16,
    engine: Engine = "local",
    workers: int = 1,
    gpus: float = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores all clips and writes the best ones to new shards.

    Args:
        source: folder of parquet shards, local or a URL.
        output: folder for the new ones. With another `keep` than before its scores are used again.
        score: takes rows (columns by name, sounds and pictures as `{"bytes", "path"}`), gives a number for each,
            smaller for a better match. Must be pickled for several workers; an object may load its model when it is
            first called.
        keep: number of clips.
        name: of the rule, by which a later run knows whether its scores are the same.
        batch_size: rows that `score` gets at a time.
        engine: "local" or "ray"; a task is a shard.
        workers: processes or Ray actors; 1 stays in this process.
        gpus: GPUs for each Ray actor.
        progress: shows bars with rate and time left.

    Returns:
        The manifest of the new shards.

    Raises:
        ValueError: if `keep` is not positive, a score is not a number, or the output was begun from another source
            or with another rule.
        RuntimeError: if another run is writing to the output folder.
        FileNotFoundError: if the source holds no parquet shards.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    manifest = read_manifest(source)
    digest = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    folder = Folder(output)
    with folder.held():
        _begin(folder, {"source": digest, "score": name}, keep)
        folder.sweep()
        files = [file["name"] for file in manifest["files"]]
        tasks = [file for file in files if not folder.exists(_score_file(file))]
        scorer = _Scorer(Folder(source).path, folder.path, score, batch_size)
        with tqdm(
            total=len(files), initial=len(files) - len(tasks), unit="shard", desc="score", disable=not progress
        ) as bar:
            for _ in run_tasks(scorer, tasks, engine, workers, gpus):
                bar.update()
        chosen = _smallest_scores(folder, files, keep)
        kept = [(i, file, chosen[chosen[:, 0] == i, 1]) for i, file in enumerate(files)]
        kept = [task for task in kept if not folder.exists(_report_file(task[0]))]
        writer = _Writer(Folder(source).path, folder.path)
        with tqdm(
            total=len(files), initial=len(files) - len(kept), unit="shard", desc="write", disable=not progress
        ) as bar:
            for _ in run_tasks(writer, kept, engine, workers):
                bar.update()
        return finish(folder, {**manifest["plan"], "filter": {"score": name, "keep": keep, "of": manifest["rows"]}})


def _smallest_scores(folder: Folder, files: list[str], keep: int) -> np.ndarray:
    """Positions (file, row) of the clips to keep [clips, 2]."""
    best = TopK(keep)
    for number, file in enumerate(files):
        with folder.open(_score_file(file)) as handle:
            scores = pq.read_table(handle, columns=["score"])["score"].to_numpy()
        best.add(scores, np.stack([np.full(len(scores), number), np.arange(len(scores))], axis=1))
    return best.positions()


class TopK:
    """The K smallest of any number of scores, in memory for 2K of them; of equal ones the first to come.

    Args:
        k: how many.
    """

    def __init__(self, k: int):
        self.k = k
        self._scores = np.zeros(0)
        self._positions = np.zeros((0, 2), np.int64)

    def add(self, scores: np.ndarray, positions: np.ndarray) -> None:
        """Takes more scores [n] with their positions (shard, row) [n, 2], which must not come before earlier ones."""
        self._scores = np.concatenate([self._scores, scores])
        self._positions = np.concatenate([self._positions, positions])
        if len(self._scores) > 2 * self.k:
            self._cut()

    def positions(self) -> np.ndarray:
        """Positions of the smallest ones, in order of position [<= k, 2]."""
        self._cut()
        return self._positions

    def _cut(self) -> None:
        best = np.sort(np.argsort(self._scores, kind="stable")[: self.k])
        self._scores, self._positions = self._scores[best], self._positions[best]


class _Scorer:
    """Scores one shard; the task that workers get."""

    def __init__(self, source: str, output: str, score: Score, batch_size: int):
        self.source, self.output, self.score, self.batch_size = source, output, score, batch_size

    def __call__(self, file: str) -> None:
        ids: list[str] = []
        scores: list[float] = []
        for rows in _batches(Folder(self.source), file, self.batch_size):
            values = np.asarray(self.score(rows), dtype=np.float64)
            if values.shape != (len(rows),):
                raise ValueError(f"the score of {len(rows)} rows must be as many numbers, got shape {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(
                    f"the score of clip {rows[int(np.argmin(np.isfinite(values)))]['id']!r} is not finite"
                )
            ids += [row["id"] for row in rows]
            scores += values.tolist()
        with Folder(self.output).writing(_score_file(file)) as target:
            pq.write_table(pa.table({"id": ids, "score": scores}), pa.PythonFile(target, mode="w"))


class _Writer:
    """Writes the chosen rows of one shard, with their scores; the task that workers get."""

    def __init__(self, source: str, output: str):
        self.source, self.output = source, output

    def __call__(self, task: tuple[int, str, np.ndarray]) -> None:
        index, file, chosen = task
        source, folder = Folder(self.source), Folder(self.output)
        with folder.open(_score_file(file)) as handle:
            scores = pq.read_table(handle)["score"].to_pylist()
        with source.open(file) as handle:
            features = datasets.Features.from_arrow_schema(pq.read_schema(handle))

        def rows() -> Iterator[dict[str, Any]]:
            wanted = set(chosen.tolist())
            numbered = enumerate(row for batch in _batches(source, file, 32) for row in batch)
            yield from ({**row, "score": scores[number]} for number, row in numbered if number in wanted)

        commit_shard(
            folder, index, rows(), features=datasets.Features({**features, "score": datasets.Value("float64")})
        )


def _batches(folder: Folder, file: str, size: int) -> Iterator[Rows]:
    with folder.open(file) as handle:
        for batch in pq.ParquetFile(handle).iter_batches(size):
            yield batch.to_pylist()


def _score_file(file: str) -> str:
    return f"scores/{Path(file).name}"


def _report_file(index: int) -> str:
    return f"reports/{shard_name(index)}.json"


def _begin(folder: Folder, settings: dict[str, Any], keep: int) -> None:
    """Compares the settings with those of an earlier run; with another `keep` only the shards are made anew."""
    claim(folder, settings, "plan.json")
    if folder.exists("keep.json"):
        if json.loads(folder.read("keep.json")) == keep:
            return
        folder.remove("manifest.json")
        for name in folder.names("reports") + folder.names("shards"):
            folder.remove(name)
    folder.write_json("keep.json", keep)


class CaptionDistance:
    """The paper's rule: how far captions of a clip's frames are from the names of its labels.

    Args:
        caption: takes pictures, gives a caption for each.
        embed: takes texts, gives vectors [texts, width].
        names: of labels by their ids; None where the `labels` column holds names.
    """

    def __init__(
        self,
        caption: Callable[[list[Image.Image]], list[str]],
        embed: Callable[[list[str]], np.ndarray],
        names: dict[str, str] | None = None,
    ):
        self.caption, self.embed, self.names = caption, embed, names

    def __call__(self, rows: Rows) -> list[float]:
        """Gives the cosine distance between caption and label names, mean over the frames, for each row."""
        if bare := [row["id"] for row in rows if not row["frames"]]:
            raise ValueError(f"clip {bare[0]!r} has no frame")
        pictures = [Image.open(io.BytesIO(frame["bytes"])) for row in rows for frame in row["frames"]]
        vectors = _unit(self.embed(self.caption(pictures)))
        targets = _unit(self.embed([self._names(row) for row in rows]))
        clips = np.split(vectors, np.cumsum([len(row["frames"]) for row in rows])[:-1])  # [frames, width] each
        return [float((1 - frames @ target).mean()) for frames, target in zip(clips, targets, strict=True)]

    def _names(self, row: dict[str, Any]) -> str:
        if not row["labels"]:
            raise ValueError(f"clip {row['id']!r} has no label: this rule needs them")
        if self.names is None:
            return ", ".join(row["labels"])
        if unknown := [label for label in row["labels"] if label not in self.names]:
            raise ValueError(f"clip {row['id']!r} has the label {unknown[0]!r}, which has no name")
        return ", ".join(self.names[label] for label in row["labels"])


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Captioner:
    """Any image captioner of transformers, loaded when it is first called.

    Args:
        model: name or folder of a model that `AutoModelForImageTextToText` loads.
        max_new_tokens: of a caption.
    """

    def __init__(self, model: str, max_new_tokens: int = 30):
        self.model, self.max_new_tokens = model, max_new_tokens
        self._loaded: Any = None

    def __call__(self, pictures: list[Image.Image]) -> list[str]:
        """Gives a caption for each picture."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if self._loaded is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForImageTextToText.from_pretrained(self.model, dtype="auto").to(device).eval()
            self._loaded = AutoProcessor.from_pretrained(self.model), model
        processor, model = self._loaded
        inputs = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        with torch.inference_mode():
            inputs = inputs.to(model.device, model.dtype)
            output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]


class Embedder:
    """A model of sentence-transformers, loaded when it is first called.

    Args:
        model: name or folder.
    """

    def __init__(self, model: str):
        self.model = model
        self._loaded: Any = None

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Gives vectors [texts, width]."""
        if self._loaded is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(
                    "--embedder needs sentence-transformers: pip install sentence-transformers"
                ) from error
            self._loaded = SentenceTransformer(self.model)
        return self._loaded.encode(texts, show_progress_bar=False)


def _imported(path: str) -> Score:
    module, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--score must be MODULE:FUNCTION, {path!r} does not import: {error}") from error


class _Column:
    def __init__(self, name: str):
        self.name = name

    def __call__(self, rows: Rows) -> list[float]:
        if self.name not in rows[0]:
            raise ValueError(f"there is no column {self.name!r}, only {', '.join(rows[0])}")
        return [row[self.name] for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser("datasets_scripts.filter_pairs", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of parquet shards, local or a URL")
    parser.add_argument("--output", required=True, help="folder for the new shards")
    parser.add_argument("--keep", type=int, required=True, help="number of clips to keep")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--captioner", help="image captioner (name or folder): the paper's rule, with --embedder")
    rule.add_argument("--score", help="MODULE:FUNCTION of rows, smaller for a better match")
    rule.add_argument("--column", help="column that holds scores already")
    parser.add_argument(
        "--embedder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="model of sentence-transformers for --captioner",
    )
    parser.add_argument("--labels", type=Path, help="class_labels_indices.csv or ontology.json, for label ids")
    parser.add_argument("--batch-size", type=int, default=16, help="clips that are scored at once")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each Ray actor")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return run_command(parser, _filter, arguments)


def _filter(options: argparse.Namespace) -> int:
    score: Score
    if options.captioner:
        names = label_names(options.labels) if options.labels else None
        score = CaptionDistance(Captioner(options.captioner), Embedder(options.embedder), names)
        name = f"captions by {options.captioner}, embedded by {options.embedder}"
    elif options.score:
        score, name = _imported(options.score), options.score
    else:
        score, name = _Column(options.column), f"column {options.column}"
    manifest = filter_pairs(
        options.source,
        options.output,
        score,
        options.keep,
        name,
        options.batch_size,
        options.engine,
        options.workers,
        options.gpus,
        not options.quiet,
    )
    print(f"kept {manifest['rows']} of {manifest['plan']['filter']['of']} clips: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
