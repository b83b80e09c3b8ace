"""Barlow Twins: behind a projector the embeddings of both sides agree in each dimension, and dimensions differ."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

VARIANCE_FLOOR = 1e-5  # added to variances, as batch normalisation does


class BarlowTwins(nn.Module):
    """The loss with its projector, which both sides go through: linear layers with batch normalisation and ReLU.

    Under `torch.distributed` the batch is that of all processes; the gradients are such that DDP's mean over processes
    is the gradient of one process with the whole batch.

    Args:
        width (`int`, defaults to 512):
            Width of the embeddings.
        sizes (sequence of `int`, defaults to `(2048, 4096, 4096)`):
            Widths behind the linear layers of the projector.
        redundancy_weight (`float`, defaults to 0.0051):
            Weight of the off-diagonal terms.

    Source:
        Zbontar et al., arXiv 2103.03230; sizes and weight of VIP-ANT's released code.
    """

    def __init__(self, width: int = 512, sizes: Sequence[int] = (2048, 4096, 4096), redundancy_weight: float = 5.1e-3):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip([width, *sizes[:-2]], sizes[:-1], strict=True):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.redundancy_weight = redundancy_weight

    def forward(
        self, audio_embeds: torch.Tensor, other_embeds: torch.Tensor, pair_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            audio_embeds (`torch.Tensor`):
                `[batch, width]`, a batch of at least two.
            other_embeds (`torch.Tensor`):
                `[batch, width]`, matched to `audio_embeds`.
            pair_weight (`torch.Tensor`, *optional*):
                `[batch]`; pairs of weight 0 are left out.

        Returns:
            `torch.Tensor`: a scalar in float32 (float64 for float64 input).

        Raises:
            ValueError: if shapes differ or the batch is smaller than two.
        """
        dtype = torch.promote_types(torch.promote_types(audio_embeds.dtype, other_embeds.dtype), torch.float32)
        with torch.autocast(audio_embeds.device.type, enabled=False):
            audio, other = (global_batch(side.to(dtype)) for side in (audio_embeds, other_embeds))
            if pair_weight is not None and not (kept := global_batch(pair_weight) > 0).all():
                audio, other = audio[kept], other[kept]
            return correlation_loss(self.projector(audio), self.projector(other), self.redundancy_weight)


def correlation_loss(one: torch.Tensor, other: torch.Tensor, redundancy_weight: float) -> torch.Tensor:
    """Distance of the cross-correlation matrix of two batches from the identity.

    With z = (x - mean) / std over the batch and C = z_one^T z_other / batch:
    loss = sum_i (C_ii - 1)^2 + redundancy_weight * sum_{i != j} C_ij^2.

    Args:
        one (`torch.Tensor`):
            `[batch, dim]`, a batch of at least two.
        other (`torch.Tensor`):
            `[batch, dim]`, matched to `one`.
        redundancy_weight (`float`):
            Weight of the off-diagonal terms.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if shapes differ or the batch is smaller than two.

    Source:
        Zbontar et al., arXiv 2103.03230, equation 1.
    """
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(
            f"embeddings of shapes {list(one.shape)} and {list(other.shape)}; two equal [batch, dim] are needed"
        )
    if len(one) < 2:
        raise ValueError("Barlow Twins needs a batch of at least 2: it normalises over the batch")
    correlation = standardise(one).T @ standardise(other) / len(one)
    diagonal = correlation.diagonal()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + redundancy_weight * redundancy


def global_batch(embeds: torch.Tensor) -> torch.Tensor:
    """The embeddings of all processes, with gradients."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return embeds
    return torch.cat(all_gather(embeds))


def standardise(embeds: torch.Tensor) -> torch.Tensor:
    """`[batch, dim]`, of mean 0 and variance 1 over the batch."""
    variance, mean = torch.var_mean(embeds, dim=0, correction=0)
    return (embeds - mean) * torch.rsqrt(variance + VARIANCE_FLOOR)
