"""Stage 2, first half: the aligned model captions videos from image and sound; no person writes a word.

    python -m trainers.dali.pseudo_captions dali/pseudo_captions [--setting value ...]

Rows are cut into shards of equal size. A shard is captioned by one process, written beside its name and then renamed:
what stands under a shard's name is whole. A run that was killed goes on with the shards that are missing. Sampling is
seeded by shard, so captions do not depend on how often the run was interrupted, nor on the number of processes. Shards
are shared out by accelerate, or with `--engine ray` among the workers of a Ray cluster.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on distillation; decoding as in the released code.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from datasets_scripts.files import claim, json_lines, locked, sweep, write_whole
from datasets_scripts.workers import run_tasks
from modeling_dali.configuration_dali import PrefixPosition
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import QUESTION, AudioCaptionProcessorMixin
from trainers.dali.data_collator import CaptionSample, DaliDataCollator, Modality
from trainers.fingerprints import rows_hash, weights_hash
from trainers.processes import writing_threads
from trainers.recipes import Dtype, check_choices, load_model, load_rows, run_recipe
from trainers.rows import require_columns, sample_id, without_decoding

logger = logging.get_logger(__name__)

ANYWHERE = ("output", "max_skipped", "engine", "workers", "gpus_per_worker")  # settings that change no caption


@dataclass
class PseudoCaptionConfig:
    """Settings of pseudo-captioning. The data set has `audio` and `frames` or `image`."""

    # Model
    model: str = HfArg(default="", help="Folder or Hub id of an aligned DALI model.")
    prefix: str | None = HfArg(
        default=None, help="Folder or Hub id of a prefix adapter (stage 1a); by default the model's own."
    )
    prefix_position: PrefixPosition | None = HfArg(
        default=None, help="Where the prefix stands; by default where it was trained."
    )
    dtype: Dtype = HfArg(default="float32", help="Type of the weights.")

    # Data
    dataset: str = HfArg(default="", help="Data set: a folder, a file or a Hub id.")
    split: str = HfArg(default="train", help="Split of the data set.")
    streaming: bool = HfArg(default=False, help="Read rows as they come.")
    max_skipped: float = HfArg(default=0.01, help="Largest share of clips that may fail to decode.")

    # Output
    output: str = HfArg(default="pseudo_captions", help="Folder of the captions.")
    shard_size: int = HfArg(default=1000, help="Clips per file of captions.")
    file_format: Literal["jsonl", "parquet"] = HfArg(default="jsonl", help="Format of the files.")

    # Generation
    modality: Modality = HfArg(default="audio_image", help="What the model is shown.")
    question: str = HfArg(default=QUESTION, help="What it is asked.")
    batch_size: int = HfArg(default=32, help="Clips that are captioned at once.")
    temperature: float = HfArg(default=0.2, help="Temperature of sampling; 0 takes the most likely word.")
    top_k: int = HfArg(default=50, help="Words that sampling draws from, the most likely ones; 0 for all.")
    max_new_tokens: int = HfArg(default=128, help="Longest caption.")
    seed: int = HfArg(default=42, help="Seed of sampling.")

    # Where it runs
    engine: Literal["local", "ray"] = HfArg(
        default="local", help="local for this process and those that accelerate started; ray for a Ray cluster."
    )
    workers: int = HfArg(default=1, help="Ray workers, each with a model of its own.")
    gpus_per_worker: float = HfArg(default=0.0, help="GPUs that each Ray worker asks for.")

    def __post_init__(self):
        check_choices(self)
        if self.shard_size < 1 or self.batch_size < 1:
            raise ValueError("`shard_size` and `batch_size` are at least 1.")


@torch.no_grad()
def write_pseudo_captions(
    model: DaliMixin, processor: AudioCaptionProcessorMixin, rows, config: PseudoCaptionConfig
) -> dict[str, int]:
    """
    Captions all rows of a data set.

    Args:
        model: An aligned model, with a prefix or without.
        processor: The model's processor.
        rows: Data set or stream with `audio` and `frames` or `image`.
        config: Settings; `output` gets `captions-00000.jsonl` ... (`id`, `caption`), and for each shard the ids
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
    model = model.eval().to(accelerator.device)
    shards = islice(
        enumerate(_shards(rows, config.shard_size)), accelerator.process_index, None, accelerator.num_processes
    )
    total = -(-len(rows) // config.shard_size // accelerator.num_processes) if hasattr(rows, "__len__") else None
    first = accelerator.is_main_process
    with held_folder(config, model, collator.prompt, rows) if first else nullcontext():
        accelerator.wait_for_everyone()
        for number, shard in tqdm(shards, total=total, desc="shards", disable=not first):
            write_shard(model, processor, collator, number, shard, config)
        accelerator.wait_for_everyone()
    return count_captions(Path(config.output), config.file_format, tell=first)


def write_on_ray(config: PseudoCaptionConfig) -> dict[str, int]:
    """
    Captions all rows of a data set on the Ray cluster that this process is connected to, or a new local one.

    Args:
        config: Settings; model, data set and `output` must be where all machines can read them.

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
    total = -(-len(rows) // config.shard_size)
    with held_folder(config, model, collator.prompt, rows):
        del model  # each worker has its own
        done = run_tasks(ShardCaptioner(config), range(total), "ray", config.workers, config.gpus_per_worker)
        for _ in tqdm(done, total=total, desc="shards"):
            pass
    return count_captions(Path(config.output), config.file_format)


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


def open_model(config: PseudoCaptionConfig) -> tuple[DaliMixin, AudioCaptionProcessorMixin]:
    """The model of the settings, with the prefix they name, and its processor."""
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    if config.prefix:
        model.load_prefix(config.prefix, config.prefix_position)
        processor.follow(model.config)
    return model, processor


def new_collator(processor: AudioCaptionProcessorMixin, config: PseudoCaptionConfig) -> DaliDataCollator:
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
    folder = Path(config.output)
    file = folder / f"captions-{number:05d}.{config.file_format}"
    if file.exists():
        return
    set_seed(config.seed * 100_003 + number)
    captions, skipped = caption_shard(model, processor, collator, list(shard()), config)
    with write_whole(folder / f"skipped-{number:05d}.json") as path:
        path.write_text(json.dumps(skipped))
    with write_whole(file) as path:
        write_captions(path, captions)


def count_captions(folder: Path, file_format: str, tell: bool = True) -> dict[str, int]:
    """`captions` and `skipped` of all shards."""
    counts = {
        "captions": sum(len(read_shard(file)) for file in sorted(folder.glob(f"captions-*.{file_format}"))),
        "skipped": sum(len(json.loads(file.read_text())) for file in folder.glob("skipped-*.json")),
    }
    if tell:
        logger.warning(f"{counts['captions']} clips have captions; {counts['skipped']} could not be decoded.")
    return counts


@contextmanager
def held_folder(config: PseudoCaptionConfig, model: torch.nn.Module, prompt: str, rows) -> Iterator[None]:
    """
    Holds the folder of the captions for one run, and notes in it what decides them, or compares it with the note.

    Raises:
        ValueError: if captions of other settings, another model or other data are there.
        RuntimeError: if another run holds the folder.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in ANYWHERE}
    settings |= {"prompt": prompt, "weights": weights_hash(model), "rows": rows_hash(rows)}
    with locked(config.output):
        claim(config.output, settings)
        sweep(config.output)
        yield


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
    model,
    processor,
    collator: DaliDataCollator,
    rows: list[dict],
    config: PseudoCaptionConfig,
    advance: Callable[[int], object] = lambda clips: None,
) -> tuple[list[dict], list[str]]:
    """
    Captions some rows, those of similar length together.

    Args:
        model, processor, collator: What captions.
        rows (`list[dict]`): What is captioned.
        config (`PseudoCaptionConfig`): How.
        advance (`Callable`, *optional*): Is told of clips as they are done.

    Returns:
        `id` and `caption` of each row in its order, and the ids of those that could not be decoded.
    """
    samples: dict[int, CaptionSample] = {}
    skipped = []
    for index, row in enumerate(rows):
        sample = collator.skips.attempt(collator.read, row)
        if sample is None:
            skipped.append(sample_id(row))
            advance(1)
        else:
            samples[index] = sample
    order = sorted(samples, key=lambda index: sound_length(samples[index]))
    captions: dict[int, str] = {}
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": 1.0}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        inputs = collator.encode([samples[index] for index in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with writing_threads(model):
            generated = model.generate(
                **inputs,
                max_new_tokens=config.max_new_tokens,
                num_beams=1,
                **(sampling if config.temperature else {"do_sample": False}),
            )
        captions |= dict(zip(batch, processor.decode_captions(generated, inputs), strict=True))
        advance(len(batch))
    return [{"id": sample_id(rows[index]), "caption": captions[index]} for index in sorted(captions)], skipped


def sound_length(sample: CaptionSample) -> int:
    """Samples of a clip's sound, which decide how long its prompt is."""
    return 0 if sample.sound is None else len(sample.sound)


def write_captions(path: Path, captions: list[dict]) -> None:
    """Writes `id` and `caption` of clips as JSON lines or parquet, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in captions), encoding="utf-8")
    else:
        features = datasets.Features({"id": datasets.Value("string"), "caption": datasets.Value("string")})
        datasets.Dataset.from_list(captions, features=features).to_parquet(path)


def read_shard(file: Path) -> list[dict]:
    """Rows of one file of captions."""
    if file.suffix == ".jsonl":
        return [row for _, row in json_lines(file)]
    return pyarrow.parquet.read_table(file).to_pylist()


def read_pseudo_captions(folder: str | Path) -> dict[str, str]:
    """
    All captions of a folder, by id.

    Raises:
        ValueError: if there are none, or two for one id.
    """
    captions: dict[str, str] = {}
    for file in sorted(path for path in Path(folder).glob("captions-*") if path.suffix in (".jsonl", ".parquet")):
        for row in read_shard(file):
            if row["id"] in captions:
                raise ValueError(f"{file}: there are two captions for the clip {row['id']}; ids must differ.")
            captions[row["id"]] = row["caption"]
    if not captions:
        raise ValueError(f"{folder} holds no captions.")
    return captions


def caption_data_set(config: PseudoCaptionConfig) -> int:
    """Captions as the settings say."""
    if config.engine == "ray":
        write_on_ray(config)
    else:
        write_pseudo_captions(*open_model(config), load_rows(config.dataset, config.split, config.streaming), config)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Captions as the recipe says."""
    return run_recipe(PseudoCaptionConfig, caption_data_set, arguments)


if __name__ == "__main__":
    sys.exit(main())
