"""The metrics as `evaluate.load` gives them, from their local folders and offline."""

import evaluate
import pytest
import torch

from trainers.metrics.captioning import caption_metrics
from trainers.metrics.retrieval import retrieval_metrics

CAPTIONS = ["a dog barks", "a cat meows loudly", "rain"]
REFERENCES = [["a dog is barking", "the dog barks"], ["a cat meows"], ["rain falls", "it rains", "rain on a roof"]]


@pytest.fixture
def load(request, tmp_path):
    folder = request.config.rootpath / "trainers" / "metrics"
    return lambda name: evaluate.load(str(folder / name), cache_dir=str(tmp_path))


def test_caption_metrics(load):
    metric = load("caption_metrics")
    expected = caption_metrics(CAPTIONS, REFERENCES)
    assert metric.compute(predictions=CAPTIONS, references=REFERENCES) == pytest.approx(expected.corpus)
    metric.add_batch(predictions=CAPTIONS[:2], references=REFERENCES[:2])
    metric.add_batch(predictions=CAPTIONS[2:], references=REFERENCES[2:])
    result = metric.compute(metrics=["cider_d"], per_clip=True)
    assert result == {"cider_d": expected.corpus["cider_d"], "clips": {"cider_d": expected.clips["cider_d"]}}


def test_retrieval_metrics(load):
    scores = torch.rand(6, 9, dtype=torch.float64)
    items = [[0], [1, 2], [3], [4, 8], [5, 6, 7], [0]]
    relevant = torch.zeros(6, 9, dtype=torch.bool)
    for query, own in enumerate(items):
        relevant[query, own] = True
    result = load("retrieval_metrics").compute(predictions=scores.tolist(), references=items)
    assert result == pytest.approx(retrieval_metrics(scores, relevant))
