import pytest

from datasets_scripts.sounding_world import SYNONYMS, scene
from trainers.metrics.labels import label_metrics, named_labels

WORDS = {"engine": ["engine", "car"], "dog": ["dog"], "rain": ["rain", "thunder storm"]}


def test_counted_by_hand():
    scores = label_metrics(
        ["a car and an engine", "a dog in the rain", "nothing", "A thunder storm!"],
        [["engine", "dog"], ["dog"], ["rain"], ["rain"]],
        WORDS,
    )
    assert scores.named == [["engine"], ["dog", "rain"], [], ["rain"]]
    assert (scores.recall, scores.precision) == (3 / 5, 3 / 4)
    assert scores.f1 == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert scores.recall_per_label == {"engine": 1.0, "dog": 0.5, "rain": 0.5}
    assert scores.clip_recall == [0.5, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("caption", "labels"),
    [
        ("hotdogs", []),
        ("the dog's bark", ["dog"]),
        ("A thunder storm, far away", ["rain"]),
        ("a thunder and a storm", []),
    ],
)
def test_whole_words_and_phrases_count(caption, labels):
    assert named_labels(caption, WORDS) == labels


def test_references_of_the_world_are_perfect_and_those_of_other_scenes_are_not():
    scenes = [scene("test", index) for index in range(100)]
    labels = [[thing.name for thing in current.heard] for current in scenes]
    captions = [current.captions("heard", 1)[0] for current in scenes]
    right, wrong = (
        label_metrics(captions, labels, SYNONYMS),
        label_metrics(captions[1:] + captions[:1], labels, SYNONYMS),
    )
    assert right.recall == right.precision == right.f1 == 1
    assert wrong.recall < 0.3 and wrong.precision < 0.3


def test_clips_without_labels_and_captions_without_names():
    scores = label_metrics(["", ""], [["dog"], []], WORDS)
    assert (scores.recall, scores.precision, scores.f1) == (0, 1, 0) and scores.clip_recall == [0, None]


@pytest.mark.parametrize(
    ("labels", "message"), [([["dog"]], "labels for 1"), ([["cow"], []], "cow"), ([[], []], "nothing to recall")]
)
def test_wrong_inputs_are_told(labels, message):
    with pytest.raises(ValueError, match=message):
        label_metrics(["a dog", "a dog"], labels, WORDS)
