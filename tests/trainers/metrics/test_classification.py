import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.released import seeded
from trainers.metrics.classification import (
    average_precision,
    class_prompts,
    classification_metrics,
    zero_shot_scores,
)


def slow_average_precision(scores, targets):
    """Sum over thresholds of the gain in recall times the precision there."""
    if not any(targets):
        return float("nan")
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [target for score, target in zip(scores, targets, strict=True) if score >= threshold]
        area += (sum(chosen) / sum(targets) - recall) * sum(chosen) / len(chosen)
        recall = sum(chosen) / sum(targets)
    return area


def problem(seed, levels, clips=23, classes=5):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, levels, (clips, classes)) / 3.0)
    return (
        scores,
        torch.from_numpy(rng.integers(0, classes, clips)),
        torch.from_numpy(rng.random((clips, classes)) < 0.2),
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5, 1000]))
def test_average_precision_equals_the_slow_formula_with_ties(seed, levels):
    scores, _, targets = problem(seed, levels)
    expected = [slow_average_precision(s, t) for s, t in zip(scores.T.tolist(), targets.T.tolist(), strict=True)]
    assert average_precision(scores, targets).tolist() == pytest.approx(expected, nan_ok=True)
    metrics = classification_metrics(scores, targets)
    assert metrics["map"] == pytest.approx(np.nanmean(expected), nan_ok=True)


def test_average_precision_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    for levels in (2, 1000):
        scores, _, targets = problem(1, levels)
        expected = metrics.average_precision_score(targets.numpy(), scores.numpy(), average=None)
        np.testing.assert_allclose(average_precision(scores, targets).numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 1000]))
def test_accuracy_confusion_and_folds_equal_plain_counts(seed, levels):
    scores, targets, _ = problem(seed, levels)
    folds = torch.arange(len(targets)) % 4 + 1
    metrics = classification_metrics(scores, targets, folds)
    right = [
        all(row[target] > score for other, score in enumerate(row) if other != target)
        for row, target in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    by_fold = [np.mean([r for r, f in zip(right, folds.tolist(), strict=True) if f == fold]) for fold in range(1, 5)]
    assert metrics["fold_accuracy"].tolist() == pytest.approx(by_fold)
    assert metrics["accuracy"] == pytest.approx(np.mean(by_fold))
    assert classification_metrics(scores, targets)["accuracy"] == pytest.approx(np.mean(right))

    confusion = np.zeros((5, 5), dtype=int)
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        confusion[target, int(np.argmax(row))] += 1
    assert metrics["confusion"].tolist() == confusion.tolist()
    for number, accuracy in enumerate(metrics["class_accuracy"].tolist()):
        outcomes = [r for r, target in zip(right, targets.tolist(), strict=True) if target == number]
        assert accuracy == pytest.approx(np.mean(outcomes) if outcomes else np.nan, nan_ok=True)


def test_equal_scores_decide_nothing():
    assert classification_metrics(torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 2, 0]))["accuracy"] == 0


def test_prompts_of_label_names():
    assert class_prompts(["dog_bark", "rain"], ["{}", "the sound of {}"]) == [
        ["dog bark", "rain"],
        ["the sound of dog bark", "the sound of rain"],
    ]
    assert class_prompts(["dog", "rain"]) == [["the sound of dog", "the sound of rain"]]


def test_the_nearest_text_of_a_class_scores():
    audio, text = seeded((5, 8), 1), seeded((7, 8), 2, 3.0)
    owner = [2, 0, 1, 1, 2, 0, 0]
    unit = [side / side.norm(dim=1, keepdim=True) for side in (audio, text)]
    for cosine, (sounds, texts) in ((True, unit), (False, (audio, text))):
        scores = zero_shot_scores(audio, text, owner, cosine)
        expected = [
            [max(float(s @ t) for t, o in zip(texts, owner, strict=True) if o == k) for k in range(3)] for s in sounds
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


# Of ClassificationHead.infer and .report (cvap/module/decoder/loss_head.py), which take the product, on the embeddings
# below: with four texts a class, and with the first of each alone.
AUTHORS_FOUR, AUTHORS_ONE = 57.50, 53.50


def test_products_give_the_authors_accuracy():
    classes, texts, dim, clips = 6, 4, 16, 200
    centres = seeded((classes, dim), 3)
    labels = torch.arange(classes).repeat_interleave(34)[:clips]
    audio = centres[labels] + seeded((clips, dim), 4, 1.6)
    lengths = torch.from_numpy(np.random.RandomState(6).uniform(0.5, 2.0, (classes, texts, 1)).astype(np.float32))
    text = (centres[:, None] + seeded((classes, texts, dim), 5, 1.3)) * lengths
    owner = torch.arange(classes).repeat_interleave(texts).tolist()

    def accuracy(*arguments):
        return 100 * classification_metrics(zero_shot_scores(audio, *arguments), labels)["accuracy"]

    assert accuracy(text.flatten(0, 1), owner, False) == pytest.approx(AUTHORS_FOUR)
    assert accuracy(text[:, 0], range(classes), False) == pytest.approx(AUTHORS_ONE)
    assert accuracy(text.flatten(0, 1), owner) == pytest.approx(60.5)  # cosine: length says nothing of the class


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["dog"], ["{}"], "two labels or more"),
        (["dog", "rain", "dog"], ["{}"], "dog occurs more than once"),
        (["a_b", "a b"], ["{}"], "a b occurs more than once"),
        (["dog", "rain"], ["the sound"], "needs a {}"),
        (["dog", "rain"], [], "needs a {}"),
    ],
)
def test_wrong_labels_are_told(labels, templates, message):
    with pytest.raises(ValueError, match=message):
        class_prompts(labels, templates)


@pytest.mark.parametrize(
    ("scores", "targets", "folds", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), None, "outside 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0]), None, "targets must be"),
        (torch.full((1, 2), torch.inf), torch.tensor([0]), None, "infinite"),
        (torch.zeros(0, 2), torch.zeros(0), None, "empty"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [1, 2], "folds are for accuracy"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [1], "folds must be"),
    ],
)
def test_wrong_inputs_are_told(scores, targets, folds, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(scores, targets, folds)
