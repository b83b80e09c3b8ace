"""Caption metrics: BLEU, ROUGE-L and CIDEr-D anywhere; METEOR, SPICE, SPIDEr and FENSE where their files are.

The scores come from aac-metrics. What differs is the tokenisation: the field runs Stanford's PTB tokenizer, which
needs Java; `tokenize` does the same by rules and is tested against it. `tokenizer="ptb"` runs the original.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache

# aac-metrics is imported where it is used: that takes seconds, for the sake of metrics that few ask for.

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
"""What needs nothing but this package."""
EXTRA_METRICS = ("meteor", "spice", "spider", "fense")
"""What needs Java, downloaded files or both."""

_HELP = {
    "aac-metrics": 'Install it by `pip install "dali-audio[metrics]"`.',
    "meteor": "It needs Java 8 to 13 and its jar, which `aac-metrics-download` fetches once while online.",
    "spice": "It needs Java 8 to 13 and its jars, which `aac-metrics-download` fetches once while online.",
    "fense": "It needs a sentence encoder and an error detector, fetched by `aac-metrics-download` once while online.",
    "ptb": "It needs Java, e.g. by `apt-get install default-jre-headless`, and Stanford's jar, which "
    "`aac-metrics-download` fetches and `pip install pycocoevalcap` brings along.",
}


class MetricUnavailableError(RuntimeError):
    """A metric or tokenizer was asked for whose files or Java are not there; the message says how to get them."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions.

    Attributes:
        corpus: Metric to its value over all clips. BLEU's is not the mean of the clips'.
        clips: Metric to one value per clip.
        missing: Metric that was left out to the reason and the remedy; only `metrics="all"` leaves any out.
    """

    corpus: dict[str, float]
    clips: dict[str, list[float]]
    missing: dict[str, str] = field(default_factory=dict)


# What the published evaluations remove of the PTB tokenizer's output; "?!" and "-lrb-" are not in it.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"})
_SPLIT = (  # where PTB cuts inside what is written as one word
    (re.compile(r"\b(can)(not)\b"), r"\1 \2"),
    (re.compile(r"\b(gon|wan)(na)\b"), r"\1 \2"),
    (re.compile(r"\b(got)(ta)\b"), r"\1 \2"),
    (re.compile(r"(\w)(n't)\b"), r"\1 \2"),
    (re.compile(r"(\w)('(?:s|re|ve|ll|d|m))\b"), r"\1 \2"),
)
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                                 # a.m., e.g., u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|prof|etc|vs)\.         # abbreviations keep their period
    | n't\b | '(?:s|re|ve|ll|d|m)\b                   # clitics
    | \d+(?:[.,:]\d+)+                                # 3.5, 1,000, 10:30
    | \w+(?:[-./@'&]\w+)*                             # words, mid-air, and/or, o'neil
    | @\w+
    | --+ | \.{3} | [?!]+
    | \S
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"}


def tokenize(caption: str) -> list[str]:
    """Splits a caption as the field's PTB tokenizer does, without Java.

    Lower case; punctuation is removed; hyphenated words, numbers and abbreviations stay whole; "dog's" gives `dog 's`
    and "don't" gives `do n't`. As in the published evaluations brackets remain, as `-lrb-` and `-rrb-`.

    Args:
        caption: Any text.

    Returns:
        The tokens.
    """
    text = caption.translate(_QUOTES).lower()
    for pattern, parts in _SPLIT:
        text = pattern.sub(parts, text)
    tokens = (_BRACKETS.get(token, token) for token in _TOKEN.findall(text))
    return [token for token in tokens if token not in _PUNCTUATION and not token.startswith("--")]


def ptb_jar() -> Path:
    """The PTB tokenizer's jar in the cache of aac-metrics or in an installed pycocoevalcap.

    Raises:
        MetricUnavailableError: If it is in neither.
    """
    from aac_metrics.utils.globals import get_default_cache_path
    from aac_metrics.utils.tokenization import FNAME_STANFORD_CORENLP_3_4_1_JAR

    places = [Path(get_default_cache_path(), FNAME_STANFORD_CORENLP_3_4_1_JAR)]
    package = find_spec("pycocoevalcap")
    if package is not None and package.submodule_search_locations:
        places.append(Path(package.submodule_search_locations[0], "tokenizer", places[0].name))
    for place in places:
        if place.is_file():
            return place
    raise MetricUnavailableError(f"The PTB tokenizer is not at {' nor at '.join(map(str, places))}. {_HELP['ptb']}")


def ptb_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Splits captions by Stanford's PTB tokenizer, all in one run of Java.

    Runs Java itself, since aac-metrics refuses Java above 13, on which the tokenizer works.

    Args:
        captions: Any texts.

    Returns:
        The tokens of each caption.

    Raises:
        MetricUnavailableError: If Java or the jar is missing.
    """
    from aac_metrics.utils.globals import get_default_java_path

    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command = [get_default_java_path(), "-cp", str(ptb_jar()), "edu.stanford.nlp.process.PTBTokenizer", *options]
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    with _explained("ptb"):
        run = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8", check=True)
    tokenized = run.stdout.split("\n")[: len(captions)]
    return [[token for token in line.split() if token not in _PUNCTUATION] for line in tokenized]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns the ways in which Java, jars or models can be missing into one error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        raise MetricUnavailableError(f"{name} is not available here ({reason}). {_HELP[name]}") from error


def caption_metrics(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] | Literal["all"] = METRICS,
    tokenizer: Literal["plain", "ptb"] = "plain",
) -> CaptionScores:
    """Scores captions against their references.

    Args:
        captions: One per clip; may be empty strings.
        references: One or more per clip.
        metrics: Names out of `METRICS` and `EXTRA_METRICS`; "all" takes all whose files are there and tells of the
            others in `CaptionScores.missing`.
        tokenizer: `plain` for `tokenize`, `ptb` for the original in Java. FENSE reads the captions as they are.

    Returns:
        Scores of the corpus and of each clip.

    Raises:
        ValueError: If the captions and references do not fit together, or a metric or tokenizer is unknown.
        MetricUnavailableError: If a metric named, or the tokenizer, needs what is not there.
    """
    if isinstance(references, str) or any(isinstance(clip, str) for clip in references):
        raise ValueError("references must hold a list of captions per clip, not single strings.")
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, but references for {len(references)} clips.")
    names = (*METRICS, *EXTRA_METRICS) if metrics == "all" else tuple(metrics)
    if unknown := [name for name in names if name not in (*METRICS, *EXTRA_METRICS)]:
        raise ValueError(f"No metric {unknown[0]!r}; there are {', '.join((*METRICS, *EXTRA_METRICS))}.")
    if tokenizer not in ("plain", "ptb"):
        raise ValueError(f"No tokenizer {tokenizer!r}; there are 'plain' and 'ptb'.")
    if not captions:
        raise ValueError("There is no caption to score.")
    if len(captions) == 1 and {"cider_d", "spider"} & set(names):
        raise ValueError("CIDEr-D weighs words by how many clips share them: pass two clips or more, or leave it out.")

    with _explained("aac-metrics"):
        from aac_metrics import functional

    raw = list(captions), [list(clip) for clip in references]
    tokens = _tokenize_all(*raw, tokenizer)
    for clip, sentences in enumerate(tokens[1]):
        if not sentences or not all(sentences):
            raise ValueError(f"Clip {clip} has no reference or one without a word: {raw[1][clip]!r}.")

    @cache
    def scores_of(name: str) -> tuple[float, np.ndarray]:
        if name == "spider":
            (cider_d, cider_d_clips), (spice, spice_clips) = scores_of("cider_d"), scores_of("spice")
            return (cider_d + spice) / 2, (cider_d_clips + spice_clips) / 2
        if name == "fense":
            _check_fense()
        inputs = raw if name == "fense" else tokens
        with _explained(name) if name in _HELP else nullcontext():
            corpus, clips = getattr(functional, name)(*inputs)
        return float(corpus[name]), clips[name].double().numpy()

    result = CaptionScores({}, {}, {})
    for name in names:
        try:
            corpus, clips = scores_of(name)
        except MetricUnavailableError as error:
            if metrics != "all":
                raise
            result.missing[name] = str(error)
        else:
            result.corpus[name], result.clips[name] = corpus, clips.tolist()
    return result


def _check_fense() -> None:
    """Looks for FENSE's files, which aac-metrics would otherwise try to download for minutes."""
    encoder = try_to_load_from_cache("sentence-transformers/paraphrase-TinyBERT-L6-v2", "modules.json")
    detector = Path(torch.hub.get_dir(), "fense_data", "echecker_clotho_audiocaps_base.ckpt")
    if not isinstance(encoder, str) or not detector.is_file():
        raise MetricUnavailableError(f"fense is not available here (its models are not downloaded). {_HELP['fense']}")


def _tokenize_all(
    captions: list[str], references: list[list[str]], tokenizer: Literal["plain", "ptb"]
) -> tuple[list[str], list[list[str]]]:
    """Tokens joined by blanks, which is what aac-metrics splits at."""
    flat = captions + [sentence for clip in references for sentence in clip]
    tokenized = ptb_tokenize(flat) if tokenizer == "ptb" else map(tokenize, flat)
    sentences = iter([" ".join(tokens) for tokens in tokenized])
    return list(islice(sentences, len(captions))), [list(islice(sentences, len(clip))) for clip in references]
