"""What each part of the method is worth, on the sounding world.

    python -m examples.sounding_world.ablation [--demo runs/demo] [--seeds 0,1,2] [--losses mmd,ot,attentive_ot]

Alignment by contrast, MMD, exact optimal transport, Sinkhorn and attentive optimal transport, each before and after
distillation, from sound alone and from sound and picture. Above them the supervised twin (the same model, tuned on
sounds with true captions), below them an ear that was not trained, one that was only pretrained, and the most
frequent caption. World, captioner and prefix are the demonstration's, which is run as far as them if it was not. Seeds
vary the start of the audio encoder, its pretraining, which all losses of a seed share, the order of the data and the
sampling of captions.

Writes into `ablation` in the demonstration's folder: `results.json` (every run, and how often each loss came out above
another) and `table.md` (means and spreads over seeds), and adds them to the demonstration's report. What is done is
not done again.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

from transformers.hf_argparser import HfArg

from examples.sounding_world.demo import RECIPES, Demo, DemoConfig, claim_folder
from examples.sounding_world.evaluation import most_frequent_caption, score_split
from examples.sounding_world.report import COLUMNS
from trainers.dali.alignment import LOSSES
from trainers.dali.data_collator import Modality
from trainers.recipes import run_recipe

FINAL = "after distillation, sound"
TWIN_STARTS_FROM = "attentive_ot"
MODALITIES: dict[str, Modality] = {"sound": "audio", "sound and picture": "audio_image"}


@dataclass
class AblationConfig:
    """Settings of the ablation."""

    demo: str = HfArg(
        default="runs/demo", help="Folder of the demonstration whose world, captioner and prefix are used."
    )
    recipes: str = HfArg(default=str(RECIPES), help="Folder of the stages' recipes.")
    seeds: str = HfArg(default="0,1,2", help="Seeds of the audio encoder, separated by commas.")
    losses: str = HfArg(
        default="attentive_ot,ot,sinkhorn,mmd,contrastive",
        help="Losses of the alignment, separated by commas; attentive_ot must be among them: the twin starts from it.",
    )

    def __post_init__(self):
        chosen = self.losses.split(",")
        if unknown := [loss for loss in chosen if loss not in LOSSES]:
            raise ValueError(f"`losses` are out of {', '.join(LOSSES)}; {unknown[0]!r} is none of them.")
        if TWIN_STARTS_FROM not in chosen:
            raise ValueError(f"`losses` must include {TWIN_STARTS_FROM}: the supervised twin starts from it.")


def run_loss(demo: Demo, loss: str, seed: int) -> dict[str, dict]:
    """
    Scores of one loss and one seed.

    Before and after distillation, from sound and from sound and picture; and in the end on unseen combinations.
    """
    base = f"ablation/{loss}-{seed}"
    demo.alignment(f"ablation/pretrained-{seed}", f"{base}/aligned", loss=loss, seed=seed)
    demo.pseudo_captions(f"{base}/aligned", f"{base}/captions", seed=seed)
    demo.distillation(f"{base}/aligned", f"{base}/captions", f"{base}/model", seed=seed)
    found = {
        f"{when} distillation, {what}": score_split(
            demo, f"{base}/{folder}", modality, prefix=folder == "aligned" or modality == "audio_image"
        )
        for when, folder in (("before", "aligned"), ("after", "model"))
        for what, modality in MODALITIES.items()
    }
    found[f"{FINAL}, unseen combinations"] = score_split(demo, f"{base}/model", variant="unseen_combinations")
    return found


def run_start(demo: Demo, seed: int) -> dict[str, dict]:
    """Scores of the captioner with an ear of random weights, and of what all losses of a seed start from."""
    untrained, pretrained = f"ablation/untrained-{seed}", f"ablation/pretrained-{seed}"
    demo.listener(seed, untrained)
    demo.audio_pretraining(untrained, pretrained, seed=seed)
    return {
        "untrained ear": score_split(demo, untrained, prefix=True),
        "pretrained ear": score_split(demo, pretrained, prefix=True),
    }


def run_bounds(demo: Demo, seed: int) -> dict[str, dict]:
    """Scores of the supervised twin and of the most frequent caption."""
    twin = f"ablation/supervised-{seed}"
    demo.supervised(f"ablation/{TWIN_STARTS_FROM}-{seed}/aligned", twin, seed=seed)
    return {"supervised twin": score_split(demo, twin), "most frequent caption": most_frequent_caption(demo)}


def run(config: AblationConfig, demo_config: DemoConfig | None = None) -> dict:
    """
    The whole ablation.

    Args:
        config: Settings.
        demo_config: Settings of the demonstration, by default those of `examples.sounding_world.demo`.

    Returns:
        What `results.json` holds.
    """
    demo = Demo(demo_config or DemoConfig(config.demo, config.recipes))
    claim_folder(demo.config)
    shared = [stage for stage in demo.stages() if stage.name in ("world", "captioner", "prefix tuning")]
    demo.run_stages(shared, demo.output / "done")

    folder = demo.output / "ablation"
    seeds, losses = [int(seed) for seed in config.seeds.split(",")], config.losses.split(",")
    runs: dict[str, Path] = {}
    stages = []

    def add(name: str, seconds: float, score: Callable[[], dict]) -> None:
        runs[name] = folder / f"{name.replace(' ', '-')}.json"
        stages.append(demo.stage(name, seconds, lambda: _write(runs[name], score())))

    for seed in seeds:
        add(f"start {seed}", 40, partial(run_start, demo, seed))
        for loss in losses:
            add(f"{loss} {seed}", 180, partial(run_loss, demo, loss, seed))
        add(f"bounds {seed}", 30, partial(run_bounds, demo, seed))
    spent = demo.run_stages(stages, folder / "done")
    scores = {name: json.loads(file.read_text()) for name, file in runs.items()}
    lines = summary(scores)
    means = {
        name: {column: statistics.mean(values) for column, values in line.items()} for name, line in lines.items()
    }
    results = {"runs": scores, "means": means, "above": above(scores, losses, seeds), "spent": spent}
    _write(folder / "results.json", results)
    (folder / "table.md").write_text(table(lines), encoding="utf-8")
    if (demo.output / "results.json").exists():
        demo.report()
    return results


def _write(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))


def summary(runs: Mapping[str, Mapping[str, Mapping]]) -> dict[str, dict[str, list[float]]]:
    """
    Scores by variant.

    Args:
        runs: `"LOSS SEED"`, `"start SEED"` or `"bounds SEED"` to the scores of its variants.

    Returns:
        Variant to score to its values over seeds.
    """
    lines: dict[str, dict[str, list[float]]] = {}
    for name, variants in runs.items():
        loss = name.rsplit(" ", 1)[0]
        for variant, scores in variants.items():
            line = lines.setdefault(f"{loss}, {variant}" if loss in LOSSES else variant, {})
            for column in COLUMNS:
                line.setdefault(column, []).append(scores[column])
    return lines


def table(lines: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    rows = [f"| | {' | '.join(COLUMNS)} | runs |", "|---" + "|---:" * (len(COLUMNS) + 1) + "|"]
    for name, scores in sorted(lines.items(), key=lambda line: -statistics.mean(line[1]["recall"])):
        cells = [_mean_and_spread(scores[column]) for column in COLUMNS]
        rows.append(f"| {name} | {' | '.join(cells)} | {len(scores['recall'])} |")
    return "\n".join(rows) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def above(runs: Mapping[str, Mapping], losses: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, str]]:
    """For each two losses, in how many seeds the first had the higher recall and CIDEr-D in the end."""
    counts: dict[str, dict[str, str]] = {}
    for first, second in permutations(losses, 2):
        finals = [(runs[f"{first} {seed}"][FINAL], runs[f"{second} {seed}"][FINAL]) for seed in seeds]
        counts[f"{first} above {second}"] = {
            score: f"{sum(a[score] > b[score] for a, b in finals)} of {len(seeds)}" for score in ("recall", "cider_d")
        }
    return counts


def show_table(config: AblationConfig) -> int:
    """Runs the ablation and prints its table."""
    run(config)
    print((Path(config.demo) / "ablation" / "table.md").read_text())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs as the command line says."""
    return run_recipe(AblationConfig, show_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
