"""Attentive optimal transport: the token weights are learned by cross-attention between the two sets."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import compute_dtype
from .optimal_transport import Transport, optimal_transport


class TransportScorer(nn.Module):
    r"""Weights of the tokens of each set, by how they attend to the other set.

    alpha = softmax(mean over width of [softmax(Q_a A (K_i I)^T / sqrt d) V_i I] / temperature) for the audio tokens,
    beta with the roles exchanged for the image tokens. `audio_scorer` gives the weights of the audio tokens; the
    released checkpoint calls it `image_scorer`, and the other the other way round. All other names are the same.

    The defaults are those of the released code: multi-head attention behind the linear maps, weights mixed half and
    half with uniform ones. `TransportScorer(dim, num_heads=None, uniform_mix=0.0)` is the formula of the paper.

    Args:
        dim: Width of the tokens.
        num_heads: Heads of the multi-head attention; None for one plain attention without further projections.
        temperature: Temperature of the softmax over tokens (tau).
        uniform_mix: Share of the uniform weights, from 0 to 1.

    Raises:
        ValueError: If the temperature is not positive or the share is outside [0, 1].

    Source:
        An Eye for an Ear (arXiv 2410.05997), attentive optimal transport.
    """

    def __init__(
        self, dim: int, num_heads: int | None = 8, temperature: float = 20.0, uniform_mix: float = 0.5
    ) -> None:
        """Make both attentions; see the class for the arguments."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature divides the scores and must be positive, got {temperature}")
        if not 0 <= uniform_mix <= 1:
            raise ValueError(f"uniform_mix is the share of the uniform weights, from 0 to 1; got {uniform_mix}")
        self.temperature, self.uniform_mix = temperature, uniform_mix
        self.a_q, self.a_k, self.a_v = (nn.Linear(dim, dim) for _ in range(3))
        self.i_q, self.i_k, self.i_v = (nn.Linear(dim, dim) for _ in range(3))
        if num_heads is None:
            self.audio_scorer = self.image_scorer = None
        else:
            self.audio_scorer = nn.MultiheadAttention(dim, num_heads, batch_first=True)
            self.image_scorer = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(
        self,
        audio_tokens: Tensor,
        image_tokens: Tensor,
        audio_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score both sets.

        Args:
            audio_tokens: `[B, n, d]`.
            image_tokens: `[B, m, d]`.
            audio_mask: `[B, n]` bool, True for real tokens. Padding gets weight 0 and is not attended to.
            image_mask: `[B, m]` bool, likewise.

        Returns:
            Audio weights `[B, n]` and image weights `[B, m]`, float32 (float64 for float64 tokens), of sum 1.
        """
        # Padding may hold anything; 0 x NaN would still reach the real tokens through the attention.
        if audio_mask is not None:
            audio_tokens = audio_tokens.masked_fill(~audio_mask[..., None], 0)
        if image_mask is not None:
            image_tokens = image_tokens.masked_fill(~image_mask[..., None], 0)
        dtype = self.a_q.weight.dtype
        audio, image = audio_tokens.to(dtype), image_tokens.to(dtype)
        heard = _attend(self.audio_scorer, self.a_q(audio), self.i_k(image), self.i_v(image), image_mask)  # [B, n, d]
        seen = _attend(self.image_scorer, self.i_q(image), self.a_k(audio), self.a_v(audio), audio_mask)  # [B, m, d]
        return self._weights(heard, audio_mask), self._weights(seen, image_mask)

    def _weights(self, attended: Tensor, mask: Tensor | None) -> Tensor:
        scores = attended.to(compute_dtype(attended)).mean(2) / self.temperature
        real = torch.ones_like(scores) if mask is None else mask.to(scores.dtype)
        weights = torch.softmax(scores.masked_fill(real == 0, -torch.inf), 1)
        return torch.lerp(weights, real / real.sum(1, keepdim=True), self.uniform_mix)


def _attend(
    attention: nn.MultiheadAttention | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    if attention is None:
        return F.scaled_dot_product_attention(query, key, value, None if mask is None else mask[:, None, :])
    attended: Tensor
    attended, _ = attention(query, key, value, None if mask is None else ~mask, need_weights=False)
    return attended


def attentive_transport(
    audio_tokens: Tensor,
    image_tokens: Tensor,
    audio_weights: Tensor | None,
    image_weights: Tensor | None,
    entropy_weight: float,
    *,
    audio_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    pair_confidence: Tensor | None = None,
    return_plan: bool = False,
    **solver_options: Any,
) -> Tensor | Transport:
    r"""OT(alpha, beta) - lambda (H(alpha) + H(beta)): transport between learned weights, kept from collapsing.

    Example:
        ```python
        schedule, scorer = EntropySchedule(), TransportScorer(1024)
        step = schedule(epoch)
        alpha, beta = (None, None) if step.uniform else scorer(audio_tokens, image_tokens)
        loss = attentive_transport(audio_tokens, image_tokens, alpha, beta, step.entropy_weight).mean()
        ```

    Args:
        audio_tokens: `[B, n, d]`.
        image_tokens: `[B, m, d]`.
        audio_weights: alpha `[B, n]`, of sum 1 over the real tokens, from `TransportScorer`; None for uniform
            weights, whose entropy is the constant log n.
        image_weights: beta `[B, m]`, likewise.
        entropy_weight: lambda, on the scale of squared distances.
        audio_mask: `[B, n]` bool, True for real tokens.
        image_mask: `[B, m]` bool, likewise.
        pair_confidence: `[B]`, not negative: a factor for each pair's loss, entropies included.
        return_plan: Return a `Transport` (loss, plan, marginal error).
        **solver_options: Options of `optimal_transport`: `solver`, `epsilon`, ...

    Returns:
        `[B]` losses, or a `Transport` if `return_plan`. A loss may be negative.

    Raises:
        ValueError: As `optimal_transport`.

    Source:
        An Eye for an Ear (arXiv 2410.05997), attentive optimal transport.
    """
    transport = optimal_transport(
        audio_tokens,
        image_tokens,
        audio_weights,
        image_weights,
        audio_mask=audio_mask,
        image_mask=image_mask,
        pair_confidence=pair_confidence,
        return_plan=True,
        **solver_options,
    )
    assert isinstance(transport, Transport)
    entropies = entropy(audio_weights, audio_tokens, audio_mask) + entropy(image_weights, image_tokens, image_mask)
    if pair_confidence is not None:
        entropies = entropies * pair_confidence
    loss = transport.loss - entropy_weight * entropies
    return transport._replace(loss=loss) if return_plan else loss


def entropy(weights: Tensor | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Shannon entropy of token weights.

    Args:
        weights: `[B, n]`, of sum 1 over the real tokens; None for uniform ones.
        tokens: `[B, n, d]`, whose weights they are.
        mask: `[B, n]` bool, True for real tokens.

    Returns:
        `[B]`, in nats.
    """
    if weights is None:
        count = torch.full((len(tokens),), tokens.shape[1], device=tokens.device) if mask is None else mask.sum(1)
        return count.to(compute_dtype(tokens)).log()
    weights = weights.to(compute_dtype(weights))
    # where, not xlogy alone: the slope of -w log w is infinite at 0, and padding must give no gradient
    return torch.where(weights > 0, -weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log(), 0).sum(1)


class EntropyStep(NamedTuple):
    """What holds at one moment of training.

    Attributes:
        uniform: Whether uniform weights take the place of the scorer's.
        entropy_weight: lambda.
    """

    uniform: bool
    entropy_weight: float


@dataclass(frozen=True)
class EntropySchedule:
    """Weight of the entropies by epoch: a function of the fractional epoch alone, so a resumed run goes on exactly.

    Uniform weights during the first epoch; from its end lambda falls from `start` to `end`, reached at the end of
    epoch `decay_end`, and stays there. It falls by a step at the end of each epoch (500, 400, 300, 200, 100), as in
    the released code, or linearly.

    Args:
        start: lambda during the uniform epochs and at their end.
        end: lambda from epoch `decay_end` on.
        uniform_epochs: Number of epochs with uniform weights.
        decay_end: Number of epochs after which `end` is reached.
        staircase: Whether lambda falls by steps, at the end of each epoch.

    Raises:
        ValueError: If the fall would end before it begins.

    Source:
        Released code of An Eye for an Ear (arXiv 2410.05997).
    """

    start: float = 500.0
    end: float = 100.0
    uniform_epochs: float = 1.0
    decay_end: float = 5.0
    staircase: bool = True

    def __post_init__(self) -> None:
        """Check the order of the epochs."""
        if self.decay_end <= self.uniform_epochs:
            raise ValueError(f"decay_end ({self.decay_end}) must lie behind uniform_epochs ({self.uniform_epochs})")

    def __call__(self, epoch: float) -> EntropyStep:
        """Look up one moment.

        Args:
            epoch: Epochs done so far, fractional: 0.0 at the very start, 1.5 in the middle of the second epoch.

        Returns:
            Whether weights are uniform, and lambda.
        """
        reached = math.floor(epoch) if self.staircase else epoch
        done = (reached - self.uniform_epochs) / (self.decay_end - self.uniform_epochs)
        done = min(max(done, 0.0), 1.0)
        return EntropyStep(epoch < self.uniform_epochs, self.start + done * (self.end - self.start))
