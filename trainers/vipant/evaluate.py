"""Retrieval and zero-shot classification of VIP-ANT on a data set.

    python -m trainers.vipant.evaluate retrieval --model runs/va --dataset clotho --num_frames 1800
    python -m trainers.vipant.evaluate classification --model runs/va --dataset esc50 --output runs/va-esc50.json

Retrieval needs the columns `audio` and `caption` or `captions`; classification `audio`, `labels` and, for a mean over
folds, `fold`. Classification is scored with each prompt alone and with all together, where the prompt that is nearest
to a sound decides. Prompts of a class's own come from `--class_prompts` (JSON: label to its texts).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets_scripts.commands import run_command
from datasets_scripts.files import write_whole
from modeling_vipant import VipAntModel, VipAntProcessor
from trainers.metrics.classification import class_prompts, classification_metrics, zero_shot_scores
from trainers.metrics.retrieval import audio_text_retrieval_metrics
from trainers.recipes import load_rows
from trainers.rows import Rows, require_columns
from trainers.vipant.data_collator import ClipCollator
from trainers.vipant.tagging import LabelEncoder, label_list

PROMPTS = ("{}", "the sound of {}")  # the paper's: label names with and without a prompt


@torch.inference_mode()
def embed_sounds(
    model: VipAntModel, processor: VipAntProcessor, rows: datasets.Dataset, batch_size: int = 32, workers: int = 0
) -> torch.Tensor:
    """Embeddings of all sounds, `[rows, dim]`, on the CPU, not of unit length. A damaged sound is an error."""
    require_columns(rows, [("audio",)], "evaluation")
    clips = Rows(rows.select_columns([name for name in ("id", "audio") if name in rows.column_names]))
    collator = ClipCollator(processor, ["audio"], max_skipped=0.0)
    loader = torch.utils.data.DataLoader(clips, batch_size, collate_fn=collator, num_workers=workers)
    parts = [
        model.get_audio_features(batch["input_features"].to(model.device), normalize=False).pooler_output.float().cpu()
        for batch in tqdm(loader, desc="sounds", leave=False)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(
    model: VipAntModel, processor: VipAntProcessor, texts: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Embeddings of texts, `[texts, dim]`, on the CPU, not of unit length."""
    parts = []
    for start in range(0, len(texts), batch_size):
        inputs = processor(text=list(texts[start : start + batch_size]), return_tensors="pt").to(model.device)
        parts.append(model.get_text_features(**inputs, normalize=False).pooler_output.float().cpu())
    return torch.cat(parts)


def evaluate_retrieval(
    model: VipAntModel, processor: VipAntProcessor, rows: datasets.Dataset, workers: int = 0
) -> dict[str, float]:
    """Retrieval between sounds and all their captions.

    Returns:
        As `audio_text_retrieval_metrics`.
    """
    several = "captions" in rows.column_names
    by_clip = rows["captions"] if several else [[caption] for caption in rows["caption"]]
    captions = [caption for own in by_clip for caption in own]
    owner = [clip for clip, own in enumerate(by_clip) for _ in own]
    sounds, texts = embed_sounds(model, processor, rows, workers=workers), embed_texts(model, processor, captions)
    return audio_text_retrieval_metrics(F.normalize(sounds, dim=-1) @ F.normalize(texts, dim=-1).T, owner)


def evaluate_classification(
    model: VipAntModel,
    processor: VipAntProcessor,
    rows: datasets.Dataset,
    prompts: Sequence[str] = PROMPTS,
    labels: Sequence[str] | None = None,
    class_texts: Mapping[str, Sequence[str]] | None = None,
    similarity: Literal["cosine", "product"] = "cosine",
    workers: int = 0,
) -> dict[str, dict]:
    """Zero-shot classification by prompts.

    Args:
        model: The model.
        processor: Its processor.
        rows: With `audio`, `labels` and maybe `fold`.
        prompts: Templates with `{}` for the label.
        labels: All classes; those that occur in `rows` if None.
        class_texts: For each label, with blanks for underscores, texts of its own, which then make up the ensemble.
        similarity: "cosine", or "product" of embeddings that are not of unit length, as VIP-ANT's code takes it.
        workers: Processes that read sounds.

    Returns:
        By prompt, and under "ensemble" for all together, of which the nearest decides: what `classification_metrics`
        gives, as plain numbers and lists.

    Raises:
        ValueError: If a class has no text of its own.
    """
    names = sorted({name for row in rows["labels"] for name in label_list(row)}) if labels is None else list(labels)
    single = all(len(label_list(row)) == 1 for row in rows["labels"])
    encode = LabelEncoder(names, multi_label=not single)
    targets = torch.stack([encode(row) for row in rows["labels"]])
    targets = targets if single else targets.bool()
    folds = rows["fold"] if single and "fold" in rows.column_names else None
    texts = {
        prompt: [[text] for text in of_classes]  # of each class
        for prompt, of_classes in zip(prompts, class_prompts(names, prompts), strict=True)
    }
    if class_texts is not None:
        if without := [name for name in names if not class_texts.get(name.replace("_", " "))]:
            raise ValueError(f"`class_prompts` has no texts for the classes {', '.join(without)}")
        texts["ensemble"] = [list(class_texts[name.replace("_", " ")]) for name in names]
    elif len(prompts) > 1:
        texts["ensemble"] = [list(of_class) for of_class in zip(*class_prompts(names, prompts), strict=True)]
    sounds = embed_sounds(model, processor, rows, workers=workers)
    results = {}
    for prompt, of_classes in texts.items():
        embeds = embed_texts(model, processor, [text for own in of_classes for text in own])
        owner = [number for number, own in enumerate(of_classes) for _ in own]
        scores = zero_shot_scores(sounds, embeds, owner, cosine=similarity == "cosine")
        metrics = classification_metrics(scores, targets, folds)
        results[prompt] = {
            name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()
        }
    return results


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates as the command line says, prints the results and writes them to `--output`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VipAntModel.from_pretrained(options.model).eval().to(device)
    processor = VipAntProcessor.from_pretrained(options.model)
    if options.num_frames is not None:
        processor.feature_extractor.num_frames = options.num_frames
    rows = load_rows(options.dataset, options.split)
    results: dict
    if options.task == "retrieval":
        results = evaluate_retrieval(model, processor, rows, options.workers)
    else:
        own = json.loads(options.class_prompts.read_text()) if options.class_prompts else None
        results = evaluate_classification(
            model, processor, rows, options.prompts, None, own, options.similarity, options.workers
        )
    if options.output is not None:
        ids = list(rows["id"]) if "id" in rows.column_names else None
        settings = {name: getattr(options, name) for name in ("model", "dataset", "split")}
        with write_whole(options.output) as path:
            path.write_text(json.dumps(settings | {"results": results, "ids": ids}, indent=2))
    for name, value in results.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {value[key]:.4f}" for key in ("accuracy", "map") if key in value)
            print(f"{name:24s} {shown}")
        else:
            print(f"{name:28s} {value:.4f}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["retrieval", "classification"])
    parser.add_argument("--model", required=True, help="VIP-ANT model: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="folder, file or Hub id")
    parser.add_argument("--split", help="split of the data, where there are several")
    parser.add_argument("--num_frames", type=int, help="frames a clip, 1000 for 10 s (default: the model's)")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="templates with {} for the label")
    parser.add_argument("--class_prompts", type=Path, help="JSON file with a list of texts for each label")
    parser.add_argument(
        "--similarity", choices=["cosine", "product"], default="cosine", help="how sounds and prompts are compared"
    )
    parser.add_argument("--output", type=Path, help="JSON file with everything that was measured")
    parser.add_argument("--workers", type=int, default=0, help="processes that read sounds")
    return run_command(parser, evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
