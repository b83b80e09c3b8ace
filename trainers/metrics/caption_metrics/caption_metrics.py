"""The caption metrics for `evaluate.load("trainers/metrics/caption_metrics")`."""

import datasets
import evaluate

from trainers.metrics.captioning import METRICS, caption_metrics

_DESCRIPTION = "BLEU-1 to 4, ROUGE-L and CIDEr-D without Java; METEOR, SPICE, SPIDEr and FENSE where their files are."
_INPUTS = """
Args:
    predictions (list of str): One caption per clip.
    references (list of list of str): One or more captions per clip.
    metrics (list of str or "all"): Which metrics.
    tokenizer (str): "plain", or "ptb" for the original in Java.

Returns:
    The scores of the corpus by name; with `per_clip=True` also `clips`, the scores of each clip by name; with
    `metrics="all"` also `missing`, if there are metrics whose files are not there.
"""


class CaptionMetrics(evaluate.Metric):
    """Wraps `trainers.metrics.captioning.caption_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references, metrics=METRICS, tokenizer="plain", per_clip=False):
        scores = caption_metrics(predictions, references, metrics, tokenizer)
        result = {**scores.corpus, "missing": scores.missing} if scores.missing else {**scores.corpus}
        return {**result, "clips": scores.clips} if per_clip else result
