"""From a recipe to settings, rows, model and processor: `python -m trainers.STAGE recipe.yaml [--field value ...]`."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor, AutoTokenizer, HfArgumentParser, set_seed

from modeling_dali import DaliForConditionalGeneration, DaliProcessor, KaldiFbankFeatureExtractor

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def parse_recipe(config_class, arguments: Sequence[str]) -> Any:
    """
    Settings from a recipe and the command line, which wins.

    Args:
        config_class: The dataclass to fill.
        arguments: `[recipe.yaml] [--field value ...]`.

    Raises:
        ValueError: for a name in the recipe that is no field; says which one may be meant.
        SystemExit: for an unknown `--field`, or a value of the wrong kind.
    """
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        recipe = yaml.safe_load(path.read_text()) or {}
        known = [field.name for field in fields(config_class) if field.init]
        for name in recipe:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean `{close[0]}`?" if close else "."
                raise ValueError(f"{path}: there is no setting `{name}`{hint}")
        parser.set_defaults(**recipe)
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return config


def load_rows(source: str, split: str = "train", streaming: bool = False):
    """
    Opens a data set.

    Args:
        source: A folder saved by `datasets`, a folder of shards, a file (parquet, JSON lines, CSV) or a Hub name;
            behind a `#` the name of a configuration.
        split: The split, where there are several.
        streaming: Whether to read rows as they come.

    Raises:
        ValueError: if there is no such data set or split.
    """
    source, _, name = source.partition("#")
    path = Path(source)
    if not source:
        raise ValueError("No data set was given: set `dataset`.")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        rows = datasets.load_from_disk(source)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) and split in rows else rows
        rows = rows.to_iterable_dataset() if streaming and isinstance(rows, datasets.Dataset) else rows
    elif path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(f"{source}: a data set file is one of {', '.join(FILE_KINDS)}.")
        kind = FILE_KINDS[path.suffix]
        rows = datasets.load_dataset(kind, data_files=source, split="train", streaming=streaming)
    else:
        try:
            rows = datasets.load_dataset(source, name or None, split=split, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"There is no data set {source}: neither a folder or file here, nor on the Hub."
            ) from error
    if isinstance(rows, dict):
        raise ValueError(f"{source} has the splits {', '.join(rows)}, but not `{split}`.")
    return rows


def load_model(
    source: str, audio_encoder: str | None = None, dtype: str = "float32", seed: int = 42
) -> tuple[DaliForConditionalGeneration, DaliProcessor]:
    """
    A model to train, and its processor.

    Args:
        source: Folder or Hub id of a DALI model, or of a LLaVA checkpoint to build one from.
        audio_encoder: For a LLaVA checkpoint: where the audio encoder starts from: a CAV-MAE or DALI `.pth`, or
            folder or Hub id of an audio model of transformers. Without it, from random weights.
        dtype: Of what stays frozen.
        seed: Of new weights.

    Raises:
        ValueError: if a checkpoint does not fit.
    """
    set_seed(seed)
    kwargs = {"dtype": getattr(torch, dtype)}
    config = AutoConfig.from_pretrained(source)
    if config.model_type == "dali":
        if audio_encoder:
            raise ValueError(f"{source} has an audio encoder already: `audio_encoder` is for LLaVA checkpoints.")
        model = DaliForConditionalGeneration.from_pretrained(source, **kwargs)
        return model, AutoProcessor.from_pretrained(source)
    if config.model_type != "llava":
        raise ValueError(f"{source} is a {config.model_type} model; a DALI or LLaVA one is needed.")
    llava_processor = AutoProcessor.from_pretrained(source)
    tokenizer = getattr(llava_processor, "tokenizer", None) or AutoTokenizer.from_pretrained(source)
    extractor: Any = KaldiFbankFeatureExtractor()
    encoder: Any = audio_encoder
    if audio_encoder and not audio_encoder.endswith((".pth", ".pt")):
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(audio_encoder, **kwargs)
        encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
        extractor = AutoFeatureExtractor.from_pretrained(audio_encoder)
    model = DaliForConditionalGeneration.from_llava(source, encoder, tokenizer=tokenizer, **kwargs)
    processor = DaliProcessor.for_model(
        model.config,
        llava_processor.image_processor,
        tokenizer,
        extractor,
        chat_template=getattr(llava_processor, "chat_template", None),
    )
    return model, processor
