"""VIP-ANT in miniature: sound is named and found by text, though no sound ever met a text.

    python -m examples.sounding_world.demo_vipant [--output runs/demo-vipant]

On the sounding world (`datasets_scripts.sounding_world`), from nothing, on two CPU cores:

1. a small CLIP learns from pictures with captions;
2. VA pre-training: an audio tower that starts from its image tower learns from videos without text;
3. zero-shot classification and text-to-sound retrieval on the test split;
4. the upper bound: the same model fine-tuned on sounds with captions (AT fine-tuning).

Writes `clip`, `va` and `at` (the last two are models for `vipant --model`), `results.json` and `report.md`. A second
run takes up the models that are there. (The tokenizer's training breaks ties by chance, so that runs differ a little.)
"""

import argparse
import json
import string
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from datasets_scripts.sounding_world import SOUNDING, sounding_world
from modeling_vipant import VipAntModel, VipAntProcessor, vipant_feature_extractor
from trainers.rows import read_audio, read_image
from trainers.vipant.contrastive import ContrastiveConfig, ContrastiveTrainer
from trainers.vipant.dataset import pick, spec_augment, stack
from trainers.vipant.evaluate import evaluate_classification, evaluate_retrieval

IMAGE_SIZE, PATCH, NUM_FRAMES = 64, 16, 256
SIZES = {"captions": 8000, "video": 3000, "supervised": 3000, "test": 300}
STEPS = {"clip": 700, "va": 500, "at": 200}
PROMPTS = ("the sound of {}", "the sound of a {}", "one can hear a {}", "a {} can be heard")


class InMemory(torch.utils.data.Dataset):
    """A split whose sounds and pictures are turned into tensors once; frames, captions and masks are drawn anew.

    Args:
        rows: The split.
        processor: The model's processor.
        masks: Widest frequency mask (bins) and time mask (frames); None outside training.
    """

    def __init__(self, rows: datasets.Dataset, processor: VipAntProcessor, masks: tuple[int, int] | None):
        self.masks, self.processor = masks, processor
        self.examples = []
        captions = "captions" in rows.column_names
        for row in tqdm(rows, desc="reading", leave=False):
            example = {}
            if "audio" in row:
                rate = processor.feature_extractor.sampling_rate
                samples = read_audio(row["audio"], rate)
                features = processor.feature_extractor([samples], sampling_rate=rate, return_tensors="pt")
                example["input_features"] = features["input_features"][0].half()
            if "frames" in row or "image" in row:
                images = [read_image(image) for image in row.get("frames") or [row["image"]]]
                pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
                example["pixel_values"] = pixels.half()
            if captions:
                example["input_ids"] = processor.tokenizer(row["captions"])["input_ids"]
            self.examples.append(example)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example, training = dict(self.examples[index]), self.masks is not None
        if "input_features" in example:
            features = example["input_features"].float()
            example["input_features"] = features if self.masks is None else spec_augment(features, *self.masks)
        if "pixel_values" in example:
            example["pixel_values"] = pick(example["pixel_values"], training).float()
        if "input_ids" in example:
            example["input_ids"] = torch.tensor(pick(example["input_ids"], training))
        return example

    def collate(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch as the model takes it."""
        return stack(examples, self.processor.tokenizer)


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


def train(model: VipAntModel, rows: InMemory, output: Path, steps: int, seed: int, **settings) -> None:
    """Trains for a number of steps; the objective is `ContrastiveTrainer`'s."""
    config = ContrastiveConfig(
        output_dir=str(output / "logs"),
        max_steps=steps,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        weight_decay=0.01,
        **settings,
    )
    ContrastiveTrainer(model, config, train_dataset=rows, data_collator=rows.collate).train()


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


def stage(folder: Path, load: Callable[[], PreTrainedModel], make: Callable[[], PreTrainedModel]) -> tuple:
    """The model of a stage, from disk if it is there; with the seconds of wall clock and of CPU it took to make."""
    record = folder / "seconds.json"
    if record.exists():
        print(f"{folder.name}: taken from {folder}")
        return load(), json.loads(record.read_text())
    wall, cpu = time.perf_counter(), time.process_time()
    print(f"{folder.name}: training")
    model = make()
    model.save_pretrained(folder)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    record.write_text(json.dumps(seconds))
    return model, seconds


def run(output: Path, sizes: dict[str, int] = SIZES, steps: dict[str, int] = STEPS, seed: int = 0) -> dict:
    """The whole demonstration.

    Args:
        output: Folder of models and results.
        sizes: Rows of each split.
        steps: Training steps of each stage.
        seed: Of the world, the weights and the order.

    Returns:
        What `results.json` holds.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"sizes": sizes, "steps": steps, "seed": seed}, sort_keys=True)
    note = output / "settings.json"
    if note.exists() and note.read_text() != settings:
        raise ValueError(f"{output} holds a run with other settings: choose another --output, or delete it")
    note.write_text(settings)
    torch.manual_seed(seed)
    world = {
        split: sounding_world(split, size, seed, image_size=IMAGE_SIZE, cache_dir=output / "data")
        for split, size in sizes.items()
    }
    if (output / "processor").exists():  # a tokenizer trained again may have other merges
        processor = VipAntProcessor.from_pretrained(output / "processor")
    else:
        processor = new_processor([caption for row in world["captions"]["captions"] for caption in row])
        processor.save_pretrained(output / "processor")
    clip = new_clip(processor.tokenizer)

    def train_clip() -> CLIPModel:
        rows = InMemory(world["captions"].select_columns(["image", "captions"]), processor, masks=(0, 0))
        model = audio_model(clip)
        train(
            model,
            rows,
            output / "clip",
            steps["clip"],
            seed,
            pairs=["image-text"],
            train_towers=["image", "text"],
            per_device_train_batch_size=128,
            learning_rate=1e-3,
        )
        clip.load_state_dict({name: model.state_dict()[name] for name in clip.state_dict()})
        return clip

    def train_va() -> VipAntModel:
        rows = InMemory(world["video"], processor, masks=(16, 48))
        model = audio_model(clip)
        train(model, rows, output / "va", steps["va"], seed, per_device_train_batch_size=64, learning_rate=1e-3)
        return model

    def train_at() -> VipAntModel:
        rows = InMemory(world["supervised"], processor, masks=(16, 48))
        model = VipAntModel.from_pretrained(output / "va")
        train(
            model,
            rows,
            output / "at",
            steps["at"],
            seed,
            pairs=["audio-text"],
            per_device_train_batch_size=64,
            learning_rate=5e-4,
        )
        return model

    clip, clip_seconds = stage(output / "clip", lambda: CLIPModel.from_pretrained(output / "clip"), train_clip)
    untrained = evaluate(audio_model(clip), processor, world["test"])
    va, va_seconds = stage(output / "va", lambda: VipAntModel.from_pretrained(output / "va"), train_va)
    at, at_seconds = stage(output / "at", lambda: VipAntModel.from_pretrained(output / "at"), train_at)
    for folder in ("va", "at"):
        processor.save_pretrained(output / folder)
    results = {
        "untrained audio tower": untrained,
        "VA pre-training (no audio-text pair)": evaluate(va, processor, world["test"]),
        "AT fine-tuning (upper bound)": evaluate(at, processor, world["test"]),
        "seconds": {"clip": clip_seconds, "va": va_seconds, "at": at_seconds},
    }
    (output / "results.json").write_text(json.dumps(results, indent=2))
    (output / "report.md").write_text(report(results))
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


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-vipant"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print(report(run(args.output, seed=args.seed)))
    print(f"Try: vipant classify SOUND.wav --labels bell,dog,rain --model {args.output / 'va'}")


if __name__ == "__main__":
    main()
