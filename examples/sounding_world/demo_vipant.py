"""VIP-ANT in miniature: sound is named and found by text, though no sound ever met a text.

    python -m examples.sounding_world.demo_vipant [--output runs/demo-vipant] [--setting value ...]

On the sounding world (`datasets_scripts.sounding_world`), from nothing, on two CPU cores:

1. a small CLIP learns from pictures with captions;
2. VA pre-training: an audio tower that starts from its image tower learns from videos without text;
3. zero-shot classification and text-to-sound retrieval on the test split;
4. the upper bound: the same model fine-tuned on sounds with captions (AT fine-tuning).

Writes `clip`, `va` and `at` (the last two are models for `vipant --model`), `results.json` and `report.md`. A second
run takes up what is there: stages that are done, and the last checkpoint of the one that was cut off. (The tokenizer's
training breaks ties by chance, so that runs differ a little.)
"""

import json
import string
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.hf_argparser import HfArg

from datasets_scripts.files import claim
from datasets_scripts.sounding_world import SOUNDING, sounding_world
from examples.sounding_world.runner import Runner
from modeling_vipant import VipAntModel, VipAntProcessor, vipant_feature_extractor
from trainers.progress import Stage
from trainers.recipes import run_recipe
from trainers.vipant.contrastive import ContrastiveConfig, ContrastiveTrainer
from trainers.vipant.evaluate import evaluate_classification, evaluate_retrieval

IMAGE_SIZE, PATCH, NUM_FRAMES = 64, 16, 256
MASKS = {"frequency_mask": 16, "time_mask": 48}
PROMPTS = ("the sound of {}", "the sound of a {}", "one can hear a {}", "a {} can be heard")


@dataclass
class VipAntDemoConfig:
    """Settings of the demonstration."""

    output: str = HfArg(default="runs/demo-vipant", help="Folder of everything it makes.")
    seed: int = HfArg(default=0, help="Seed of the world, the weights and the order of the data.")
    captions: int = HfArg(default=8000, help="Pictures with captions, for the CLIP.")
    video: int = HfArg(default=3000, help="Videos for VA pre-training.")
    supervised: int = HfArg(default=3000, help="Sounds with captions, for AT fine-tuning.")
    test: int = HfArg(default=300, help="Rows of the test split.")
    clip_steps: int = HfArg(default=700, help="Training steps of the CLIP.")
    va_steps: int = HfArg(default=500, help="Steps of VA pre-training.")
    at_steps: int = HfArg(default=200, help="Steps of AT fine-tuning.")


def new_processor(captions: list[str]) -> VipAntProcessor:
    """A processor whose tokenizer is trained on the captions."""
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    blank = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=32)
    # Every letter, inside and at the end of a word, so that words of other people can be spelt.
    alphabet = [f"{letter}{letter}" for letter in string.ascii_lowercase + string.digits]
    tokenizer = blank.train_new_from_iterator([captions, alphabet], vocab_size=600, show_progress=False)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return VipAntProcessor(
        vipant_feature_extractor(sampling_rate=16_000, num_frames=NUM_FRAMES),
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small untrained CLIP."""
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        projection_dim=64,
    )
    return CLIPModel(config)


def audio_model(clip: CLIPModel) -> VipAntModel:
    """VIP-ANT from the small CLIP, with 16 x 8 patches."""
    return VipAntModel.from_clip(clip, num_frames=NUM_FRAMES, patch_stride=(PATCH, PATCH))


class VipAntDemo(Runner):
    """
    The stages, each from folder to folder.

    Args:
        config (`VipAntDemoConfig`): Settings.
    """

    def __init__(self, config: VipAntDemoConfig):
        super().__init__(
            f"python -m examples.sounding_world.demo_vipant --output {config.output} --seed {config.seed}"
        )
        self.config, self.output = config, Path(config.output)

    def rows(self, split: str) -> datasets.Dataset:
        """A split of this run's world."""
        size, seed = getattr(self.config, split), self.config.seed
        return sounding_world(split, size, seed, image_size=IMAGE_SIZE, cache_dir=self.output / "data")

    def processor(self) -> VipAntProcessor:
        """The processor of all models."""
        return VipAntProcessor.from_pretrained(self.output / "processor")

    def clip(self) -> CLIPModel:
        """The trained CLIP."""
        clip = new_clip(self.processor().tokenizer)
        state = VipAntModel.from_pretrained(self.output / "clip").state_dict()
        clip.load_state_dict({name: state[name] for name in clip.state_dict()})
        return clip

    def contrast(self, model: VipAntModel, split: str, folder: str, steps: int, **settings) -> None:
        """Trains a model by contrast on a split."""
        config = ContrastiveConfig(
            output_dir=str(self.output / folder),
            max_steps=steps,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_steps=250,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            seed=self.config.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            weight_decay=0.01,
            cache_features=True,
            **settings,
        )
        self.train(ContrastiveTrainer(model, config, self.processor(), self.rows(split)))

    def world(self) -> None:
        """Makes all splits, and a tokenizer of their words; trained again, it might have other merges."""
        for split in ("captions", "video", "supervised", "test"):
            self.rows(split)
        new_processor([caption for row in self.rows("captions")["captions"] for caption in row]).save_pretrained(
            self.output / "processor"
        )

    def train_clip(self) -> None:
        """A small CLIP learns from pictures with captions; its audio tower stays untrained."""
        torch.manual_seed(self.config.seed)
        model = audio_model(new_clip(self.processor().tokenizer))
        batch = {"per_device_train_batch_size": 128, "learning_rate": 1e-3, "frequency_mask": 0, "time_mask": 0}
        towers = {"pairs": ["image-text"], "train_towers": ["image", "text"]}
        self.contrast(model, "captions", "clip", self.config.clip_steps, **batch, **towers)

    def pretrain(self) -> None:
        """VA pre-training: an audio tower that starts from the image tower."""
        settings = MASKS | {"per_device_train_batch_size": 64, "learning_rate": 1e-3}
        self.contrast(audio_model(self.clip()), "video", "va", self.config.va_steps, **settings)

    def fine_tune(self) -> None:
        """AT fine-tuning, the upper bound."""
        settings = MASKS | {"per_device_train_batch_size": 64, "learning_rate": 5e-4, "pairs": ["audio-text"]}
        model = VipAntModel.from_pretrained(self.output / "va")
        self.contrast(model, "supervised", "at", self.config.at_steps, **settings)

    def evaluation(self) -> None:
        """Scores of all stages."""
        torch.manual_seed(self.config.seed)
        models = {
            "untrained audio tower": audio_model(self.clip()),
            "VA pre-training (no audio-text pair)": VipAntModel.from_pretrained(self.output / "va"),
            "AT fine-tuning (upper bound)": VipAntModel.from_pretrained(self.output / "at"),
        }
        test = self.rows("test")
        scores = {name: evaluate(model, self.processor(), test) for name, model in models.items()}
        (self.output / "scores.json").write_text(json.dumps(scores, indent=1))

    def stages(self) -> list[Stage]:
        """All stages, with about the seconds that they take on two cores."""
        return [
            self.stage("world", 30, self.world),
            self.stage("clip", 130, self.train_clip),
            self.stage("va", 160, self.pretrain),
            self.stage("at", 60, self.fine_tune),
            self.stage("evaluation", 15, self.evaluation),
        ]


def evaluate(model: VipAntModel, processor: VipAntProcessor, test: datasets.Dataset) -> dict[str, float]:
    """Zero-shot classification of single things, and retrieval between sounds and their captions.

    Args:
        model: The model.
        processor: Its processor.
        test: The test split.

    Returns:
        `accuracy` over clips of which one thing (and not the wind) is heard, `clips` their number, `chance`, and the
        metrics of `audio_text_retrieval_metrics` over all clips and five captions each.
    """
    model.eval()
    names = [thing.name for thing in SOUNDING]
    single = test.filter(lambda labels: len(labels) == 1 and labels[0] in names, input_columns="labels")
    classification = evaluate_classification(model, processor, single, PROMPTS, names)["ensemble"]
    return {
        "accuracy": classification["accuracy"],
        "clips": len(single),
        "chance": 1 / len(names),
        **evaluate_retrieval(model, processor, test),
    }


def run(config: VipAntDemoConfig) -> dict:
    """
    The whole demonstration.

    Args:
        config (`VipAntDemoConfig`): Settings.

    Returns:
        `dict`: what `results.json` holds.

    Raises:
        ValueError: if the output folder holds a run with other settings.
    """
    demo = VipAntDemo(config)
    claim(config.output, {name: value for name, value in asdict(config).items() if name != "output"})
    seconds = demo.run_stages(demo.stages(), demo.output / "done")
    results = json.loads((demo.output / "scores.json").read_text()) | {"seconds": seconds}
    (demo.output / "results.json").write_text(json.dumps(results, indent=2))
    (demo.output / "report.md").write_text(report(results))
    return results


def report(results: dict) -> str:
    """The results as a Markdown table."""
    rows = [name for name in results if name != "seconds"]
    columns = {
        "accuracy": "zero-shot accuracy",
        "text_to_audio_r@1": "text→sound R@1",
        "text_to_audio_r@10": "R@10",
        "text_to_audio_median_rank": "median rank",
        "audio_to_text_r@1": "sound→text R@1",
    }
    lines = [f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{results[name][key]:.3g}" for key in columns) + " |" for name in rows]
    first = results[rows[0]]
    seconds = ", ".join(
        f"{name} {taken['wall']:.0f} s ({taken['cpu']:.0f} s CPU)" for name, taken in results["seconds"].items()
    )
    return (
        "# VIP-ANT on the sounding world\n\n" + "\n".join(lines) + "\n\n"
        f"Accuracy over {first['clips']} clips of one thing, chance {first['chance']:.3f}. Retrieval is over all "
        f"clips of the test split, five captions each, many of which say the same.\n\nTraining: {seconds}.\n"
    )


def show_report(config: VipAntDemoConfig) -> int:
    """Runs the demonstration and prints its report."""
    print(report(run(config)))
    print(f"Try: vipant classify SOUND.wav --labels bell,dog,rain --model {config.output}/va")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs as the command line says."""
    return run_recipe(VipAntDemoConfig, show_report, arguments)


if __name__ == "__main__":
    sys.exit(main())
