"""The demonstration's report: one HTML file that needs nothing beside it.

Pictures and sounds of test clips, captions at each stage, where the sound is, scores, losses, and the clouds of audio
and image tokens with the modality gap.
"""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image
from transformers import EvalPrediction

from modeling_dali.explain import explain, find_scorers, over_picture, spectrogram
from trainers.dali.alignment import alignment_metrics, moments
from trainers.rows import read_audio, read_image, without_decoding

CLIPS = 8
CLOUD_CLIPS, CLOUD_POINTS = 60, 500
COLUMNS = ("cider_d", "rouge_l", "bleu_4", "recall", "precision", "f1")
STAGES = {  # captions shown of each clip, and the variants they are of
    "before alignment": "untrained-audio-standard",
    "after stage 1b, sound": "aligned-audio-standard",
    "after stage 1b, sound and picture": "aligned-audio_image-standard",
    "after distillation, sound": "model-audio-standard",
    "supervised twin": "supervised-audio-standard",
}


def write_report(
    output: Path, results: Mapping, models: Mapping[str, tuple], rows, title: str = "DALI in miniature"
) -> Path:
    """
    Writes `report.html`.

    Args:
        output: Folder of a finished run: predictions in `evaluation`, a trainer's state in the folder of each stage.
        results: What `results.json` holds.
        models: Name of each cloud of tokens to a model and its processor; the last one explains the clips.
        rows: The test split.
        title: Title of the page.

    Returns:
        The file.
    """
    rows = without_decoding(rows)
    chosen = choose_clips(rows, CLIPS)
    last, last_processor = list(models.values())[-1]
    scorers = find_scorers(output / "model")
    captions = {stage: read_captions(output / "evaluation" / folder) for stage, folder in STAGES.items()}
    clips = [clip_card(rows[index], last, last_processor, scorers, captions) for index in chosen]
    clouds = [token_cloud(name, model, processor, rows) for name, (model, processor) in models.items()]
    spent = results["seconds"]["all"]
    minutes = f"All of it took {spent['wall'] / 60:.1f} minutes, {spent['cpu'] / 60:.1f} of processor time."
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
        "report_template.html"
    )
    html = page.render(
        title=title,
        spent=minutes,
        must_hold=results["must_hold"],
        clips=clips,
        learned=scorers is not None,
        where=results["where the sound is"],
        variants=results["variants"],
        columns=COLUMNS,
        curves=loss_curves(output),
        clouds=clouds,
        seconds=results["seconds"],
    )
    file = output / "report.html"
    file.write_text(html, encoding="utf-8")
    return file


def choose_clips(rows, count: int) -> list[int]:
    """Clips in which as many kinds of things as possible are heard, those with something silent beside it first."""
    things = rows["things"]
    mixed = sorted(range(len(rows)), key=lambda i: len({thing["sounds"] for thing in things[i]}) < 2)
    chosen: list[int] = []
    seen: set[str] = set()
    for fresh_only in (True, False):
        for index in mixed:
            heard = {thing["name"] for thing in things[index] if thing["sounds"]}
            if len(chosen) < count and index not in chosen and not (fresh_only and (heard & seen or not heard)):
                chosen.append(index)
                seen |= heard
    return chosen


def read_captions(folder: Path) -> dict[str, str]:
    """Predicted captions by id."""
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["id"]: row["caption"] for row in csv.DictReader(file)}


def clip_card(row: dict, model, processor, scorers, captions: Mapping[str, Mapping[str, str]]) -> dict:
    """What the template shows of one clip."""
    extractor = processor.feature_extractor
    picture, samples = read_image(row["image"]), read_audio(row["audio"], extractor.sampling_rate)
    found = explain(model, processor, samples, picture, scorers)
    features = extractor([samples], sampling_rate=extractor.sampling_rate)["input_features"][0].numpy()
    rows, columns = found.audio_weights.shape
    most = found.plan.max()
    return {
        "picture": _png(picture),
        "where": _png(over_picture(picture, found.where).resize((192, 192))),
        "weights": _png(over_picture(picture, found.image_weights).resize((192, 192))),
        "spectrogram": _png(spectrogram(features, (256, 256))),
        "sound": _data("audio/wav", row["audio"]["bytes"]),
        "seconds": round(len(samples) / extractor.sampling_rate, 2),
        "references": row["captions"],
        "captions": {stage: by_id[row["id"]] for stage, by_id in captions.items()},
        "plan": json.dumps(np.rint(99 * found.plan / most).astype(int).tolist(), separators=(",", ":")),
        "rows": rows,
        "columns": columns,
        "side": len(found.image_weights),
    }


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _data("image/png", buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def loss_curves(output: Path) -> list[dict]:
    """A curve for each stage's trainer."""
    curves = []
    for folder, name in (
        ("captioner", "captioner"),
        ("prefix", "stage 1a: prefix"),
        ("pretrained", "audio pretraining"),
        ("aligned", "stage 1b: alignment"),
        ("model", "stage 2: distillation"),
        ("supervised", "supervised twin"),
    ):
        history = json.loads((output / folder / "trainer_state.json").read_text())["log_history"]
        points = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
        if points:
            curves.append({"name": name, "svg": _curve(points)})
    return curves


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """An SVG of steps and losses."""
    steps, losses = np.array(points, dtype=float).T
    x, y = _scale(steps, 64, 292), _scale(losses, 150, 10)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return Markup(
        f'<svg viewBox="0 0 300 180" role="img"><path d="M64 10V150H292" fill="none" stroke="#d0d5dd"/>'
        f'<text x="60" y="16" text-anchor="end">{losses.max():.3g}</text>'
        f'<text x="60" y="150" text-anchor="end">{losses.min():.3g}</text>'
        f'<text x="292" y="168" text-anchor="end">step {steps.max():.0f}</text>'
        f'<polyline points="{line}" fill="none" stroke="#2f6fde" stroke-width="2"/></svg>'
    )


@torch.no_grad()
def token_cloud(name: str, model, processor, rows) -> dict:
    """
    Audio and image tokens on the two main axes of both together.

    Args:
        name: Name of the cloud.
        model, processor: Whose tokens.
        rows: Clips with `audio` and `image`.

    Returns:
        `name`, `gap` (the modality gap) and an `svg`.
    """
    extractor = processor.feature_extractor
    rows = [rows[index] for index in range(min(CLOUD_CLIPS, len(rows)))]
    sounds = [read_audio(row["audio"], extractor.sampling_rate) for row in rows]
    features = extractor(sounds, sampling_rate=extractor.sampling_rate)["input_features"]
    pictures = processor.image_inputs([read_image(row["image"]) for row in rows])
    sides = model.get_audio_tokens(features), model.get_image_tokens(**pictures)
    gap = modality_gap(*sides)
    audio, image = (side.flatten(0, 1).double() for side in sides)
    rng = np.random.default_rng(0)
    audio, image = (side[rng.permutation(len(side))[:CLOUD_POINTS]] for side in (audio, image))
    together = torch.cat([audio, image])
    centred = together - together.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    x, y = (centred @ axes.T).T.numpy()
    x, y = _scale(x, 8, 292), _scale(y, 212, 8)
    order = rng.permutation(len(x))  # neither side hides the other
    dots = "".join(
        f'<circle cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="2" fill="{"#e0662b" if i < len(audio) else "#2f6fde"}"/>'
        for i in order
    )
    return {"name": name, "gap": gap, "svg": Markup(f'<svg viewBox="0 0 300 220" fill-opacity=".55">{dots}</svg>')}


def modality_gap(audio: torch.Tensor, image: torch.Tensor) -> float:
    """The gap between the tokens [B, n, d] and [B, m, d] of two sides, as alignment measures it."""
    sides = (moments(audio).numpy(), moments(image).numpy())
    return alignment_metrics(EvalPrediction(sides, np.ones(len(audio))))["modality_gap"]


def _scale(values: np.ndarray, start: float, end: float) -> np.ndarray:
    return start + (values - values.min()) / (np.ptp(values) or 1) * (end - start)
