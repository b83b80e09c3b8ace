import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.metrics.retrieval import audio_text_retrieval_metrics, relevant_ranks, retrieval_metrics


def brute_force(scores, relevant):
    """Sorts the items of each query, strangers first among equals, and counts."""
    best, precisions = [], []
    for row, own in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], own[item]))
        hits = [own[item] for item in order]
        best.append(hits.index(True) + 1)
        found = [sum(hits[: place + 1]) / (place + 1) for place in range(min(10, len(hits))) if hits[place]]
        precisions.append(sum(found) / min(10, sum(hits)))
    return {
        **{f"r@{k}": np.mean([rank <= k for rank in best]) for k in (1, 5, 10)},
        "median_rank": np.median(best),
        "mean_rank": np.mean(best),
        "map@10": np.mean(precisions),
    }


@st.composite
def problems(draw):
    queries, items = draw(st.integers(1, 12)), draw(st.integers(1, 25))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))  # few levels: many ties
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = torch.from_numpy(rng.integers(0, levels, (queries, items)) / 7.0 - 1)
    relevant = torch.from_numpy(rng.random((queries, items)) < draw(st.sampled_from([0.05, 0.3, 0.9])))
    relevant[torch.arange(queries), torch.from_numpy(rng.integers(0, items, queries))] = True
    return scores, relevant


@settings(max_examples=200, deadline=None)
@given(problems())
def test_equal_to_brute_force_with_ties(problem):
    assert retrieval_metrics(*problem) == pytest.approx(brute_force(*problem), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_items_and_scale_of_scores_do_not_matter(problem, random):
    scores, relevant = problem
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    expected = retrieval_metrics(scores, relevant)
    assert retrieval_metrics(scores[:, order], relevant[:, order]) == expected
    assert retrieval_metrics(3 * scores + 5, relevant) == expected


@pytest.mark.parametrize("captions", [1, 5])
def test_both_directions_equal_brute_force(captions):
    rng = np.random.default_rng(0)
    clip_of_caption = rng.permutation(np.repeat(np.arange(20), captions))
    scores = torch.from_numpy(rng.integers(0, 9, (20, 20 * captions))).float()
    relevant = torch.from_numpy(np.arange(20)[:, None] == clip_of_caption)
    expected = {
        **{f"audio_to_text_{name}": value for name, value in brute_force(scores, relevant).items()},
        **{f"text_to_audio_{name}": value for name, value in brute_force(scores.T, relevant.T).items()},
    }
    assert audio_text_retrieval_metrics(scores, torch.from_numpy(clip_of_caption)) == pytest.approx(expected)


def test_a_model_that_scores_everything_alike_finds_nothing():
    metrics = audio_text_retrieval_metrics(torch.zeros(50, 50), torch.arange(50))
    assert {value for name, value in metrics.items() if "@" in name} == {0.0}
    assert metrics["audio_to_text_median_rank"] == metrics["text_to_audio_mean_rank"] == 50


def test_a_perfect_model_finds_everything():
    metrics = audio_text_retrieval_metrics(
        torch.eye(30).repeat_interleave(5, dim=1), torch.arange(30).repeat_interleave(5)
    )
    assert {value for name, value in metrics.items() if "r@" in name or "map" in name or "rank" in name} == {1.0}


def test_ranks_of_several_captions():
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]])
    relevant = torch.tensor([[False, True, False, True], [False, True, False, False]])
    assert relevant_ranks(scores, relevant).tolist() == [[3, 4], [3, 0]]


@pytest.mark.parametrize(
    ("scores", "relevant", "message"),
    [
        (torch.zeros(2, 3), torch.ones(3, 2), "one shape"),
        (torch.full((1, 2), torch.nan), torch.ones(1, 2), "NaN"),
        (torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), "1 of 2 queries have no relevant item"),
    ],
)
def test_wrong_inputs_are_told(scores, relevant, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, relevant)


def test_wrong_owners_are_told():
    with pytest.raises(ValueError, match="one clip per caption"):
        audio_text_retrieval_metrics(torch.zeros(2, 4), [0, 1])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        audio_text_retrieval_metrics(torch.zeros(2, 2), [0, 2])
