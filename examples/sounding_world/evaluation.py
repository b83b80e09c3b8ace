"""What the stages of the demonstration are worth: captions of the test splits, scored, and figures that must hold."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from datasets_scripts.sounding_world import SYNONYMS
from modeling_dali.explain import explain, find_scorers
from trainers.dali.data_collator import Modality
from trainers.dali.evaluate import EvaluationConfig, predict, score, write
from trainers.rows import read_audio, read_image, without_decoding

TEST_VARIANTS = ("standard", "unseen_combinations", "unseen_timbres", "loud_noise", "three")


def score_split(
    demo, folder: str, modality: Modality = "audio", prefix: bool = False, variant: str = "standard"
) -> dict:
    """Captions a test split with a model, writes the predictions, and scores them."""
    model, processor = demo.model(folder, prefix)
    target = demo.output / "evaluation" / f"{folder}-{modality}-{variant}".replace("/", "-")
    config = EvaluationConfig(
        model=str(demo.output / folder),
        dataset=str(demo.output / "world" / variant),
        modality=modality,
        output=str(target),
        batch_size=100,
        max_new_tokens=24,
        synonyms=str(demo.output / "world" / "synonyms.json"),
    )
    rows = demo.rows("test", variant)
    captions, skipped = predict(model, processor, rows, config)
    summary, clips = score(captions, rows, synonyms=SYNONYMS)
    write(target, summary, clips, skipped, asdict(config))
    return summary


def most_frequent_caption(demo) -> dict:
    """Scores of the one caption that is most often right, whatever is heard."""
    rows = demo.rows("captions")
    heard = [
        captions
        for question, captions in zip(rows["question"], rows["captions"], strict=True)
        if "hear" in question or "sound" in question
    ]
    ((caption, _),) = Counter(text for captions in heard for text in captions).most_common(1)
    test = demo.rows("test")
    summary, clips = score(dict.fromkeys(test["id"], caption), test, synonyms=SYNONYMS)
    write(demo.output / "evaluation" / "most_frequent", summary, clips, [], {"caption": caption})
    return summary | {"caption": caption}


def image_captions(demo, folder: str) -> tuple[list[str], torch.Tensor]:
    """Captions of the test pictures without a prefix, and the logits of the first of them."""
    model, processor = demo.model(folder)
    model.remove_prefix()
    processor.follow(model.config)
    rows = demo.rows("test").select_columns(["id", "image"])
    captions, _ = predict(model, processor, rows, EvaluationConfig(modality="image", batch_size=100))
    inputs = processor(text=processor.caption_prompt("image"), images=[rows[0]["image"]], return_tensors="pt")
    with torch.no_grad():
        return list(captions.values()), model(**inputs).logits


def where_the_sound_is(demo, folder: str) -> dict[str, dict[str, float | None]]:
    """
    How sounding things stand out in pictures that show a silent thing too.

    Returns:
        For learned weights, weights by nearest tokens (both relative to the mean of their picture), and what the
        sound brings beyond silence: the areas under the ROC curve of tokens on sounding things against those on
        `silent` ones and against the `background` (see [`values_by_kind`]), and how often the `strongest` token of
        a picture is on a sounding thing. None where no picture tells.
    """
    model, processor = demo.model(folder)
    rate, scorers = processor.feature_extractor.sampling_rate, find_scorers(demo.output / folder)
    ways = {"nearest": None} if scorers is None else {"nearest": None, "learned": scorers}
    found: dict[str, dict[str, list]] = {}
    for row in without_decoding(demo.rows("test")):
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


def evaluate(demo) -> None:
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
    variants = {"most frequent caption": most_frequent_caption(demo)}
    for number, (name, job) in enumerate(jobs.items()):
        variants[name] = score_split(demo, *job)
        if demo.progress is not None:
            demo.progress.done((number + 1) / len(jobs))
    before, after = image_captions(demo, "untrained"), image_captions(demo, "model")
    same = before[0] == after[0] and torch.equal(before[1], after[1])
    where = where_the_sound_is(demo, "model")
    area = where.get("learned", {}).get("silent")
    results = {"variants": variants, "must_hold": must_hold(variants, same, area), "where the sound is": where}
    (demo.output / "evaluation" / "results.json").write_text(json.dumps(results, indent=1))


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
