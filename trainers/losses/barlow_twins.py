"""Barlow Twins: the embeddings of both sides agree in each dimension, and dimensions do not repeat each other."""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather


def barlow_twins(
    audio_embeds: torch.Tensor, other_embeds: torch.Tensor, redundancy_weight: float = 5e-3
) -> torch.Tensor:
    """Distance of the cross-correlation matrix of both embeddings from the identity.

    With z = (x - mean) / std over the batch and C = z_audio^T z_other / batch:
    loss = sum_i (C_ii - 1)^2 + redundancy_weight * sum_{i != j} C_ij^2.
    Under `torch.distributed` the batch is that of all processes; the gradients are such that DDP's mean over processes
    is the gradient of one process with the whole batch.

    Args:
        audio_embeds: `[batch, dim]`, a batch of at least two.
        other_embeds: `[batch, dim]`, matched to `audio_embeds`.
        redundancy_weight: Weight of the off-diagonal terms.

    Returns:
        The loss, a scalar in float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes differ or the batch is smaller than two.

    Source: Zbontar et al., arXiv 2103.03230, equation 1.
    """
    if audio_embeds.shape != other_embeds.shape or audio_embeds.ndim != 2:
        raise ValueError(
            f"embeddings of shapes {list(audio_embeds.shape)} and {list(other_embeds.shape)}; two equal "
            "[batch, dim] are needed"
        )
    if len(audio_embeds) < 2:
        raise ValueError("Barlow Twins needs a batch of at least 2: it normalises over the batch")
    with torch.autocast(audio_embeds.device.type, enabled=False):
        audio_embeds, other_embeds = _global_batch(audio_embeds), _global_batch(other_embeds)
        dtype = torch.promote_types(torch.promote_types(audio_embeds.dtype, other_embeds.dtype), torch.float32)
        correlation = _standardise(audio_embeds.to(dtype)).T @ _standardise(other_embeds.to(dtype)) / len(audio_embeds)
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + redundancy_weight * redundancy


def _global_batch(embeds: torch.Tensor) -> torch.Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return embeds
    return torch.cat(all_gather(embeds))  # type: ignore[no-untyped-call]


def _standardise(embeds: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(embeds, dim=0, correction=0)
    return (embeds - mean) * torch.rsqrt(variance + 1e-5 * variance.mean() + torch.finfo(embeds.dtype).tiny)
