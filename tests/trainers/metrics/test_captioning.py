import csv
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_scripts.sounding_world import scene
from trainers.metrics.captioning import (
    EXTRA_METRICS,
    METRICS,
    MetricUnavailableError,
    caption_metrics,
    ptb_jar,
    ptb_tokenize,
    tokenize,
)

# What Stanford's PTB tokenizer 3.4.1 gives, less the punctuation that the published evaluations remove.
PTB = {
    "A dog's bark (loud) and a man's \"voice\".": "a dog 's bark -lrb- loud -rrb- and a man 's voice",
    "Don't stop; it's the children's toys": "do n't stop it 's the children 's toys",
    "can't cannot gonna wanna": "ca n't can not gon na wan na",
    "Mid-air low-pitched 3.5 kHz 1,000 times": "mid-air low-pitched 3.5 khz 1,000 times",
    "and/or 50% $5 #1 @home": "and/or 50 % $ 5 # 1 @home",
    "Mr. Smith etc. e.g. a.m. at 5 o'clock": "mr. smith etc. e.g. a.m. at 5 o'clock",
    "A train\u2014fast\u2013moving ... wait... what?! yes!": "a train fast moving wait what ?! yes",
    "birds\u2019 chirping, man\u2019s \u201cvoice\u201d \u2018hi\u2019": "birds chirping man 's voice hi",
    "a & b [g] {h} i_j": "a & b -lsb- g -rsb- -lcb- h -rcb- i_j",
    "the 90's 1980s 2nd 10:30 they'll we've i'd I'm": "the 90 's 1980s 2nd 10:30 they 'll we 've i 'd i 'm",
    "Dogs', cats' and James' hat, O'Neil": "dogs cats and james hat o'neil",
    "café naïve façade": "café naïve façade",
    "semi-automatic -- beep--beep beep-beep": "semi-automatic beep beep beep-beep",
    "A woman speaks,while rain falls": "a woman speaks while rain falls",
    "": "",
}
AUDIO_CAPTIONS = [
    "A man speaks while birds chirp and a car's engine idles nearby.",
    "Rain falls on a tin roof; thunder rumbles (far away), then stops.",
    "A crowd cheers \"hooray!\" as a man's voice isn't heard anymore",
    "Someone's typing on a key-board, 2-3 times, at 10:30 p.m. or so...",
    "High-pitched beeping, then a door slams - twice - and people laugh!",
    "An adult male speaks; a dog barks & whimpers, and children can't stop laughing",
]


@pytest.mark.parametrize(("caption", "tokens"), PTB.items())
def test_plain_tokens_are_those_of_the_ptb_tokenizer(caption, tokens):
    assert tokenize(caption) == tokens.split()


def test_plain_tokens_against_the_ptb_tokenizer_itself(request):
    if shutil.which("java") is None:
        pytest.skip("no Java")
    try:
        ptb_jar()
    except MetricUnavailableError as error:
        pytest.skip(str(error))
    captions = [*PTB, *AUDIO_CAPTIONS]
    captions += [caption for index in range(40) for caption in scene("test", index).captions("heard")]
    folder = request.config.rootpath.parent / "shared" / "data" / "stamps"
    if folder.is_dir():
        with (folder / "captions.csv").open(newline="") as file:
            captions += [row["caption"] for row in csv.DictReader(file)]
    assert [tokenize(caption) for caption in captions] == ptb_tokenize(captions)


# Slow formulas of the papers


def ngrams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates, references, highest):
    """Papineni et al. (2002), with the closest reference length."""
    log_precision = 0.0
    for n in range(1, highest + 1):
        matched = total = 0
        for candidate, refs in zip(candidates, references, strict=True):
            counts = ngrams(candidate, n)
            limit = Counter()
            for ref in refs:
                limit |= ngrams(ref, n)
            matched += (counts & limit).total()
            total += counts.total()
        if not matched:
            return 0.0
        log_precision += math.log(matched / total) / highest
    length = sum(map(len, candidates))
    closest = sum(
        min((abs(len(ref) - len(c)), len(ref)) for ref in refs)[1]
        for c, refs in zip(candidates, references, strict=True)
    )
    return math.exp(log_precision + min(0, 1 - closest / length))


def longest_common(one, other):
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common(one[:-1], other[:-1])
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def rouge_l(candidate, refs):
    """Lin (2004) with beta 1.2, best precision and best recall over the references."""
    lengths = [longest_common(candidate, ref) for ref in refs]
    precision = max(lengths) / len(candidate)
    recall = max(length / len(ref) for length, ref in zip(lengths, refs, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


def cider_d(candidates, references):
    """Vedantam et al. (2015), equation 3 with the clipping and length penalty of CIDEr-D, sigma 6."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        total = 0.0
        for n in range(1, 5):

            def weights(tokens, n=n):
                idf = {
                    gram: math.log(
                        len(references) / max(1, sum(any(gram in ngrams(r, n) for r in rs) for rs in references))
                    )
                    for gram in ngrams(tokens, n)
                }
                return {gram: count * idf[gram] for gram, count in ngrams(tokens, n).items()}

            own = weights(candidate)
            for ref in refs:
                other = weights(ref)
                norm = math.hypot(*own.values()) * math.hypot(*other.values())
                clipped = sum(min(value, other.get(gram, 0)) * other.get(gram, 0) for gram, value in own.items())
                # The reference code takes the difference in bigrams for that in words; lengths below two differ.
                gap = ngrams(candidate, 2).total() - ngrams(ref, 2).total()
                total += (clipped / norm if norm else 0) * math.exp(-(gap**2) / 72) / len(refs) / 4
        scores.append(10 * total)
    return scores


sentence = st.lists(st.sampled_from("a dog cat barks meows and the loudly".split()), min_size=2, max_size=7)
clip = st.tuples(sentence, st.lists(sentence, min_size=1, max_size=3))


@settings(max_examples=25, deadline=None)
@given(st.lists(clip, min_size=2, max_size=4))
def test_scores_follow_the_papers_formulas(clips):
    candidates, references = [c for c, _ in clips], [refs for _, refs in clips]
    scores = caption_metrics([" ".join(c) for c in candidates], [[" ".join(r) for r in refs] for refs in references])
    for n in range(1, 5):
        expected = bleu(candidates, references, n)
        # Where nothing matches, the reference code gives (1e-15 / 1e-9) ** (1 / n) at most instead of 0.
        tolerance = {"rel": 1e-6} if expected else {"abs": 1e-6 ** (1 / n) + 1e-9}
        assert scores.corpus[f"bleu_{n}"] == pytest.approx(expected, **tolerance)
    expected = [rouge_l(c, refs) for c, refs in clips]
    assert scores.clips["rouge_l"] == pytest.approx(expected)
    assert scores.corpus["rouge_l"] == pytest.approx(np.mean(expected))
    expected = cider_d(candidates, references)
    assert scores.clips["cider_d"] == pytest.approx(expected)
    assert scores.corpus["cider_d"] == pytest.approx(np.mean(expected))


def test_perfect_wrong_and_empty_captions():
    references = [["a dog is barking"], ["a cat meows loudly now"], ["rain falls on a roof"]]
    perfect = caption_metrics([refs[0] for refs in references], references)
    assert perfect.corpus == pytest.approx({**dict.fromkeys(METRICS, 1.0), "cider_d": 10.0})
    worse = caption_metrics(["a dog is barking", "", "siren"], references)
    assert worse.clips["rouge_l"] == pytest.approx([1, 0, 0]) and worse.clips["cider_d"][1:] == [0, 0]
    assert all(len(values) == 3 for values in worse.clips.values())


def test_case_and_punctuation_do_not_count():
    references = [["a dog's bark", "the dog barks"], ["rain"]]
    plain = caption_metrics(["a dog's bark", "rain"], references)
    assert caption_metrics(["A dog's bark!", "Rain."], references).corpus == plain.corpus


def test_missing_files_are_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    captions, references = ["a dog", "a cat"], [["a dog"], ["a cat"]]
    for name in EXTRA_METRICS:
        with pytest.raises(MetricUnavailableError, match="aac-metrics-download"):
            caption_metrics(captions, references, [name])
    scores = caption_metrics(captions, references, "all")
    assert set(scores.corpus) == set(METRICS) and set(scores.missing) == set(EXTRA_METRICS)


def test_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "aac_metrics", None)
    with pytest.raises(MetricUnavailableError, match=r"pip install \"dali-audio\[metrics\]\""):
        caption_metrics(["a dog", "a cat"], [["a dog"], ["a cat"]])


def test_missing_java_is_told(monkeypatch, tmp_path):
    jar = tmp_path / "aac-metrics" / "stanford_nlp" / "stanford-corenlp-3.4.1.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", str(tmp_path))
    monkeypatch.setenv("AAC_METRICS_JAVA_PATH", str(tmp_path / "no-java"))
    with pytest.raises(MetricUnavailableError, match=r"no-java.*needs Java"):
        ptb_tokenize(["a dog"])


@pytest.mark.parametrize(
    ("captions", "references", "metrics", "message"),
    [
        (["a"], [["a"], ["b"]], METRICS, "1 captions, but references for 2 clips"),
        (["a", "b"], ["a", "b"], METRICS, "list of captions per clip"),
        (["a", "b"], [["a"], []], METRICS, "Clip 1 has no reference"),
        (["a", "b"], [["a"], ["..."]], METRICS, "Clip 1 .*without a word"),
        (["a"], [["a"]], ["cider_d"], "two clips or more"),
        ([], [], METRICS, "no caption"),
        (["a", "b"], [["a"], ["b"]], ["blue"], "No metric 'blue'"),
    ],
)
def test_wrong_inputs_are_told(captions, references, metrics, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(captions, references, metrics)


def test_one_clip_is_enough_without_cider():
    assert caption_metrics(["a dog"], [["a dog"]], ["bleu_1", "rouge_l"]).corpus == pytest.approx(
        {"bleu_1": 1, "rouge_l": 1}
    )
