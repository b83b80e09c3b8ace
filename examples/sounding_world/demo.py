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

import io
import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import psutil
import soundfile
import torch
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration, PrinterCallback, TrainerCallback
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from datasets_scripts.sounding_world import SYNONYMS, sounding_world, vocabulary
from examples.sounding_world.captioner import CaptionerConfig, CaptionerTrainer, new_captioner, texts_of
from examples.sounding_world.report import write_report
from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, DaliProcessor, KaldiFbankFeatureExtractor
from modeling_dali.explain import explain, find_scorers
from trainers.dali.alignment import LOSSES, AlignmentConfig, AlignmentTrainer
from trainers.dali.data_collator import Modality
from trainers.dali.distillation import DistillationConfig, DistillationTrainer, join_captions
from trainers.dali.evaluate import EvaluationConfig, predict, score, table, write
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer
from trainers.dali.pseudo_captions import PseudoCaptionConfig, write_pseudo_captions
from trainers.processes import run_in_processes
from trainers.recipes import load_model, parse_recipe, run_recipe
from trainers.rows import read_audio, read_image, without_decoding

RECIPES = Path(__file__).resolve().parent / "recipes"
TEST_VARIANTS = ("standard", "unseen_combinations", "unseen_timbres", "loud_noise", "three")
VIDEO_RATE = 10  # frames per second of the samples


@dataclass
class DemoConfig:
    """Settings of the demonstration."""

    output: str = HfArg(default="runs/demo", help="Folder of everything it makes.")
    recipes: str = HfArg(default=str(RECIPES), help="Folder of the stages' recipes.")
    seed: int = HfArg(default=0, help="Of the world, the weights and the order of the data.")
    processes: int = HfArg(
        default=2, help="That make the world, and share the training of the audio encoder where there is no GPU."
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


# ---------------------------------------------------------------------------------------------------------------------
# Progress and stages that are done


class Progress:
    """
    One bar for the whole: stage, time left, loss.

    Args:
        weights: Stages that are still to do, and about how long each takes.
    """

    def __init__(self, weights: dict[str, float]):
        self.weights, self.before, self.stage, self.loss = weights, 0.0, "", ""
        layout = "{desc:<16}{percentage:4.0f}% |{bar:30}| {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=sum(weights.values()), bar_format=layout, smoothing=0)

    def start(self, stage: str) -> None:
        """The next stage begins."""
        self.stage, self.loss = stage, ""
        self.bar.set_description_str(stage)
        self.done(0)

    def done(self, share: float) -> None:
        """So much of the stage, between 0 and 1, is done."""
        self.bar.n = self.before + share * self.weights[self.stage]
        self.bar.set_postfix_str(self.loss)

    def finish(self) -> None:
        """The stage is over."""
        self.before += self.weights[self.stage]


class Relay:
    """
    Stands in for the bar in another process.

    Args:
        report: Sends share and loss to the process that has the bar.
    """

    def __init__(self, report: Callable[[float, str], None]):
        self.report, self.loss = report, ""

    def done(self, share: float) -> None:
        """So much of the stage, between 0 and 1, is done."""
        self.report(share, self.loss)


class _ShowProgress(TrainerCallback):
    """Tells the bar of a trainer's steps and loss."""

    def __init__(self, progress: Progress | Relay | None):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.done(state.global_step / state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is not None and "loss" in (logs or {}):
            self.progress.loss = f"loss {float(logs['loss']):.3g}"


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def peak_memory() -> float:
    """GiB that this process alone had in use at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_in_use() -> float:
    """GiB of this process and its children, what they share counted once where the system tells (Linux)."""
    own = psutil.Process()
    found = [process.memory_full_info() for process in (own, *own.children(recursive=True))]
    return sum(getattr(info, "pss", info.rss) for info in found) / 2**30


@dataclass(frozen=True)
class Stage:
    """
    A step of the demonstration.

    Attributes:
        name: As the bar shows it.
        seconds: About how long it takes, compared with the others.
        run: Does it.
    """

    name: str
    seconds: float
    run: Callable[[], None]


# ---------------------------------------------------------------------------------------------------------------------
# The stages


class Demo:
    """
    The stages, each from folder to folder.

    Args:
        config: Settings.
    """

    def __init__(self, config: DemoConfig):
        self.config, self.output = config, Path(config.output)
        self.progress: Progress | Relay | None = None
        self.shared_memory = 0.0  # GiB in use while several processes trained
        datasets.disable_progress_bars()  # one bar is enough
        logging.disable_progress_bar()

    def run_stages(self, stages: Sequence[Stage], folder: Path) -> dict[str, dict]:
        """
        Runs the stages that are not done.

        Args:
            stages: All, in order.
            folder: Where it is noted which are done.

        Returns:
            What each stage took, those done before among them: `wall` and `cpu` seconds, `memory` in GiB (the most in
            use up to its end).
        """
        notes = {stage.name: folder / f"{stage.name.replace(' ', '_')}.json" for stage in stages}
        pending = [stage for stage in stages if not notes[stage.name].exists()]
        for stage in stages:
            if stage not in pending:
                print(f"{stage.name}: done before, taken from {folder.parent}")
        folder.mkdir(parents=True, exist_ok=True)
        self.progress = progress = Progress({stage.name: stage.seconds for stage in pending})
        with logging_redirect_tqdm():  # warnings above the bar, not through it
            for stage in pending:
                progress.start(stage.name)
                wall, cpu = time.perf_counter(), cpu_seconds()
                stage.run()
                progress.finish()
                spent = {
                    "wall": round(time.perf_counter() - wall, 1),
                    "cpu": round(cpu_seconds() - cpu, 1),
                    "memory": round(max(peak_memory(), self.shared_memory), 2),
                }
                notes[stage.name].write_text(json.dumps(spent))
        progress.bar.n = progress.bar.total
        progress.bar.close()
        return {stage.name: json.loads(notes[stage.name].read_text()) for stage in stages}

    def settings(self, kind: type, recipe: str, folder: str, **paths) -> Any:
        """The settings of a stage: its recipe, with this run's folders and seed."""
        kind_of_output = "output" if kind is PseudoCaptionConfig else "output_dir"
        given = {kind_of_output: str(self.output / folder), "seed": self.config.seed, **paths}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        if kind is not PseudoCaptionConfig:
            arguments += ["--disable_tqdm", "true"]
        return parse_recipe(kind, [str(Path(self.config.recipes) / f"{recipe}.yaml"), *arguments])

    def show(self, share: float, loss: str) -> None:
        """Shows on the bar what another process tells."""
        if self.progress is not None:
            self.progress.loss = loss
            self.progress.done(share)
        if share == 1:  # the last step: what they keep is all there
            self.shared_memory = max(self.shared_memory, memory_in_use())

    def train(self, trainer) -> None:
        """Runs a trainer with the bar in place of its own output."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ShowProgress(self.progress))
        trainer.run(
            f"python -m examples.sounding_world.demo --output {self.output} --seed {self.config.seed}",
            "the sounding world",
        )

    def rows(self, split: str, variant: str = "standard") -> datasets.Dataset:
        """A split of this run's world."""
        return datasets.load_from_disk(str(self.output / "world" / (split if variant == "standard" else variant)))

    def model(self, folder: str, prefix: bool = False) -> tuple[DaliForConditionalGeneration, DaliProcessor]:
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
        """Trains the LLaVA, and gives it an untrained ear: `untrained`."""
        config = self.settings(CaptionerConfig, "captioner", "captioner", image_size=self.config.image_size)
        rows = self.rows("captions")
        model, processor = new_captioner(config, [*texts_of(rows), *vocabulary()])
        self.train(CaptionerTrainer(model, config, processor, rows))
        self.listener(self.config.seed, "untrained")

    def listener(self, seed: int, folder: str) -> None:
        """A DALI model out of the captioner, with an audio encoder of random weights."""
        config, source = self.config, self.output / "captioner"
        torch.manual_seed(seed)
        num_frames = round(100 * config.duration)
        extractor = KaldiFbankFeatureExtractor(feature_size=config.num_mel_bins, num_frames=num_frames)
        audio = DaliAudioConfig(
            num_frames=extractor.num_frames,
            num_mel_bins=config.num_mel_bins,
            patch_size=config.audio_patch_size,
            hidden_size=config.audio_width,
            intermediate_size=4 * config.audio_width,
            num_hidden_layers=config.audio_layers,
            num_attention_heads=config.audio_heads,
            initializer_range=config.audio_width**-0.5,
        )
        llava = LlavaForConditionalGeneration.from_pretrained(source)
        llava_processor = AutoProcessor.from_pretrained(source)
        model = DaliForConditionalGeneration.from_llava(llava, audio_config=audio, tokenizer=llava_processor.tokenizer)
        model.config.base_model = None  # a folder of this machine
        model.generation_config.max_new_tokens = 32
        processor = DaliProcessor.for_model(
            model.config,
            llava_processor.image_processor,
            llava_processor.tokenizer,
            extractor,
            llava_processor.chat_template,
        )
        model.save_pretrained(self.output / folder)
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

    # Evaluation -----------------------------------------------------------------------------------------------------

    def scores(
        self, folder: str, modality: Modality = "audio", prefix: bool = False, variant: str = "standard"
    ) -> dict:
        """Captions a test split with a model, writes the predictions, and scores them."""
        model, processor = self.model(folder, prefix)
        target = self.output / "evaluation" / f"{folder}-{modality}-{variant}".replace("/", "-")
        config = EvaluationConfig(
            model=str(self.output / folder),
            dataset=str(self.output / "world" / variant),
            modality=modality,
            output=str(target),
            batch_size=100,
            max_new_tokens=24,
            synonyms=str(self.output / "world" / "synonyms.json"),
        )
        rows = self.rows("test", variant)
        captions, skipped = predict(model, processor, rows, config)
        summary, clips = score(captions, rows, synonyms=SYNONYMS)
        write(target, summary, clips, skipped, asdict(config))
        return summary

    def most_frequent_caption(self) -> dict:
        """Scores of the one caption that is most often right, whatever is heard."""
        rows = self.rows("captions")
        heard = [
            captions
            for question, captions in zip(rows["question"], rows["captions"], strict=True)
            if "hear" in question or "sound" in question
        ]
        ((caption, _),) = Counter(text for captions in heard for text in captions).most_common(1)
        test = self.rows("test")
        summary, clips = score(dict.fromkeys(test["id"], caption), test, synonyms=SYNONYMS)
        write(self.output / "evaluation" / "most_frequent", summary, clips, [], {"caption": caption})
        return summary | {"caption": caption}

    def image_captions(self, folder: str) -> tuple[list[str], torch.Tensor]:
        """Captions of the test pictures without a prefix, and the logits of the first of them."""
        model, processor = self.model(folder)
        model.remove_prefix()
        processor.follow(model.config)
        rows = self.rows("test").select_columns(["id", "image"])
        captions, _ = predict(model, processor, rows, EvaluationConfig(modality="image", batch_size=100))
        inputs = processor(text=processor.caption_prompt("image"), images=[rows[0]["image"]], return_tensors="pt")
        with torch.no_grad():
            return list(captions.values()), model(**inputs).logits

    def where_the_sound_is(self, folder: str) -> dict[str, dict[str, float | None]]:
        """
        How sounding things stand out in pictures that show a silent thing too.

        Returns:
            For learned weights, weights by nearest tokens (both relative to the mean of their picture), and what the
            sound brings beyond silence: the areas under the ROC curve of tokens on sounding things against those on
            `silent` ones and against the `background` (see [`values_by_kind`]), and how often the `strongest` token of
            a picture is on a sounding thing. None where no picture tells.
        """
        model, processor = self.model(folder)
        rate, scorers = processor.feature_extractor.sampling_rate, find_scorers(self.output / folder)
        ways = {"nearest": None} if scorers is None else {"nearest": None, "learned": scorers}
        found: dict[str, dict[str, list]] = {}
        for row in without_decoding(self.rows("test")):
            if {thing["sounds"] for thing in row["things"]} != {True, False}:
                continue
            samples, picture = read_audio(row["audio"], rate), read_image(row["image"])
            explained = {name: explain(model, processor, samples, picture, way) for name, way in ways.items()}
            maps = {name: each.image_weights / each.image_weights.mean() for name, each in explained.items()}
            maps["beyond silence"] = explained["nearest"].where
            for name, values in maps.items():
                kinds = found.setdefault(name, {"sounding": [], "silent": [], "background": [], "strongest": []})
                here = values_by_kind(values, row["things"])
                for kind, those in here.items():
                    kinds[kind] += those
                kinds["strongest"].append(values.max() in here["sounding"])
        return {
            name: {kind: area_under_roc(kinds["sounding"], kinds[kind]) for kind in ("silent", "background")}
            | {"strongest": float(np.mean(kinds["strongest"]))}
            for name, kinds in found.items()
        }

    def evaluation(self) -> None:
        """Scores of all stages, and what must hold."""
        jobs: dict[str, tuple] = {
            "before alignment": ("untrained", "audio", True),
            "before stage 1b": ("pretrained", "audio", True),
            "after stage 1b": ("aligned", "audio", True),
            "after stage 1b, audio + image": ("aligned", "audio_image", True),
            "after stage 1b, image": ("aligned", "image", True),
            "after distillation": ("model", "audio", False),
            "after distillation, audio + image": ("model", "audio_image", True),  # for the picture's sake
            "supervised twin": ("supervised", "audio", False),
        }
        jobs |= {f"after distillation, {v.replace('_', ' ')}": ("model", "audio", False, v) for v in TEST_VARIANTS[1:]}
        variants = {"most frequent caption": self.most_frequent_caption()}
        for number, (name, job) in enumerate(jobs.items()):
            variants[name] = self.scores(*job)
            if self.progress is not None:
                self.progress.done((number + 1) / len(jobs))
        before, after = self.image_captions("untrained"), self.image_captions("model")
        same = before[0] == after[0] and torch.equal(before[1], after[1])
        where = self.where_the_sound_is("model")
        area = where.get("learned", {}).get("silent")
        results = {"variants": variants, "must_hold": must_hold(variants, same, area), "where the sound is": where}
        (self.output / "evaluation" / "results.json").write_text(json.dumps(results, indent=1))

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
            Stage("world", 25, self.world),
            Stage("captioner", 205, self.captioner),
            Stage("prefix tuning", 10, self.prefix_tuning),
            Stage("audio pretraining", 80, self.audio_pretraining),
            Stage("alignment", 160, self.alignment),
            Stage("pseudo-captions", 5, self.pseudo_captions),
            Stage("distillation", 25, self.distillation),
            Stage("supervised twin", 30, self.supervised),
            Stage("evaluation", 15, self.evaluation),
        ]


def _train_audio_encoder(
    config: DemoConfig, recipe: str, start: str, folder: str, settings: dict, report: Callable
) -> None:
    demo = Demo(config)
    demo.progress = Relay(report)
    demo.train_audio_encoder(recipe, start, folder, settings)


def must_hold(variants: dict[str, dict], image_captions_same: bool, area: float | None) -> list[dict]:
    """
    The figures that the method is held against.

    Args:
        variants: Scores by name.
        image_captions_same: Whether image captions are those of before all stages.
        area: Under the ROC curve of the weights of image tokens; None counts as missed.

    Returns:
        For each `what`, `value`, `bound` and whether it is `met`.
    """
    final, twin = variants["after distillation"], variants["supervised twin"]

    def share(score: str) -> float:
        return final[score] / twin[score] if twin[score] else 0.0  # a twin that learned nothing proves nothing

    floor = max(variants[name]["recall"] for name in ("before alignment", "most frequent caption"))
    figures = [
        ("recall of things heard, audio only", final["recall"], 0.8),
        ("its share of the supervised twin's", share("recall"), 0.8),
        ("CIDEr-D's share of the supervised twin's", share("cider_d"), 0.8),
        ("recall, unseen combinations", variants["after distillation, unseen combinations"]["recall"], 0.7),
        ("recall above that of an untrained ear and of the most frequent caption", final["recall"] - floor, 0.4),
        *(
            (
                f"recall of audio + image above audio alone, {stage}",
                variants[f"{stage}, audio + image"]["recall"] - variants[stage]["recall"],
                0.0,
            )
            for stage in ("after stage 1b", "after distillation")
        ),
        ("image captions the same before and after all stages", float(image_captions_same), 1.0),
        ("area under ROC: weights on sounding things against silent ones", area or 0.0, 0.7),
    ]
    return [
        {"what": what, "value": value, "bound": bound, "met": bool(value >= bound)} for what, value, bound in figures
    ]


def values_by_kind(values: np.ndarray, things: list[dict]) -> dict[str, list[float]]:
    """
    Values of the image tokens on things that sound, of those on silent ones, and of the others.

    Args:
        values: [rows, columns] of the tokens of a picture.
        things: With `mask`, a grey picture of where the thing is, and `sounds`.

    Returns:
        `sounding` and `silent`: values of the tokens of whose patch that kind of things, and not the other too, covers
        at least half. `background`: of those of which neither does.
    """
    rows, columns = values.shape
    covered = {sounds: np.zeros(values.shape) for sounds in (True, False)}
    for thing in things:
        mask = read_image(thing["mask"]).getchannel(0).resize((columns, rows), Image.Resampling.BOX)
        covered[thing["sounds"]] += np.asarray(mask) / 255
    sounding, silent = covered[True] >= 0.5, covered[False] >= 0.5
    kinds = {"sounding": sounding & ~silent, "silent": silent & ~sounding, "background": ~sounding & ~silent}
    return {kind: values[on].tolist() for kind, on in kinds.items()}


def area_under_roc(positive: list[float], negative: list[float]) -> float | None:
    """Probability that a positive value is larger than a negative one; ties count half. None if there are none."""
    if not positive or not negative:
        return None
    ordered = np.sort(negative)
    below, upto = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negative))


# ---------------------------------------------------------------------------------------------------------------------
# Samples, and the whole


def write_samples(rows: datasets.Dataset, folder: Path, count: int = 4) -> None:
    """
    Sounds (`.wav`) and videos with sound (`.mp4`) of a split with `audio` and `image`, to try the model on.

    Args:
        rows: The split.
        folder: Where to.
        count: How many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows.select(range(min(count, len(rows)))):
        sound = row["audio"]["bytes"]
        (folder / f"{row['id']}.wav").write_bytes(sound)
        write_video(folder / f"{row['id']}.mp4", sound, row["image"])


def write_video(path: Path, wav: bytes, picture: Image.Image) -> None:
    """A video that shows one picture for as long as the sound takes."""
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=VIDEO_RATE)
        video.width, video.height = picture.size
        video.pix_fmt, video.bit_rate = "yuv420p", 1_000_000
        audio = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.VideoFrame.from_image(picture)
        for index in range(round(VIDEO_RATE * len(samples) / rate)):
            frame.pts = index
            container.mux(video.encode(frame))
        sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = rate, 0  # without a start, AAC's first frame, which is lead-in, would be sound
        for stream, last in ((audio, sound), (audio, None), (video, None)):
            container.mux(stream.encode(last))


def claim(output: Path, config: DemoConfig) -> None:
    """
    Notes the settings of a run, or compares them with those of the run that is there.

    Raises:
        ValueError: if the folder holds a run with other settings or recipes.
    """
    recipes = {path.name: path.read_text() for path in sorted(Path(config.recipes).glob("*.yaml"))}
    settings = asdict(replace(config, output="", recipes="")) | {"recipe files": recipes}
    output.mkdir(parents=True, exist_ok=True)
    note = output / "settings.json"
    if note.exists():
        found = json.loads(note.read_text())
        if different := sorted(name for name in settings | found if settings.get(name) != found.get(name)):
            raise ValueError(
                f"{output} holds a run with other {', '.join(different)}: choose another --output, or delete it."
            )
    note.write_text(json.dumps(settings, indent=1))


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
    claim(output, config)
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
