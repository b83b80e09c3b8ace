"""Symmetric InfoNCE over the global batch."""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import Checks, compute_dtype, full_precision, prepare_confidence


def contrastive(
    audio_embeds: Tensor,
    other_embeds: Tensor,
    logit_scale: Tensor | float,
    reduction: Literal["mean", "sum"] = "mean",
    pair_confidence: Tensor | None = None,
) -> Tensor:
    r"""Symmetric InfoNCE: each clip has to find its partner among all of the global batch, and the reverse.

    Embeddings are normalised here, so logits are `logit_scale` times cosines. Under `torch.distributed` both sides
    are gathered from all processes with gradients. Each process gets the losses of its own B pairs against the
    global batch; take their mean and let DDP average the gradients over processes as it does: value and gradients
    are then those of one process with the whole batch. (Gradients that reach this process from the losses of the
    others are *summed* here, which is what makes that so.)

    Args:
        audio_embeds: `[B, d]`.
        other_embeds: `[B, d]`, of the paired images or texts.
        logit_scale: Factor of the cosines, a number or 0-d tensor: 1 / temperature, or the *exponential* of CLIP's
            learnable log scale.
        reduction: How the two directions are combined: `"mean"` (DALI's baseline, with temperature 0.05) or `"sum"`
            (VIP-ANT).
        pair_confidence: `[B]`, not negative: a factor for each pair's loss. The pair stays a negative for the others.

    Returns:
        `[B]` losses of this process's pairs.

    Raises:
        ValueError: For NaN, shapes that do not fit, or processes with different batch sizes.

    Source:
        Oord et al. (arXiv 1807.03748); Radford et al. (arXiv 2103.00020), figure 3.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: choose 'mean' or 'sum' of the two directions")
    if audio_embeds.ndim != 2 or audio_embeds.shape != other_embeds.shape:
        raise ValueError(
            f"audio_embeds {list(audio_embeds.shape)} and other_embeds {list(other_embeds.shape)} must both be "
            "[batch, width]; pool token sets first, for instance with mean_tokens"
        )
    checks = Checks()
    for name, embeds in (("audio_embeds", audio_embeds), ("other_embeds", other_embeds)):
        checks.reject(~embeds.detach().isfinite().all(1), f"{name} of pair {{pair}} hold NaN or infinite values")
    pair_confidence = prepare_confidence(checks, pair_confidence, len(audio_embeds))
    checks.raise_if_any()

    dtype = compute_dtype(audio_embeds, other_embeds)
    with full_precision(audio_embeds.device.type):
        audio, other = (F.normalize(embeds.to(dtype), dim=1) for embeds in (audio_embeds, other_embeds))
        all_audio, first = _gather(audio)
        all_other, _ = _gather(other)
        partner = first + torch.arange(len(audio), device=audio.device)
        to_other = F.cross_entropy(logit_scale * audio @ all_other.T, partner, reduction="none")
        to_audio = F.cross_entropy(logit_scale * other @ all_audio.T, partner, reduction="none")
        loss = to_other + to_audio
    if reduction == "mean":
        loss = loss / 2
    return loss if pair_confidence is None else loss * pair_confidence


def mean_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean token of each set, the embedding that the paper's contrastive baseline compares.

    Args:
        tokens: `[B, n, d]`.
        mask: `[B, n]` bool, True for real tokens, at least one a set; None if all are real.

    Returns:
        `[B, d]`, float32 (float64 for float64 tokens).
    """
    tokens = tokens.to(compute_dtype(tokens))
    if mask is None:
        return tokens.mean(1)
    return tokens.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)


def _gather(embeds: Tensor) -> tuple[Tensor, int]:
    """The embeddings of all processes [global B, d] and the row where this process's begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return embeds, 0
    size = torch.tensor([len(embeds)], device=embeds.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    sizes = torch.cat(sizes).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"processes hold batches of {sizes} pairs: a mean over processes needs equal ones (drop_last=True)"
        )
    gathered: Tensor = _AllGather.apply(embeds)  # type: ignore[no-untyped-call]
    return gathered, dist.get_rank() * len(embeds)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = slice(dist.get_rank() * len(local), (dist.get_rank() + 1) * len(local))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # every process's loss pulls at these rows
        return grad[ctx.rows]
