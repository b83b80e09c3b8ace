"""Retrieval metrics: R@k, median and mean rank, mAP@10, from scores alone.

Ties count against the query: an item that does not belong to it but scores the same as one that does is ranked
before it. So a model that scores everything alike finds nothing, and no metric depends on the order of the items.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def relevant_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Ranks of the items that belong to each query.

    Args:
        scores: Similarity of queries and items [queries, items], the higher the closer.
        relevant: Which items belong to which query, bool [queries, items]; at least one per query.

    Returns:
        Ranks from 1 in ascending order, int64 [queries, most items per query], 0 where a query has fewer.

    Raises:
        ValueError: If the shapes differ, a score is not finite, or a query has no relevant item.
    """
    if scores.dim() != 2 or scores.shape != relevant.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(relevant.shape)}"
        raise ValueError(f"scores and relevant must be matrices of one shape, not {shapes}.")
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinite values, which have no rank.")
    scores = scores if scores.is_floating_point() else scores.double()
    relevant = relevant.bool()
    counts = relevant.sum(dim=1)
    if not counts.numel() or not counts.all():
        raise ValueError(f"{int((counts == 0).sum())} of {len(counts)} queries have no relevant item.")

    most = int(counts.max())
    own = scores.masked_fill(~relevant, -torch.inf).topk(most, dim=1).values  # [queries, most], descending
    others = scores.masked_fill(relevant, -torch.inf)
    ranks = torch.zeros_like(own, dtype=torch.int64)
    for place in range(most):  # one pass per relevant item keeps the memory at that of the scores
        before = (others >= own[:, place, None]).sum(dim=1)
        ranks[:, place] = torch.where(place < counts, before + place + 1, 0)
    return ranks


def retrieval_metrics(scores: Tensor, relevant: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Metrics of one direction of retrieval.

    R@k is the share of queries whose best-ranked relevant item is among the first k; the median and mean rank are of
    that item too. mAP@10 averages the precision at each relevant item among the first ten, divided by the number of
    relevant items, ten at most.

    Args:
        scores: Similarity of queries and items [queries, items], the higher the closer.
        relevant: Which items belong to which query, bool [queries, items]; at least one per query.
        ks: For which R@k.

    Returns:
        `r@1`, `r@5`, `r@10`, `median_rank`, `mean_rank` and `map@10`; shares in [0, 1], ranks from 1.

    Raises:
        ValueError: As `relevant_ranks`.
    """
    ranks = relevant_ranks(scores, relevant)
    best = ranks[:, 0].double()
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    among_ten = (ranks > 0) & (ranks <= 10)
    precision = torch.where(among_ten, place.double() / ranks.clamp(min=1), 0.0)
    average_precision = precision.sum(dim=1) / (ranks > 0).sum(dim=1).clamp(max=10)
    return {
        **{f"r@{k}": (best <= k).double().mean().item() for k in ks},
        "median_rank": best.quantile(0.5).item(),
        "mean_rank": best.mean().item(),
        "map@10": average_precision.mean().item(),
    }


def audio_text_retrieval_metrics(
    scores: Tensor, clip_of_caption: Tensor | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Metrics of both directions, for one or several captions per clip.

    From audio to text the best-ranked caption of the clip counts for R@k and the ranks, all of them for mAP@10; from
    text to audio every caption is a query of its own (Clotho's and AudioCaps' convention).

    Args:
        scores: Similarity of clips and captions [clips, captions].
        clip_of_caption: Index of the clip that each caption belongs to [captions].
        ks: For which R@k.

    Returns:
        As `retrieval_metrics`, under `audio_to_text_...` and `text_to_audio_...`.

    Raises:
        ValueError: If the indices do not fit the scores, or as `relevant_ranks`.
    """
    owner = torch.as_tensor(clip_of_caption, device=scores.device)
    if scores.dim() != 2 or owner.shape != scores.shape[1:]:
        raise ValueError(
            f"clip_of_caption must hold one clip per caption: scores are {tuple(scores.shape)} "
            f"[clips, captions], the indices {tuple(owner.shape)}."
        )
    if owner.numel() and not 0 <= int(owner.min()) <= int(owner.max()) < len(scores):
        raise ValueError(f"clip_of_caption names clips outside 0 to {len(scores) - 1}.")
    relevant = torch.arange(len(scores), device=scores.device)[:, None] == owner
    directions = {"audio_to_text": (scores, relevant), "text_to_audio": (scores.T, relevant.T)}
    return {
        f"{direction}_{name}": value
        for direction, matrices in directions.items()
        for name, value in retrieval_metrics(*matrices, ks).items()
    }
