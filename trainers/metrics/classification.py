"""Zero-shot classification by prompts, and the metrics of any classification: accuracy, mAP, confusion, folds."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

PROMPTS = ("the sound of {}",)


def class_prompts(labels: Sequence[str], templates: Sequence[str] = PROMPTS) -> list[list[str]]:
    """Texts that stand for each class, with blanks for the underscores of the label names.

    Args:
        labels: Names of the classes, e.g. `dog_bark`.
        templates: Each with one `{}`; `"{}"` gives the bare name.

    Returns:
        For each template a list with one prompt a class.

    Raises:
        ValueError: If there are fewer than two classes, a name occurs twice, or a template has no `{}`.
    """
    names = [label.replace("_", " ") for label in labels]
    if len(names) < 2:
        raise ValueError(f"Classification needs two labels or more, not {len(names)}.")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Labels must differ; {', '.join(sorted(repeated))} occurs more than once.")
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"Every template needs a {{}} for the label: {list(templates)!r}.")
    return [[template.replace("{}", name) for name in names] for template in templates]


def zero_shot_scores(
    audio_embeddings: Tensor, text_embeddings: Tensor, classes: Sequence[int], cosine: bool = True
) -> Tensor:
    """Similarity of clips and classes: that of the clip and the nearest text of the class.

    Args:
        audio_embeddings (`torch.Tensor`):
            Embeddings of the clips [clips, dim].
        text_embeddings (`torch.Tensor`):
            Embeddings of all texts [texts, dim]; not of unit length where products are wanted.
        classes (sequence of `int`):
            The class of each text, from 0 on; a class may have several.
        cosine (`bool`, defaults to `True`):
            Whether embeddings are given unit length. Without, the length of a text's embedding tips the scales.

    Returns:
        `torch.Tensor`: [clips, classes].

    Source:
        The ensemble of VIP-ANT (arXiv 2112.08995), four prompts a class, whose released code takes products.
    """
    if cosine:
        audio_embeddings, text_embeddings = normalize(audio_embeddings, dim=-1), normalize(text_embeddings, dim=-1)
    similarity = audio_embeddings @ text_embeddings.T  # [clips, texts]
    owner = torch.as_tensor(classes, device=similarity.device).expand_as(similarity)
    scores = similarity.new_full((len(similarity), max(classes) + 1), -torch.inf)
    return scores.scatter_reduce(1, owner, similarity, "amax")


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the precision-recall curve of each class, by steps; clips with equal scores come in at once.

    Args:
        scores: The higher the more likely [clips, classes].
        targets: Which clip has which class, bool [clips, classes].

    Returns:
        float64 [classes]; NaN for classes that no clip has.
    """
    ordered, order = scores.double().sort(dim=0, descending=True)
    hits = targets.bool().gather(0, order).double()
    # Clips with one score share a threshold: the precision of all is that after the last of them.
    last = torch.ones_like(hits, dtype=torch.bool)
    last[:-1] = ordered[:-1] != ordered[1:]
    position = torch.arange(len(scores), device=scores.device)[:, None].expand_as(order)
    threshold = position.masked_fill(~last, len(scores)).flip(0).cummin(dim=0).values.flip(0)
    precision = (hits.cumsum(dim=0) / (position + 1)).gather(0, threshold)
    return (precision * hits).sum(dim=0) / hits.sum(dim=0)


def classification_metrics(
    scores: Tensor, targets: Tensor, folds: Tensor | Sequence[int] | None = None
) -> dict[str, float | Tensor]:
    """Metrics of scores against true classes.

    A clip is right if its class scores higher than every other: a tie is no decision and counts as wrong.

    Args:
        scores: The higher the more likely [clips, classes].
        targets: The class of each clip, int [clips], or for several at once bool [clips, classes].
        folds: Fold of each clip [clips]; accuracy is then the mean over folds (ESC-50, UrbanSound8K). With classes
            known by prompts alone, nothing is trained on the other folds.

    Returns:
        `map` (mean over classes that occur) and `average_precision` [classes]; with one class per clip also
        `accuracy`, `class_accuracy` [classes] (NaN for those that no clip has) and `confusion` [classes, classes],
        true by row, predicted by column (of a tie the first class); with folds also `fold_accuracy` [folds], in
        ascending order.

    Raises:
        ValueError: If the shapes do not fit, a score is not finite or a class is out of range.
    """
    clips, classes = scores.shape
    if not clips or not torch.isfinite(scores).all():
        raise ValueError("scores are empty or hold NaN or infinite values.")
    if targets.shape not in ((clips,), (clips, classes)):
        raise ValueError(f"targets must be [{clips}] or [{clips}, {classes}], not {list(targets.shape)}.")
    if targets.dim() == 2:
        if folds is not None:
            raise ValueError("folds are for accuracy, which several classes per clip do not have.")
        precisions = average_precision(scores, targets)
        return {"map": precisions.nanmean().item(), "average_precision": precisions}

    targets = targets.long()
    if not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(f"targets name classes outside 0 to {classes - 1}.")
    one_hot = torch.nn.functional.one_hot(targets, classes).bool()
    own = scores.gather(1, targets[:, None])
    right = ((scores >= own) & ~one_hot).sum(dim=1) == 0
    confusion = torch.bincount(targets * classes + scores.argmax(dim=1), minlength=classes * classes)
    precisions = average_precision(scores, one_hot)
    result: dict[str, float | Tensor] = {
        "accuracy": right.double().mean().item(),
        "map": precisions.nanmean().item(),
        "average_precision": precisions,
        "class_accuracy": (one_hot & right[:, None]).sum(dim=0).double() / one_hot.sum(dim=0),
        "confusion": confusion.view(classes, classes),
    }
    if folds is not None:
        fold = torch.as_tensor(folds, device=scores.device)
        if fold.shape != targets.shape:
            raise ValueError(f"folds must be [{clips}], not {list(fold.shape)}.")
        by_fold = torch.stack([right[fold == number].double().mean() for number in fold.unique()])
        result |= {"accuracy": by_fold.mean().item(), "fold_accuracy": by_fold}
    return result
