"""Recall and precision of the things that captions name, for data whose clips are labelled with what is heard."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainers.metrics.captioning import tokenize


@dataclass(frozen=True)
class LabelScores:
    """How well captions name what the clips are labelled with.

    Attributes:
        recall: Share of all labels that the captions name.
        precision: Share of all names in the captions that are labels; 1.0 if no caption names anything.
        f1: Harmonic mean of the two.
        recall_per_label: The same for the clips that have the label.
        named: The labels that each caption names.
        clip_recall: Recall of each clip, None for clips without labels.
    """

    recall: float
    precision: float
    f1: float
    recall_per_label: dict[str, float]
    named: list[list[str]]
    clip_recall: list[float | None]


def named_labels(caption: str, synonyms: Mapping[str, Collection[str]]) -> list[str]:
    """The labels whose name or synonym stands in a caption, word by word.

    Args:
        caption: Any text.
        synonyms: Label to the words or phrases that name it.
    """
    text = f" {' '.join(tokenize(caption))} "
    return [
        label
        for label, phrases in synonyms.items()
        if any(f" {' '.join(tokenize(phrase))} " in text for phrase in phrases)
    ]


def label_metrics(
    captions: Sequence[str], labels: Sequence[Collection[str]], synonyms: Mapping[str, Collection[str]]
) -> LabelScores:
    """Recall and precision of labels in captions, counted over all labels of all clips.

    Args:
        captions: One per clip.
        labels: What each clip is labelled with.
        synonyms: Label to the words or phrases that name it; a label counts at most once per caption.

    Returns:
        The scores.

    Raises:
        ValueError: If the lengths differ, no clip has a label, or a label has no synonyms.
    """
    if len(captions) != len(labels):
        raise ValueError(f"{len(captions)} captions, but labels for {len(labels)} clips.")
    wanted = [set(clip) for clip in labels]
    if unknown := set().union(*wanted) - set(synonyms):
        raise ValueError(f"No words are given for the labels {', '.join(sorted(unknown))}.")
    if not any(wanted):
        raise ValueError("No clip has a label, so there is nothing to recall.")
    named = [named_labels(caption, synonyms) for caption in captions]
    found = [clip & set(names) for clip, names in zip(wanted, named, strict=True)]

    hits, total, guesses = (sum(map(len, sets)) for sets in (found, wanted, named))
    recall, precision = hits / total, hits / guesses if guesses else 1.0
    per_label = {}
    for label in synonyms:
        outcomes = [label in clip_found for clip, clip_found in zip(wanted, found, strict=True) if label in clip]
        if outcomes:
            per_label[label] = sum(outcomes) / len(outcomes)
    return LabelScores(
        recall=recall,
        precision=precision,
        f1=2 * hits / (total + guesses),
        recall_per_label=per_label,
        named=named,
        clip_recall=[len(hit) / len(clip) if clip else None for hit, clip in zip(found, wanted, strict=True)],
    )
