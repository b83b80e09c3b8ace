"""Captions of what is seen and of what is heard, and the questions that ask for either."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from datasets_scripts.sounding_world.things import THINGS, Thing

SEEN_QUESTIONS = ("Describe the image.", "What can be seen in this scene?")
HEARD_QUESTIONS = ("What can be heard in this scene?", "Describe the sound of this image.")
_SEEN_JOINS = (" and ", " and ", " beside ", " with ")
_SEEN_TEMPLATES = (
    "{}",
    "an image of {}",
    "there is {}",
    "{} can be seen",
    "the image shows {}",
    "one can see {} in this scene",
)
_CLAUSE_JOINS = (" and ", " and ", " while ", " as ")
_HEARD_TEMPLATES = (
    "the sound of {}",
    "{} can be heard",
    "there is {} that can be heard",
    "one can hear {}",
    "{} in the background",
)


def _join(rng: np.random.Generator, joins: Sequence[str], phrases: Sequence[str]) -> str:
    """A chosen conjunction between the first two phrases, "and" before the others."""
    return str(rng.choice(joins)).join(phrases[:2]) + "".join(f" and {phrase}" for phrase in phrases[2:])


def seen_caption(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """One caption of what is seen, e.g. "there is a car beside a tree"."""
    names = [things[index].seen for index in rng.permutation(len(things))]
    return str(rng.choice(_SEEN_TEMPLATES)).format(_join(rng, _SEEN_JOINS, names))


def heard_caption(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """One caption of what is heard, e.g. "an engine runs while a bird sings"."""
    things = [things[index] for index in rng.permutation(len(things))]
    if rng.random() < 0.4:
        return str(rng.choice(_HEARD_TEMPLATES)).format(" and ".join(thing.heard for thing in things))
    progressive = rng.random() < 0.5
    verbs = [thing.verbs[rng.integers(len(thing.verbs))][int(progressive)] for thing in things]
    clauses = [f"{thing.heard} {verb}" for thing, verb in zip(things, verbs, strict=True)]
    return _join(rng, _CLAUSE_JOINS, clauses)


def distinct_captions(
    style: Callable[[Sequence[Thing], np.random.Generator], str],
    things: Sequence[Thing],
    rng: np.random.Generator,
    count: int,
) -> list[str]:
    """`count` different captions in a style; fails where the things allow fewer."""
    captions: dict[str, None] = {}  # keeps their order
    for _ in range(100 * count):
        captions[style(things, rng)] = None
        if len(captions) == count:
            return list(captions)
    raise ValueError(f"There are no {count} different captions of this scene, only {len(captions)}.")


def vocabulary() -> list[str]:
    """All words of the captions, questions and labels, sorted; lower case, without punctuation."""
    texts = [*SEEN_QUESTIONS, *HEARD_QUESTIONS, *_SEEN_TEMPLATES, *_HEARD_TEMPLATES, *_SEEN_JOINS, *_CLAUSE_JOINS]
    for thing in THINGS.values():
        texts += [thing.name, thing.seen, thing.heard]
        texts += [form for verb in thing.verbs for form in verb]
    return sorted(set(re.findall("[a-z]+", " ".join(texts).lower())))
