"""The retrieval metrics for `evaluate.load("trainers/metrics/retrieval_metrics")`."""

import datasets
import evaluate
import torch

from trainers.metrics.retrieval import retrieval_metrics

_INPUTS = """
Args:
    predictions (list of list of float): Scores of all items, one row per query.
    references (list of list of int): Indices of the items that belong to each query.

Returns:
    r@1, r@5, r@10, median_rank, mean_rank and map@10; ties count against the query.
"""


class RetrievalMetrics(evaluate.Metric):
    """Wraps `trainers.metrics.retrieval.retrieval_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.List(datasets.Value("float64")),
            "references": datasets.List(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description="R@k, median and mean rank and mAP@10 of one direction of retrieval.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        scores = torch.tensor(predictions, dtype=torch.float64)
        relevant = torch.zeros_like(scores, dtype=torch.bool)
        for query, items in enumerate(references):
            relevant[query, items] = True
        return retrieval_metrics(scores, relevant)
