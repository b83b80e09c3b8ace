"""From a recipe to settings, rows, model and processor: `python -m trainers.STAGE [RECIPE] [--setting value ...]`.

A recipe is a YAML file of settings. It is named by its path, or by its name among those that come with the project,
such as `dali/alignment`.
"""

import argparse
import difflib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import datasets
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from datasets_scripts.builders.tables import is_prepared
from datasets_scripts.commands import run_command
from datasets_scripts.shards import open_shards
from datasets_scripts.streaming import ShardStream
from modeling_dali import (
    DaliCaptionerProcessor,
    DaliForConditionalGeneration,
    DaliForImageTextToText,
    DaliProcessor,
    KaldiFbankFeatureExtractor,
)
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import AudioCaptionProcessorMixin

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Dtype = Literal["float32", "bfloat16", "float16"]


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def find_recipe(name: str) -> Path:
    """
    The file of a recipe.

    Args:
        name (`str`): A path, or the name of a recipe of the project: `dali/alignment`, `alignment` or
            `alignment.yaml`.

    Raises:
        ValueError: if there is none of that name; lists those there are.
    """
    if Path(name).is_file():
        return Path(name)
    paths = [path for path in sorted(RECIPES.glob("*/*.yaml")) if path.parent.name != "accelerate"]
    known = {str(path.relative_to(RECIPES).with_suffix("")): path for path in paths}
    wanted = name.removesuffix(".yaml")
    found = [path for each, path in known.items() if wanted in (each, Path(each).name)]
    if len(found) != 1:
        raise ValueError(f"There is no recipe {name}: neither a file, nor one of {', '.join(known)}.")
    return found[0]


class RecipeParser(HfArgumentParser):
    """
    Reads a recipe and the command line, which wins, into a dataclass.

    Its help shows the settings that the dataclass declares; `--help_all` also those of [`TrainingArguments`].

    Args:
        config_class (`type`): The dataclass.
        show_all (`bool`, *optional*, defaults to `False`): Whether the help shows all settings.
        kwargs: Further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, config_class: type, show_all: bool = False, **kwargs):
        own = [base for base in config_class.__mro__ if show_all or base not in TrainingArguments.__mro__]
        self.shown = {name for base in own for name in vars(base).get("__annotations__", {})} | {"help", "help_all"}
        self.hints = get_type_hints(config_class)
        self.config_class = config_class
        self.changed: Any = None  # group of settings of TrainingArguments that have other defaults
        usage = "%(prog)s [RECIPE] [--setting value ...]"
        super().__init__(config_class, usage=usage, allow_abbrev=False, **kwargs)
        if issubclass(config_class, TrainingArguments) and not show_all:
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="explain the other TrainingArguments too")

    def add_argument(self, *names, **options):
        """As `argparse` does, with help for the settings that are shown."""
        name = options.get("dest") or names[0].lstrip("-")
        if name == "debug" and "type" in options:
            return None  # TrainingArguments' `debug` gives way to the switch that all commands have
        if name not in self.shown:
            return super().add_argument(*names, **options | {"help": argparse.SUPPRESS})
        convert = options.get("type")
        if convert is not None and types.NoneType in get_args(self.hints.get(name)):
            options["type"] = lambda text: None if text == "none" else convert(text)
            if "choices" in options:
                options["choices"] = [*options["choices"], None]
        hidden = [option for option in names if option.startswith("--no_") or "-" in option[2:]]
        if hidden:  # other ways to write the same
            super().add_argument(*hidden, **options | {"dest": name, "help": argparse.SUPPRESS})
        if hidden == list(names):
            return None
        where: Any = super()
        if "help" not in options:
            options["help"] = TrainingArguments.__dataclass_fields__[name].metadata["help"]
            where = self.changed = self.changed or self.add_argument_group("TrainingArguments with other defaults")
        if options.get("default") not in (None, "", argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        if convert is not None and "choices" not in options:
            options["metavar"] = getattr(convert, "__name__", "value").removeprefix("string_to_").upper()
        return where.add_argument(*[option for option in names if option not in hidden], **options)

    def error(self, message: str):
        """Ends the program with one line."""
        self.exit(2, f"error: {message}\n")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """
        Reads `[RECIPE] [--setting value ...]`.

        Raises:
            ValueError: for a name that is no setting; says which one may be meant.
            SystemExit: for a value of the wrong kind.
        """
        arguments = list(arguments)
        if arguments and not arguments[0].startswith("-"):
            path = find_recipe(arguments[0])
            recipe = yaml.safe_load(path.read_text()) or {}
            for name in recipe:
                self.require_setting(name, f"{path}: ")
            # What a command line can say is read as one is, so that kinds and choices are checked.
            plain = {name: value for name, value in recipe.items() if isinstance(value, (str, int, float))}
            self.set_defaults(**{name: value for name, value in recipe.items() if name not in plain})
            arguments[:1] = [f"--{name}={value}" for name, value in plain.items()]
        given, unknown = self.parse_known_args(arguments)
        for name in unknown[:1]:
            self.require_setting(name.lstrip("-").split("=")[0].replace("-", "_"))
        return given

    def require_setting(self, name: str, where: str = "") -> None:
        """Raises ValueError if there is no such setting; says which one may be meant."""
        known = [field.name for field in fields(self.config_class) if field.init]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean `{close[0]}`?" if close else "."
            raise ValueError(f"{where}there is no setting `{name}`{hint}")

    def parse_args(self, args=None, namespace=None):
        """As `read`, but every error ends the program with one line."""
        try:
            return self.read(sys.argv[1:] if args is None else args)
        except (ValueError, OSError) as error:
            self.error(str(error))

    def settings(self, given: argparse.Namespace) -> Any:
        """The dataclass, filled."""
        names = {field.name for field in fields(self.config_class) if field.init} - {"debug"}
        return self.config_class(**{name: value for name, value in vars(given).items() if name in names})


class _HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        RecipeParser(parser.config_class, show_all=True, prog=parser.prog).print_help()
        parser.exit()


def parse_recipe(config_class, arguments: Sequence[str]) -> Any:
    """
    Settings from a recipe and the command line, which wins.

    Args:
        config_class (`type`): The dataclass to fill.
        arguments (`Sequence[str]`): `[RECIPE] [--setting value ...]`.

    Raises:
        ValueError: for a name that is no setting; says which one may be meant.
        SystemExit: for a value of the wrong kind.
    """
    parser = RecipeParser(config_class)
    return parser.settings(parser.read(arguments))


def check_choices(config) -> None:
    """
    Checks the settings that are a choice; for those that are given in code, which no parser has seen.

    Raises:
        ValueError: naming a setting that has none of its values, and the values.
    """
    for name, hint in get_type_hints(type(config)).items():
        hints = [hint, *get_args(hint)] if get_origin(hint) is not Literal else [hint]
        choices = [value for each in hints if get_origin(each) is Literal for value in get_args(each)]
        value = getattr(config, name, None)
        if choices and value not in choices and not (value is None and types.NoneType in hints):
            raise ValueError(f"`{name}` is one of {', '.join(map(str, choices))}, not {value!r}.")


def run_recipe(config_class, command: Callable[[Any], int], arguments: Sequence[str] | None = None) -> int:
    """
    The command line of everything that a recipe describes.

    Args:
        config_class (`type`): The dataclass of its settings.
        command (`Callable`): Takes the settings and returns the exit code.
        arguments (`Sequence[str]`, *optional*): `[RECIPE] [--setting value ...]`; those of this process by default.

    Returns:
        `int`: the exit code.
    """
    module = sys.modules[config_class.__module__]
    form = argparse.RawDescriptionHelpFormatter
    prog = f"python -m {module.__spec__.name}" if module.__name__ == "__main__" and module.__spec__ else None
    parser = RecipeParser(config_class, prog=prog, description=inspect.getdoc(module), formatter_class=form)
    return run_command(parser, lambda given: command(parser.settings(given)), arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def load_rows(source: str, split: str | None = None, streaming: bool = False):
    """
    Opens a data set.

    Args:
        source (`str`): A folder saved by `datasets`, a folder or URL of shards, a file (parquet, JSON lines, CSV) or a
            Hub id; behind a `#` the name of a configuration.
        split (`str`, *optional*): The split; by default the only one. What has no splits counts as `train`.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows as they come.

    Raises:
        ValueError: if there is no such data set or split, or if there are several splits and none is chosen.
    """
    source, _, name = source.partition("#")
    path = Path(source)
    if not source:
        raise ValueError("No data set was given: set `dataset`.")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        found = datasets.load_from_disk(source)
    elif path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(f"{source}: a data set file is one of {', '.join(FILE_KINDS)}.")
        found = datasets.load_dataset(FILE_KINDS[path.suffix], data_files=source, streaming=streaming)
    elif is_prepared(source):
        found = ShardStream(source) if streaming else open_shards(source)
    else:
        try:
            found = datasets.load_dataset(source, name or None, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"There is no data set {source}: neither a folder or file here, nor on the Hub."
            ) from error
    splits = found if isinstance(found, dict) else {"train": found}
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        wrong = "choose one of them" if split is None else f"not `{split}`"
        raise ValueError(f"{source} has the splits {', '.join(splits)}: {wrong}.")
    rows = splits[split]
    return rows.to_iterable_dataset() if streaming and isinstance(rows, datasets.Dataset) else rows


def load_splits(config) -> Iterator[Any]:
    """The training rows of a stage's settings, a stream with `train_rows`; then its evaluation rows or None."""
    yield load_rows(config.dataset, config.train_split, streaming=bool(config.train_rows))
    yield load_rows(config.dataset, config.eval_split) if config.eval_split else None


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(
    source: str, audio_encoder: str | None = None, dtype: str = "float32", seed: int = 42
) -> tuple[DaliMixin, AudioCaptionProcessorMixin]:
    """
    A model to train, and its processor.

    Args:
        source (`str`): Folder or Hub id of a DALI model or an ear, or of an image captioner to build a model from:
            LLaVA, or one of another image-text-to-text class.
        audio_encoder (`str`, *optional*): For a captioner: where the audio encoder starts from: a CAV-MAE or DALI
            `.pth`, or folder or Hub id of an audio model of transformers. By default from random weights.
        dtype (`str`, *optional*, defaults to `"float32"`): Type of the weights; `"auto"` for the saved one.
        seed (`int`, *optional*, defaults to 42): Seed of new weights.

    Raises:
        ValueError: if a checkpoint does not fit.
    """
    if not source:
        raise ValueError("No model was given: set `model`.")
    set_seed(seed)
    kwargs: dict[str, Any] = {"dtype": dtype}
    config = AutoConfig.from_pretrained(source)
    if config.model_type in ("dali", "dali_captioner"):
        if audio_encoder:
            raise ValueError(f"{source} has an audio encoder already: leave `audio_encoder` out, or set it to none.")
        return AutoModel.from_pretrained(source, **kwargs), AutoProcessor.from_pretrained(source)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"{source} is a {config.model_type} model; a DALI model or an image captioner is needed.")
    captioner_processor = AutoProcessor.from_pretrained(source)
    tokenizer = getattr(captioner_processor, "tokenizer", None) or AutoTokenizer.from_pretrained(source)
    extractor: Any = KaldiFbankFeatureExtractor()
    encoder: Any = audio_encoder
    if audio_encoder and not audio_encoder.endswith((".pth", ".pt")):
        encoder = AutoModel.from_pretrained(audio_encoder, **kwargs)
        encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
        extractor = AutoFeatureExtractor.from_pretrained(audio_encoder)
    if config.model_type != "llava":
        other = DaliForImageTextToText.from_captioner(source, encoder, tokenizer=tokenizer, **kwargs)
        return other, DaliCaptionerProcessor.for_model(other.config, captioner_processor, extractor)
    model = DaliForConditionalGeneration.from_llava(source, encoder, tokenizer=tokenizer, **kwargs)
    processor = DaliProcessor.for_model(
        model.config,
        captioner_processor.image_processor,
        tokenizer,
        extractor,
        chat_template=getattr(captioner_processor, "chat_template", None),
    )
    return model, processor


def save_model(
    model: DaliMixin, folder: Path, state_dict: dict[str, torch.Tensor] | None = None, captioner_trained: bool = False
) -> None:
    """
    Writes a trained model: the ear alone where the captioner is as it was published, else all of it.

    Args:
        model (`DaliForConditionalGeneration` or `DaliForImageTextToText`): The model.
        folder (`Path`): Where to.
        state_dict (`dict[str, torch.Tensor]`, *optional*): State of the model, where its own parameters are sharded.
        captioner_trained (`bool`, *optional*, defaults to `False`): Whether the captioner was trained too.
    """
    if model.captioner_is_stock and not captioner_trained:
        model.save_ear(folder, state_dict)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
