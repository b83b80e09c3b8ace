"""Captions a data set and scores the captions, as a whole and clip by clip.

    python -m trainers.dali.evaluate --model DIR_OR_ID --dataset DATA --modality audio|image|audio_image [--output DIR]

Any data set will do that has `id`, `captions` (or `caption`) and what the modality asks for: `audio`, `image` or
`frames`. With `--synonyms FILE` (JSON: label to the words that name it) and a column `labels`, recall and precision of
what the labels say are measured too.

Writes into the output folder: `captions.jsonl`, before anything is scored; `metrics.json` (scores and what they were
measured with), `table.md`, `predictions.csv` (a line per clip: caption, references, scores) and `ids.txt`, the exact
list of clips. Clips that cannot be decoded are listed in `skipped.txt` and in the metrics; more of them than
`--max_skipped` are an error.
"""

import csv
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from datasets_scripts.files import write_whole
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import QUESTION, AudioCaptionProcessorMixin
from trainers.dali.data_collator import DaliDataCollator, Modality
from trainers.dali.pseudo_captions import PseudoCaptionConfig, caption_shard, write_captions
from trainers.metrics.captioning import METRICS, caption_metrics
from trainers.metrics.labels import label_metrics
from trainers.model_card import command_line
from trainers.recipes import Dtype, check_choices, load_model, load_rows, run_recipe
from trainers.rows import require_columns, sample_id, without_decoding

BLOCK = 1000  # rows that are read at a time


@dataclass
class EvaluationConfig:
    """Settings of an evaluation."""

    model: str = HfArg(default="", help="Folder or Hub id of a DALI model.")
    prefix: str | None = HfArg(
        default=None, help="Folder or Hub id of a prefix adapter; by default the model's own prefix, if it has one."
    )
    dtype: Literal[Dtype, "auto"] = HfArg(default="auto", help="Type of the weights; auto: as saved.")
    dataset: str = HfArg(default="", help="Data set: a folder, a file or a Hub id.")
    split: str | None = HfArg(default=None, help="Its split, where there are several.")
    modality: Modality = HfArg(default="audio", help="What the model is given.")
    output: str = HfArg(default="evaluation", help="Folder of the results.")
    question: str = HfArg(default=QUESTION, help="What the model is asked.")
    metrics: str = HfArg(
        default=",".join(METRICS),
        help="Names separated by commas; all computes those whose files are there, and names the others.",
    )
    tokenizer: Literal["plain", "ptb"] = HfArg(default="plain", help="Tokenizer of the metrics; ptb needs Java.")
    synonyms: str | None = HfArg(
        default=None, help="JSON file: label to the words that name it; scores the column labels."
    )
    batch_size: int = HfArg(default=32, help="Clips that are captioned at once.")
    temperature: float = HfArg(default=0.0, help="Temperature of sampling; 0 takes the most likely word.")
    top_k: int = HfArg(default=50, help="Words that sampling draws from, the most likely ones; 0 for all.")
    max_new_tokens: int = HfArg(default=64, help="Longest caption.")
    max_skipped: float = HfArg(default=0.0, help="Largest share of clips that may fail to decode.")
    seed: int = HfArg(default=42, help="Seed of sampling.")

    def __post_init__(self):
        check_choices(self)


def references_of(row: dict) -> list[str]:
    """
    The references of a row.

    Raises:
        ValueError: if there are none.
    """
    references = row.get("captions") or [row.get("caption")]
    if not all(references):
        raise ValueError(f"The clip {sample_id(row)} has no reference caption.")
    return list(references)


@torch.no_grad()
def predict(
    model: DaliMixin,
    processor: AudioCaptionProcessorMixin,
    rows,
    config: EvaluationConfig,
    advance: Callable[[int], object] = lambda clips: None,
) -> tuple[dict[str, str], list[str]]:
    """
    Captions all rows.

    Args:
        model, processor: What captions; with a prefix if the model holds one.
        rows: A data set with what the modality needs.
        config (`EvaluationConfig`): Modality, question and decoding.
        advance (`Callable`, *optional*): Is told of clips as they are done.

    Returns:
        Captions by id, in the order of the rows, and the ids of clips that could not be decoded.

    Raises:
        ValueError: if a column is missing, or two clips have one id.
    """
    collator = DaliDataCollator(
        processor, config.modality, question=config.question, captions=False, max_skipped=config.max_skipped
    )
    require_columns(rows, collator.columns, "evaluation")
    decoding = PseudoCaptionConfig(
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
    )
    model.eval()
    torch.manual_seed(config.seed)
    rows = without_decoding(rows)
    captions: dict[str, str] = {}
    skipped: list[str] = []
    for start in range(0, len(rows), BLOCK):
        block = [{**rows[i], "index": i} for i in range(start, min(start + BLOCK, len(rows)))]
        done, missed = caption_shard(model, processor, collator, block, decoding, advance)
        for row in done:
            if row["id"] in captions:
                raise ValueError(f"Two clips have the id {row['id']}: ids must differ.")
            captions[row["id"]] = row["caption"]
        skipped += missed
    return captions, skipped


def score(
    captions: Mapping[str, str],
    rows,
    metrics: Sequence[str] | str = METRICS,
    tokenizer: str = "plain",
    synonyms: Mapping[str, Collection[str]] | None = None,
) -> tuple[dict, list[dict]]:
    """
    Holds captions against their references.

    Args:
        captions: By id; rows without one are left out.
        rows: A data set with `captions` or `caption`, and with `synonyms` also `labels`.
        metrics: See [`caption_metrics`].
        tokenizer: See [`caption_metrics`].
        synonyms: Label to the words that name it.

    Returns:
        Scores of all clips, and for each clip a dictionary of `id`, `caption`, `references` and its scores.
    """
    text = [name for name in ("id", "caption", "captions", "labels") if name in rows.column_names]
    rows = [{**row, "index": index} for index, row in enumerate(rows.select_columns(text))]
    rows = [row for row in rows if sample_id(row) in captions]
    written = [captions[sample_id(row)] for row in rows]
    references = [references_of(row) for row in rows]
    scores = caption_metrics(written, references, metrics, tokenizer)  # type: ignore[arg-type]
    summary: dict = {**scores.corpus, "clips": len(rows)}
    if scores.missing:
        summary["missing"] = scores.missing
    clips: list[dict] = [
        {
            "id": sample_id(row),
            "caption": caption,
            "references": own,
            **{name: values[index] for name, values in scores.clips.items()},
        }
        for index, (row, caption, own) in enumerate(zip(rows, written, references, strict=True))
    ]
    if synonyms:
        if "labels" not in text:
            raise ValueError("`synonyms` were given, but the data set has no column `labels`.")
        named = label_metrics(written, [row["labels"] for row in rows], synonyms)
        summary |= {"recall": named.recall, "precision": named.precision, "f1": named.f1}
        summary["recall_per_label"] = named.recall_per_label
        for clip, recall, names in zip(clips, named.clip_recall, named.named, strict=True):
            clip |= {"recall": recall, "named": names}
    return summary, clips


def evaluate(model: DaliMixin, processor: AudioCaptionProcessorMixin, rows, config: EvaluationConfig) -> dict:
    """
    Captions, scores, and writes everything into `config.output`.

    Args:
        model, processor: What captions.
        rows: The data set.
        config: Settings.

    Returns:
        What `metrics.json` holds under `metrics`.
    """
    require_columns(rows, [("caption", "captions")], "evaluation")  # before the long part
    synonyms = json.loads(Path(config.synonyms).read_text()) if config.synonyms else None
    metrics = "all" if config.metrics == "all" else config.metrics.split(",")
    caption_metrics(["rain", "wind"], [["rain"], ["wind"]], metrics, config.tokenizer)  # raises if one is not there
    with tqdm(total=len(rows), unit="clip") as bar:
        captions, skipped = predict(model, processor, rows, config, bar.update)
    with write_whole(Path(config.output) / "captions.jsonl") as path:
        write_captions(path, [{"id": name, "caption": caption} for name, caption in captions.items()])
    summary, clips = score(captions, rows, metrics, config.tokenizer, synonyms)
    summary["skipped"] = len(skipped)
    write(Path(config.output), summary, clips, skipped, asdict(config))
    return summary


def write(folder: Path, summary: dict, clips: list[dict], skipped: list[str], settings: dict) -> None:
    """Writes the files that the top of this module names."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, clips[0].keys())
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in clip.items()} for clip in clips)
    (folder / "ids.txt").write_text("".join(f"{clip['id']}\n" for clip in clips), encoding="utf-8")
    (folder / "skipped.txt").write_text("".join(f"{name}\n" for name in skipped), encoding="utf-8")
    (folder / "table.md").write_text(table({settings.get("modality", ""): summary}), encoding="utf-8")
    results = {"metrics": summary, "settings": settings, "command": command_line()}
    (folder / "metrics.json").write_text(json.dumps(results, indent=2, ensure_ascii=False))


def _cell(value) -> str | float | None:
    return " | ".join(value) if isinstance(value, list) else value


def table(summaries: Mapping[str, Mapping]) -> str:
    """
    A Markdown table.

    Args:
        summaries: Name of a line to its scores; what is no number is left out.
    """
    names = list(dict.fromkeys(n for scores in summaries.values() for n, v in scores.items() if _is_number(v)))
    lines = [f"| | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for line, scores in summaries.items():
        cells = [f"{scores[n]:.3f}" if isinstance(scores.get(n), float) else str(scores.get(n, "")) for n in names]
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def evaluate_data_set(config: EvaluationConfig) -> int:
    """Evaluates as the settings say, and prints the scores."""
    rows = load_rows(config.dataset, config.split)
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    if config.prefix:
        model.load_prefix(config.prefix)
        processor.follow(model.config)
    if torch.cuda.is_available():
        model = model.to("cuda")
    summary = evaluate(model, processor, rows, config)
    print(table({config.modality: summary}))
    for name, reason in summary.get("missing", {}).items():
        print(f"{name} was left out: {reason}")
    print(f"Everything is in {config.output}.")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates as the command line says."""
    return run_recipe(EvaluationConfig, evaluate_data_set, arguments)


if __name__ == "__main__":
    sys.exit(main())
