"""All stages of one captioner by one recipe, from a folder of videos to a model that captions sound.

    dali run one_gpu/llava_interleave_0.5b --videos videos/ --output_dir runs/mine

Each stage reads what the one before it left and writes a folder of its own below `output_dir`:

    prepare -> data, prefix -> prefix, align -> aligned, pseudo-caption -> pseudo_captions, distill -> model

A run that was interrupted goes on where it was cut off, to the same bits. A recipe is YAML: the fields of
[`RunConfig`], and for each stage a section of its own settings; what a section leaves out is as published.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from datasets_scripts.files import claim, locked
from datasets_scripts.prepare import Settings, clips_of, prepare
from trainers.dali import alignment, distillation, prefix_tuning
from trainers.dali.pseudo_captions import PseudoCaptionConfig, caption_data_set
from trainers.progress import Progress, Stage, run_stages
from trainers.recipes import find_recipe, parse_recipe
from trainers.stage import StageTrainer

SCORERS = "scorer.safetensors"


@dataclass
class RunConfig:
    """
    Settings of a run.

    Args:
        model (`str`): Folder or Hub id of the captioner of pictures.
        output_dir (`str`): Folder of everything the run makes.
        videos (`str`, *optional*): Folder of videos, list of files, or index in AudioSet's format; prepared first.
        dataset (`str`, *optional*): Prepared clips with `audio` and `frames`, in place of `videos`.
        prefix_dataset (`str`, *optional*): Pictures with captions of their sound, 16 are enough. Without them there is
            no stage 1a, and the pseudo-captions are those of a captioner that was only asked for the sound.
        audio_encoder (`str`, *optional*): What the audio encoder starts from; by default from random weights.
        dtype (`str`, defaults to `"float32"`): Type of the frozen weights.
        seed (`int`, defaults to 42): Seed of all stages.
        prepare, prefix, align, pseudo_caption, distill (`dict`): Settings of each stage.
    """

    model: str = ""
    output_dir: str = ""
    videos: str | None = None
    dataset: str | None = None
    prefix_dataset: str | None = None
    audio_encoder: str | None = None
    dtype: str = "float32"
    seed: int = 42
    prepare: dict[str, Any] = field(default_factory=dict)
    prefix: dict[str, Any] = field(default_factory=dict)
    align: dict[str, Any] = field(default_factory=dict)
    pseudo_caption: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("model", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"set `{name}`, in the recipe or as --{name}")
        if (self.videos is None) == (self.dataset is None):
            raise ValueError("set either `videos` (a folder of videos) or `dataset` (prepared clips)")

    @property
    def clips(self) -> str:
        """Where the stages find the clips."""
        return self.dataset or str(Path(self.output_dir, "data"))


def read_run(recipe: str, given: Mapping[str, Any]) -> RunConfig:
    """
    The settings of a run.

    Args:
        recipe (`str`): Path of a YAML file, or the name of a recipe that comes with the project.
        given (`Mapping`): Settings that win over the recipe's; None leaves the recipe's.

    Raises:
        ValueError: for a name that is no setting, or a setting that is missing.
    """
    path = find_recipe(recipe)
    settings = yaml.safe_load(path.read_text()) or {}
    known = [each.name for each in fields(RunConfig)]
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"{path}: there is no setting `{unknown[0]}`; choose among {', '.join(known)}")
    return RunConfig(**settings | {name: value for name, value in given.items() if value is not None})


def stage_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of each stage after preparing, by its name: its section, with this run's folders and seed."""
    output = Path(config.output_dir)
    common = {"dtype": config.dtype, "seed": config.seed}
    training = common | {"disable_tqdm": True, "report_to": "none"}
    found: dict[str, Any] = {}
    if config.prefix_dataset:
        given = {"model": config.model, "dataset": config.prefix_dataset, "output_dir": output / "prefix"}
        found["prefix"] = settings_of(prefix_tuning.PrefixTuningConfig, training | config.prefix | given)
    given = {"model": config.model, "dataset": config.clips, "output_dir": output / "aligned"}
    given |= {"audio_encoder": config.audio_encoder} if config.audio_encoder else {}
    found["align"] = settings_of(alignment.AlignmentConfig, training | config.align | given)
    given = {"model": output / "aligned", "dataset": config.clips, "output": output / "pseudo_captions"}
    given |= {"prefix": output / "prefix"} if config.prefix_dataset else {}
    found["pseudo-caption"] = settings_of(PseudoCaptionConfig, common | config.pseudo_caption | given)
    given = {"model": output / "aligned", "dataset": config.clips, "output_dir": output / "model"}
    given |= {"captions": output / "pseudo_captions"}
    found["distill"] = settings_of(distillation.DistillationConfig, training | config.distill | given)
    return found


def settings_of(kind: type, given: Mapping[str, Any]) -> Any:
    """A stage's settings out of a section of the recipe."""
    arguments: list[str] = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return parse_recipe(kind, arguments)


def run(config: RunConfig) -> dict[str, dict]:
    """
    Runs all stages that are not done.

    Args:
        config (`RunConfig`): Settings.

    Returns:
        `dict[str, dict]`: seconds and memory of each stage (see [`run_stages`]).

    Raises:
        ValueError: if the folder holds a run with other settings.
        RuntimeError: if another process runs in the folder.
    """
    output = Path(config.output_dir)
    with locked(output):
        claim(output, {each.name: getattr(config, each.name) for each in fields(config)}, "run.json")
        return run_stages(list(stages(config)), output / "done")


def stages(config: RunConfig) -> Iterator[Stage]:
    """The stages of a run, in order."""
    settings = stage_settings(config)
    makers = {
        "prefix": prefix_tuning.new_trainer,
        "align": alignment.new_trainer,
        "distill": distillation.new_trainer,
    }
    weights = {"prepare": 1, "prefix": 1, "align": 6, "pseudo-caption": 2, "distill": 2}
    if config.videos:
        yield Stage("prepare", weights["prepare"], lambda progress: prepare_videos(config))
    for name, given in settings.items():
        run = partial(caption, given) if name == "pseudo-caption" else partial(train, makers[name], given)
        yield Stage(name, weights[name], run)


def caption(settings: PseudoCaptionConfig, progress: Progress) -> None:
    """Writes the pseudo-captions."""
    caption_data_set(settings)


def train(new_trainer: Callable[[Any], StageTrainer], settings: Any, progress: Progress) -> None:
    """Trains a stage; what was trained is in its `output_dir`."""
    trainer = new_trainer(settings)
    progress.follow(trainer)
    trainer.run(f"dali run (stage of {Path(settings.output_dir).parent})", settings.dataset)
    scorers = Path(settings.model, SCORERS)
    if scorers.exists() and not Path(settings.output_dir, SCORERS).exists():
        shutil.copy(scorers, settings.output_dir)  # stage 2 leaves the audio tokens as they were


def prepare_videos(config: RunConfig) -> None:
    """Cuts the videos into clips of sound and frames."""
    given = dict(config.prepare)
    seconds = given.pop("seconds", 10.0)
    workers = given.pop("workers", None)
    clips = clips_of(config.videos or "", seconds=seconds)
    prepare(clips, config.clips, Settings(**given), workers=workers, progress=False)
