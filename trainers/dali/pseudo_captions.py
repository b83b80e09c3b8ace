"""Stage 2, first half: the aligned model captions videos from image and sound; no person writes a word.

    python -m trainers.dali.pseudo_captions recipes/dali/pseudo_captions.yaml [--field value ...]

Rows are cut into shards of equal size. A shard is captioned by one process, written beside its name and then renamed:
what stands under a shard's name is whole. A run that was killed goes on with the shards that are missing. Sampling is
seeded by shard, so captions do not depend on how often the run was interrupted, nor on the number of processes. Shards
are shared out by accelerate, or with `--engine ray` among the workers of a Ray cluster.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on distillation; decoding as in the released code.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers.utils import logging

from datasets_scripts.workers import run_tasks
from modeling_dali import DaliForConditionalGeneration, DaliProcessor
from modeling_dali.configuration_dali import PrefixPosition
from modeling_dali.processing_audio import MODALITIES, QUESTION
from trainers.dali.data_collator import CaptionSample, DaliDataCollator
from trainers.recipes import load_model, load_rows, parse_recipe
from trainers.rows import require_columns, sample_id, without_decoding

logger = logging.get_logger(__name__)

FORMATS = ("jsonl", "parquet")
ENGINES = ("local", "ray")
ANYWHERE = ("output_dir", "max_skipped", "engine", "workers", "gpus_per_worker")  # settings that change no caption


@dataclass
class PseudoCaptionConfig:
    """
    Settings of pseudo-captioning.

    Args:
        model: Folder or Hub id of an aligned DALI model.
        prefix: Folder or Hub id of a prefix adapter (stage 1a); by default the model's own.
        prefix_position: Where the prefix stands: `"after_media"` or `"front"`; the model's choice by default.
        dtype: Of the weights.
        dataset: Data set with `audio` and `frames` or `image` (see [`load_rows`]).
        split: Its split.
        streaming: Whether to read rows as they come.
        max_skipped: Tolerated share of clips that cannot be decoded.
        modality: What the model is shown: `"audio_image"`, `"audio"` or `"image"`.
        question: What it is asked.
        output_dir: Folder of the shards.
        shard_size: Clips per shard.
        file_format: `"jsonl"` or `"parquet"`.
        batch_size: Clips that are captioned at once.
        temperature: Of sampling; 0 takes the most likely word.
        max_new_tokens: Longest caption.
        seed: Of sampling.
        engine: `"local"` for this process and those that accelerate started, or `"ray"`.
        workers: Ray workers, each with a model of its own.
        gpus_per_worker: GPUs that each Ray worker asks for.
    """

    # Model
    model: str = ""
    prefix: str | None = None
    prefix_position: PrefixPosition | None = None
    dtype: str = "float32"

    # Data
    dataset: str = ""
    split: str = "train"
    streaming: bool = False
    max_skipped: float = 0.01

    # Output
    output_dir: str = "pseudo_captions"
    shard_size: int = 1000
    file_format: str = "jsonl"

    # Generation
    modality: str = "audio_image"
    question: str = QUESTION
    batch_size: int = 32
    temperature: float = 0.2
    max_new_tokens: int = 64
    seed: int = 42

    # Where it runs
    engine: str = "local"
    workers: int = 1
    gpus_per_worker: float = 0

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` is one of {', '.join(ENGINES)}, not {self.engine!r}.")
        if self.modality not in MODALITIES:
            raise ValueError(f"`modality` is one of {', '.join(MODALITIES)}, not {self.modality!r}.")
        if self.file_format not in FORMATS:
            raise ValueError(f"`file_format` is one of {', '.join(FORMATS)}, not {self.file_format!r}.")
        if self.shard_size < 1 or self.batch_size < 1:
            raise ValueError("`shard_size` and `batch_size` are at least 1.")


@torch.no_grad()
def write_pseudo_captions(
    model: DaliForConditionalGeneration, processor: DaliProcessor, rows, config: PseudoCaptionConfig
) -> dict[str, int]:
    """
    Captions all rows of a data set.

    Args:
        model: An aligned model, with a prefix or without.
        processor: The model's processor.
        rows: Data set or stream with `audio` and `frames` or `image`.
        config: Settings; `output_dir` gets `captions-00000.jsonl` ... (`id`, `caption`), and for each shard the ids
            of clips that could not be decoded, `skipped-00000.json`.

    Returns:
        `captions` and `skipped`, of all shards and processes.

    Raises:
        ValueError: if the data set is empty or lacks a column, or the folder holds captions of another run.
        TooManySkippedError: see `max_skipped`.
    """
    accelerator = Accelerator()
    collator = new_collator(processor, config)
    require_columns(rows, collator.columns, "pseudo-captioning")
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        check_settings(folder, collator.prompt, config)
    accelerator.wait_for_everyone()

    model = model.eval().to(accelerator.device)
    shards = islice(
        enumerate(_shards(rows, config.shard_size)), accelerator.process_index, None, accelerator.num_processes
    )
    total = -(-len(rows) // config.shard_size // accelerator.num_processes) if hasattr(rows, "__len__") else None
    for number, shard in tqdm(shards, total=total, desc="shards", disable=not accelerator.is_main_process):
        write_shard(model, processor, collator, number, shard, config)
    accelerator.wait_for_everyone()
    return count_captions(folder, config.file_format, tell=accelerator.is_main_process)


def write_on_ray(config: PseudoCaptionConfig) -> dict[str, int]:
    """
    Captions all rows of a data set on the Ray cluster that this process is connected to, or a new local one.

    Args:
        config: Settings; model, data set and `output_dir` must be where all machines can read them.

    Returns:
        As [`write_pseudo_captions`], with the same files.

    Raises:
        ValueError: as `write_pseudo_captions`, and for a stream, whose shards cannot be opened by number.
        ImportError: if Ray is not installed.
    """
    rows = load_rows(config.dataset, config.split, config.streaming)
    if not hasattr(rows, "__len__"):
        raise ValueError("`engine: ray` needs a data set with a length, not a stream.")
    model, processor = open_model(config)
    collator = new_collator(processor, config)
    require_columns(rows, collator.columns, "pseudo-captioning")
    check_settings(Path(config.output_dir), collator.prompt, config)
    del model  # each worker has its own
    total = -(-len(rows) // config.shard_size)
    done = run_tasks(ShardCaptioner(config), range(total), "ray", config.workers, config.gpus_per_worker)
    for _ in tqdm(done, total=total, desc="shards"):
        pass
    return count_captions(Path(config.output_dir), config.file_format)


class ShardCaptioner:
    """
    Captions shards by number. Opens model and data when it is first called, so that each worker keeps its own.

    Args:
        config: Settings.
    """

    def __init__(self, config: PseudoCaptionConfig):
        self.config = config
        self.parts: tuple | None = None

    @torch.no_grad()
    def __call__(self, number: int) -> int:
        """Captions a shard, if it is not there yet; returns its number."""
        if self.parts is None:
            model, processor = open_model(self.config)
            model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
            rows = load_rows(self.config.dataset, self.config.split)
            self.parts = model, processor, new_collator(processor, self.config), rows
        model, processor, collator, rows = self.parts
        shard = next(islice(_shards(rows, self.config.shard_size), number, None))
        write_shard(model, processor, collator, number, shard, self.config)
        return number


def open_model(config: PseudoCaptionConfig) -> tuple[DaliForConditionalGeneration, DaliProcessor]:
    """The model of the settings, with the prefix they name, and its processor."""
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    if config.prefix:
        model.load_prefix(config.prefix, config.prefix_position)
        processor.follow(model.config)
    return model, processor


def new_collator(processor: DaliProcessor, config: PseudoCaptionConfig) -> DaliDataCollator:
    """What reads rows and writes prompts."""
    return DaliDataCollator(
        processor,
        config.modality,
        question=config.question,
        captions=False,
        max_skipped=config.max_skipped,
        seed=config.seed,
    )


def write_shard(model, processor, collator, number: int, shard: Callable, config: PseudoCaptionConfig) -> None:
    """Captions a shard and gives its files their names, unless they are there."""
    folder = Path(config.output_dir)
    file = folder / f"captions-{number:05d}.{config.file_format}"
    if file.exists():
        return
    set_seed(config.seed * 100_003 + number)
    captions, skipped = caption_shard(model, processor, collator, list(shard()), config)
    _replace(folder / f"skipped-{number:05d}.json", lambda path: path.write_text(json.dumps(skipped)))
    _replace(file, lambda path: _write(path, captions, config.file_format))


def count_captions(folder: Path, file_format: str, tell: bool = True) -> dict[str, int]:
    """`captions` and `skipped` of all shards."""
    counts = {
        "captions": sum(len(read_shard(file)) for file in sorted(folder.glob(f"captions-*.{file_format}"))),
        "skipped": sum(len(json.loads(file.read_text())) for file in folder.glob("skipped-*.json")),
    }
    if tell:
        logger.warning(f"{counts['captions']} clips have captions; {counts['skipped']} could not be decoded.")
    return counts


def check_settings(folder: Path, prompt: str, config: PseudoCaptionConfig) -> None:
    """
    Notes the settings of a run in its folder, or compares them with those of the run before.

    Raises:
        ValueError: if captions of other settings are there.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ANYWHERE} | {"prompt": prompt}
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    if note.exists():
        found = json.loads(note.read_text())
        different = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if different:
            raise ValueError(f"{folder} holds captions made with other {', '.join(different)}: choose another folder.")
    else:
        _replace(note, lambda path: path.write_text(json.dumps(settings, indent=1)))


def _shards(rows, size: int) -> Iterator:
    """Functions that give the rows of each shard in turn; a stream is read as they are passed."""
    rows = without_decoding(rows)
    if hasattr(rows, "__len__"):
        for start in range(0, len(rows), size):
            yield lambda start=start: ({**rows[i], "index": i} for i in range(start, min(start + size, len(rows))))
        return
    stream = ({**row, "index": index} for index, row in enumerate(rows))
    while shard := list(islice(stream, size)):
        yield lambda shard=shard: shard


def caption_shard(
    model, processor, collator: DaliDataCollator, rows: list[dict], config: PseudoCaptionConfig
) -> tuple[list[dict], list[str]]:
    """
    Captions some rows, those of similar length together.

    Returns:
        `id` and `caption` of each row in its order, and the ids of those that could not be decoded.
    """
    samples: dict[int, CaptionSample] = {}
    skipped = []
    for index, row in enumerate(rows):
        sample = collator.skips.attempt(collator.read, row)
        if sample is None:
            skipped.append(sample_id(row))
        else:
            samples[index] = sample
    order = sorted(samples, key=lambda index: sound_length(samples[index]))
    captions: dict[int, str] = {}
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        inputs = collator.encode([samples[index] for index in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        generated = model.generate(
            **inputs,
            max_new_tokens=config.max_new_tokens,
            num_beams=1,
            **(sampling if config.temperature else {"do_sample": False}),
        )
        captions |= dict(zip(batch, processor.decode_captions(generated, inputs), strict=True))
    return [{"id": sample_id(rows[index]), "caption": captions[index]} for index in sorted(captions)], skipped


def sound_length(sample: CaptionSample) -> int:
    """Samples of a clip's sound, which decide how long its prompt is."""
    return 0 if sample.sound is None else len(sample.sound)


def _replace(path: Path, write) -> None:
    """Writes a file beside its name, then gives it the name: it is never half there."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def _write(path: Path, captions: list[dict], file_format: str) -> None:
    if file_format == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in captions), encoding="utf-8")
    else:
        features = datasets.Features({"id": datasets.Value("string"), "caption": datasets.Value("string")})
        datasets.Dataset.from_list(captions, features=features).to_parquet(path)


def read_shard(file: Path) -> list[dict]:
    """Rows of one shard."""
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file).to_pylist()


def read_captions(folder: str | Path) -> dict[str, str]:
    """
    All captions of a folder, by id.

    Raises:
        ValueError: if there are none, or two for one id.
    """
    captions: dict[str, str] = {}
    for file in sorted(path for name in FORMATS for path in Path(folder).glob(f"captions-*.{name}")):
        for row in read_shard(file):
            if row["id"] in captions:
                raise ValueError(f"{file}: there are two captions for the clip {row['id']}; ids must differ.")
            captions[row["id"]] = row["caption"]
    if not captions:
        raise ValueError(f"{folder} holds no captions.")
    return captions


def main(arguments: Sequence[str] | None = None) -> None:
    """Captions as the recipe says."""
    config = parse_recipe(PseudoCaptionConfig, sys.argv[1:] if arguments is None else arguments)
    if config.engine == "ray":
        write_on_ray(config)
        return
    rows = load_rows(config.dataset, config.split, config.streaming)
    write_pseudo_captions(*open_model(config), rows, config)


if __name__ == "__main__":
    main()
