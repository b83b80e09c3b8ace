"""DALI in miniature: a captioner of pictures learns to caption sound, though no sound ever meets a text.

    python -m examples.sounding_world.demo [RECIPE.yaml] [--output runs/demo] [--field value ...]

On the sounding world (`datasets_scripts.sounding_world`), from nothing, offline, on two CPU cores:

1. a small LLaVA learns to caption pictures, what is seen and what would be heard;
2. stage 1a: sixteen soft tokens, from 16 pictures with captions of their sound;
3. an audio encoder learns from videos without text, first by contrast, as CAV-MAE has, from which the published
   encoder starts;
4. stage 1b: it learns from the same videos to give tokens like those of their pictures;
5. pseudo-captions of further videos;
6. stage 2: the audio projector learns them from sound alone;
7. the supervised twin, the upper bound: the same model, tuned on sounds with true captions;
8. evaluation, and a report.

Every stage is a trainer with its recipe out of `recipes/` beside this file. Writes into the output folder: `model`
(loads with `AutoModel` and `dali caption`), `results.json`, `report.html`, `samples` (sounds and videos to try), and a
folder per stage. A second run takes up what is there: stages that are done, and the last checkpoint of the one that
was cut off.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers.hf_argparser import HfArg

from datasets_scripts.files import claim
from datasets_scripts.sounding_world import SYNONYMS, sounding_world, vocabulary
from examples.sounding_world.captioner import CaptionerConfig, CaptionerTrainer, new_captioner, texts_of
from examples.sounding_world.evaluation import TEST_VARIANTS, evaluate
from examples.sounding_world.listener import new_listener
from examples.sounding_world.report import write_report
from examples.sounding_world.runner import Relay, Runner
from examples.sounding_world.samples import write_samples
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import AudioCaptionProcessorMixin
from trainers.dali.alignment import LOSSES, AlignmentConfig, AlignmentTrainer
from trainers.dali.distillation import DistillationConfig, DistillationTrainer, join_captions
from trainers.dali.evaluate import table
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer
from trainers.dali.pseudo_captions import PseudoCaptionConfig, write_pseudo_captions
from trainers.processes import run_in_processes
from trainers.progress import Stage
from trainers.recipes import load_model, parse_recipe, run_recipe, save_model

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass
class DemoConfig:
    """Settings of the demonstration."""

    output: str = HfArg(default="runs/demo", help="Folder of everything it makes.")
    recipes: str = HfArg(default=str(RECIPES), help="Folder of the stages' recipes.")
    captioner: Literal["llava", "gemma3"] = HfArg(
        default="llava", help="Class of the captioner; any other than llava is wrapped by DaliForImageTextToText."
    )
    seed: int = HfArg(default=0, help="Seed of the world, the weights and the order of the data.")
    processes: int = HfArg(
        default=2,
        help="Processes that make the world, and share the training of the audio encoder where there is no GPU.",
    )

    # World
    image_size: int = HfArg(default=48, help="Side of the pictures in pixels.")
    duration: float = HfArg(default=2.56, help="Length of the sounds in seconds.")
    frames: int = HfArg(default=4, help="Pictures per video.")
    captions: int = HfArg(default=8000, help="Pictures with captions, for the captioner.")
    prefix: int = HfArg(default=16, help="Pictures with captions of their sound, for stage 1a.")
    video: int = HfArg(default=3000, help="Videos for stage 1b.")
    distillation: int = HfArg(default=1000, help="Videos for stage 2.")
    supervised: int = HfArg(default=1000, help="Sounds with captions, for the supervised twin.")
    test: int = HfArg(default=200, help="Rows of each test split.")

    # Audio encoder
    num_mel_bins: int = HfArg(default=64, help="Mel bins of the features.")
    audio_patch_size: int = HfArg(default=16, help="Side of the audio encoder's patches.")
    audio_width: int = HfArg(default=96, help="Width of the audio encoder.")
    audio_layers: int = HfArg(default=3, help="Blocks of the audio encoder.")
    audio_heads: int = HfArg(default=4, help="Attention heads of the audio encoder.")


class Demo(Runner):
    """
    The stages, each from folder to folder.

    Args:
        config (`DemoConfig`): Settings.
    """

    def __init__(self, config: DemoConfig):
        super().__init__(f"python -m examples.sounding_world.demo --output {config.output} --seed {config.seed}")
        self.config, self.output = config, Path(config.output)

    def settings(self, kind: type, recipe: str, folder: str, **paths) -> Any:
        """The settings of a stage: its recipe, with this run's folders and seed."""
        kind_of_output = "output" if kind is PseudoCaptionConfig else "output_dir"
        given = {kind_of_output: str(self.output / folder), "seed": self.config.seed, **paths}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        if kind is not PseudoCaptionConfig:
            arguments += ["--disable_tqdm", "true"]
        return parse_recipe(kind, [str(Path(self.config.recipes) / f"{recipe}.yaml"), *arguments])

    def rows(self, split: str, variant: str = "standard") -> datasets.Dataset:
        """A split of this run's world."""
        return datasets.load_from_disk(str(self.output / "world" / (split if variant == "standard" else variant)))

    def model(self, folder: str, prefix: bool = False) -> tuple[DaliMixin, AudioCaptionProcessorMixin]:
        """A model of an earlier stage, with the prefix of stage 1a or as it was saved."""
        model, processor = load_model(str(self.output / folder), seed=self.config.seed)
        if prefix:
            model.load_prefix(self.output / "prefix")
            processor.follow(model.config)
        return model.eval(), processor

    def world(self) -> None:
        """Makes all splits and keeps them where recipes find them."""
        config, folder = self.config, self.output / "world"
        sizes = {name: getattr(config, name) for name in ("captions", "prefix", "video", "distillation", "supervised")}
        jobs = [(split, "standard", size) for split, size in sizes.items()]
        jobs += [("test", variant, config.test) for variant in TEST_VARIANTS]
        for number, (split, variant, size) in enumerate(jobs):
            rows = sounding_world(
                split,
                size,
                config.seed,
                variant,
                image_size=config.image_size,
                duration=config.duration,
                frames=config.frames,
                cache_dir=folder / "cache",
                num_proc=config.processes if config.processes > 1 else None,
            )
            rows.save_to_disk(str(folder / (split if variant == "standard" else variant)))
            if self.progress is not None:
                self.progress.done((number + 1) / len(jobs))
        (folder / "synonyms.json").write_text(json.dumps({name: sorted(words) for name, words in SYNONYMS.items()}))
        write_samples(self.rows("test"), self.output / "samples")

    def captioner(self) -> None:
        """Trains the captioner, and gives it an untrained ear: `untrained`."""
        given = {"image_size": self.config.image_size, "captioner": self.config.captioner}
        config = self.settings(CaptionerConfig, "captioner", "captioner", **given)
        rows = self.rows("captions")
        model, processor = new_captioner(config, [*texts_of(rows), *vocabulary()])
        self.train(CaptionerTrainer(model, config, processor, rows))
        self.listener(self.config.seed, "untrained")

    def listener(self, seed: int, folder: str) -> None:
        """A DALI model out of the captioner, with an audio encoder of random weights."""
        model, processor = new_listener(self.config, self.output / "captioner", seed)
        save_model(model, self.output / folder)
        processor.save_pretrained(self.output / folder)

    def prefix_tuning(self) -> None:
        """Stage 1a."""
        config = self.settings(PrefixTuningConfig, "prefix_tuning", "prefix", model=self.output / "untrained")
        model, processor = self.model("untrained")
        self.train(PrefixTuningTrainer(model, config, processor, self.rows("prefix")))

    def audio_pretraining(self, start: str = "untrained", folder: str = "pretrained", **settings) -> None:
        """By contrast with pictures, what CAV-MAE's checkpoint is for the published model."""
        self.align("audio_pretraining", start, folder, **settings)

    def alignment(self, start: str = "pretrained", folder: str = "aligned", **settings) -> None:
        """Stage 1b."""
        self.align("alignment", start, folder, **settings)

    def align(self, recipe: str, start: str, folder: str, **settings) -> None:
        """Trains the audio encoder of a model on the videos, in several processes where that is faster."""
        if self.config.processes == 1 or torch.cuda.is_available():
            self.train_audio_encoder(recipe, start, folder, settings)
        else:
            arguments = (self.config, recipe, start, folder, settings)
            run_in_processes(_train_audio_encoder, arguments, self.config.processes, self.show)

    def train_audio_encoder(self, recipe: str, start: str, folder: str, settings: dict) -> None:
        """This process's part of the training."""
        paths = {"model": self.output / start, "cache_image_tokens": self.output / "image_tokens", **settings}
        config = self.settings(AlignmentConfig, recipe, folder, **paths)
        batch, processes = config.per_device_train_batch_size, config.world_size
        if batch % processes:
            raise ValueError(f"{recipe}.yaml: {processes} processes cannot share a batch of {batch} evenly.")
        config.per_device_train_batch_size = batch // processes
        model, processor = self.model(start)
        self.train(AlignmentTrainer(model, config, processor, self.rows("video")))

    def pseudo_captions(self, start: str = "aligned", folder: str = "pseudo_captions", **settings) -> None:
        """Stage 2, first half."""
        paths = {"model": self.output / start, "prefix": self.output / "prefix", **settings}
        config = self.settings(PseudoCaptionConfig, "pseudo_captions", folder, **paths)
        model, processor = self.model(start, prefix=True)
        counts = write_pseudo_captions(model, processor, self.rows("distillation"), config)
        if counts["skipped"]:
            raise ValueError(f"{counts['skipped']} clips of the world could not be decoded.")

    def distillation(
        self, start: str = "aligned", captions: str = "pseudo_captions", folder: str = "model", **settings
    ) -> None:
        """Stage 2, second half."""
        rows = join_captions(self.rows("distillation"), str(self.output / captions))
        self.tune(rows, "distillation", start, folder, **settings)
        scorers = self.output / start / "scorer.safetensors"
        if scorers.exists():  # for `dali explain`: distillation leaves the audio tokens as they were
            shutil.copy(scorers, self.output / folder)

    def supervised(self, start: str = "aligned", folder: str = "supervised", **settings) -> None:
        """The upper bound: sound with true captions; the audio encoder learns along."""
        self.tune(self.rows("supervised"), "supervised", start, folder, **settings)

    def tune(self, rows, recipe: str, start: str, folder: str, **settings) -> None:
        """Tunes a model on sounds with captions."""
        config = self.settings(DistillationConfig, recipe, folder, model=self.output / start, **settings)
        model, processor = self.model(start)
        self.train(DistillationTrainer(model, config, processor, rows))

    # What came out ---------------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Writes the report, with the results of the ablation if there are any."""
        results = json.loads((self.output / "results.json").read_text())
        models = {"before alignment": self.model("untrained"), "before stage 1b": self.model("pretrained")}
        ablation = self.output / "ablation" / "results.json"
        if ablation.exists():
            found = json.loads(ablation.read_text())
            results["variants"] |= {f"ablation: {name}": scores for name, scores in found["means"].items()}
            for run in found["runs"]:
                loss, seed = run.split(" ")
                if loss in LOSSES:
                    models.setdefault(f"{loss} (ablation)", self.model(f"ablation/{loss}-{seed}/aligned"))
        write_report(self.output, results, models | {"aligned": self.model("model")}, self.rows("test"))

    def stages(self) -> list[Stage]:
        """All stages, with about the seconds that they take on two cores."""
        return [
            self.stage("world", 25, self.world),
            self.stage("captioner", 205, self.captioner),
            self.stage("prefix tuning", 10, self.prefix_tuning),
            self.stage("audio pretraining", 80, self.audio_pretraining),
            self.stage("alignment", 160, self.alignment),
            self.stage("pseudo-captions", 5, self.pseudo_captions),
            self.stage("distillation", 25, self.distillation),
            self.stage("supervised twin", 30, self.supervised),
            self.stage("evaluation", 15, partial(evaluate, self)),
        ]


def _train_audio_encoder(
    config: DemoConfig, recipe: str, start: str, folder: str, settings: dict, report: Callable
) -> None:
    demo = Demo(config)
    demo.progress = Relay(report)
    demo.train_audio_encoder(recipe, start, folder, settings)


def claim_folder(config: DemoConfig) -> None:
    """
    Notes the settings of a run in its folder, or compares them with those of the run that is there.

    Raises:
        ValueError: if the folder holds a run with other settings or recipes.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in ("output", "recipes")}
    recipes = {path.name: path.read_text() for path in sorted(Path(config.recipes).glob("*.yaml"))}
    claim(config.output, settings | recipes)


def run(config: DemoConfig) -> dict:
    """
    The whole demonstration.

    Args:
        config: Settings.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: if the output folder holds a run with other settings.
    """
    output = Path(config.output)
    claim_folder(config)
    demo = Demo(config)
    spent = demo.run_stages(demo.stages(), output / "done")
    results = json.loads((output / "evaluation" / "results.json").read_text())
    results["peak memory (GiB)"] = max(stage.pop("memory") for stage in spent.values())
    results["seconds"] = spent | {
        "all": {kind: round(sum(stage[kind] for stage in spent.values()), 1) for kind in ("wall", "cpu")}
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    demo.report()
    return results


def show_results(config: DemoConfig) -> int:
    """Runs the demonstration and prints what came out."""
    results = run(config)
    columns = ("cider_d", "rouge_l", "bleu_4", "recall", "precision")
    print(table({name: {c: scores[c] for c in columns} for name, scores in results["variants"].items()}))
    for figure in results["must_hold"]:
        sign = "ok    " if figure["met"] else "MISSED"
        print(f"{sign} {figure['what']}: {figure['value']:.3f} (bound {figure['bound']})")
    spent = results["seconds"]["all"]
    print(f"\n{spent['wall']:.0f} s, of processor time {spent['cpu']:.0f} s. Report: {config.output}/report.html")
    print(f"Try: dali caption {config.output}/samples/*.wav --model {config.output}/model")

    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs as the command line says."""
    return run_recipe(DemoConfig, show_results, arguments)


if __name__ == "__main__":
    sys.exit(main())
