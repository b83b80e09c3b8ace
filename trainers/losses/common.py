"""What every loss on token sets shares: checks of the input, full precision, a common origin, and work in chunks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WEIGHT_SUM_TOLERANCE = 1e-4
# Elements of one [chunk, n, m] matrix: small enough to stay in a CPU's cache, large enough to fill an accelerator.
CHUNK_ELEMENTS = {"cpu": 2**20}
ACCELERATOR_CHUNK_ELEMENTS = 2**27


class Checks:
    """Collects conditions that would make a loss meaningless; one transfer from the device tells whether any holds."""

    def __init__(self) -> None:
        """Start with nothing found."""
        self._found: list[tuple[Tensor, str]] = []

    def reject(self, bad: Tensor, message: str) -> None:
        """Note a condition.

        Args:
            bad: `[B]` bool, where the condition holds.
            message: What is wrong and what to do; `{pair}` stands for the first pair concerned.
        """
        self._found.append((bad, message))

    def raise_if_any(self) -> None:
        """Raise for the first condition that holds somewhere.

        Raises:
            ValueError: With the message of that condition and the pair it was found in.
        """
        if not self._found:
            return
        bad = torch.stack([flags for flags, _ in self._found]).cpu()
        for flags, (_, message) in zip(bad, self._found, strict=True):
            if flags.any():
                raise ValueError(message.format(pair=int(flags.nonzero()[0])))


def prepare_tokens(
    checks: Checks,
    audio_tokens: Tensor,
    image_tokens: Tensor,
    audio_mask: Tensor | None,
    image_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check two batches of token sets and set their padding to zero.

    Args:
        checks: Where conditions on values are noted.
        audio_tokens: `[B, n, d]`.
        image_tokens: `[B, m, d]`.
        audio_mask: `[B, n]` bool, True for real tokens; None if all are real.
        image_mask: `[B, m]` bool, likewise.

    Returns:
        Both batches. What stood at the padding, NaN included, can no longer reach a value or a gradient.

    Raises:
        ValueError: If shapes, types or devices do not fit each other.
    """
    for name, tokens in (("audio_tokens", audio_tokens), ("image_tokens", image_tokens)):
        if tokens.ndim != 3 or 0 in tokens.shape[1:] or not tokens.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor [batch, tokens, width] with at least one token, "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
    if audio_tokens.shape[0] != image_tokens.shape[0]:
        raise ValueError(
            f"audio_tokens hold {audio_tokens.shape[0]} clips but image_tokens {image_tokens.shape[0]}: "
            "the k-th audio set is aligned with the k-th image set, so both need the same batch size"
        )
    if audio_tokens.shape[2] != image_tokens.shape[2]:
        raise ValueError(
            f"audio_tokens are {audio_tokens.shape[2]} wide but image_tokens {image_tokens.shape[2]}: "
            "project the audio tokens to the width of the image tokens first"
        )
    if audio_tokens.device != image_tokens.device:
        raise ValueError(f"audio_tokens are on {audio_tokens.device} but image_tokens on {image_tokens.device}")
    return (
        _fill_padding(checks, "audio", audio_tokens, audio_mask),
        _fill_padding(checks, "image", image_tokens, image_mask),
    )


def _fill_padding(checks: Checks, side: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"{side}_mask must be bool {list(tokens.shape[:2])} (True for real tokens), "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        checks.reject(~mask.any(1), f"{side}_mask of pair {{pair}} marks no token as real: drop this pair")
        tokens = tokens.masked_fill(~mask[..., None], 0)
    # A sum is finite only if every term is, and costs one pass without a temporary of the tokens' size.
    total = tokens.detach().sum((1, 2), dtype=compute_dtype(tokens))
    checks.reject(
        ~total.isfinite(),
        f"{side}_tokens of pair {{pair}} hold NaN or infinite values: look for a diverged encoder, "
        "an fp16 overflow or an unreadable clip before the loss",
    )
    return tokens


def prepare_weights(
    checks: Checks, side: str, weights: Tensor | None, tokens: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Check the weights of a batch of token sets, or make uniform ones.

    Args:
        checks: Where conditions on values are noted.
        side: `"audio"` or `"image"`, for messages.
        weights: `[B, n]`, non-negative, each row of sum 1 and zero at padding; None for uniform ones.
        tokens: `[B, n, d]`.
        mask: `[B, n]` bool, True for real tokens; None if all are real.
        dtype: Type of the result.

    Returns:
        `[B, n]` weights.

    Raises:
        ValueError: If the shape does not fit the tokens.
    """
    real = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device) if mask is None else mask.to(dtype)
    if weights is None:
        return real / real.sum(1, keepdim=True)
    name = f"{side}_weights"
    if weights.shape != tokens.shape[:2]:
        raise ValueError(f"{name} must be {list(tokens.shape[:2])} like the tokens, got {list(weights.shape)}")
    weights = weights.to(dtype)
    values = weights.detach()
    total = values.sum(1)
    checks.reject(~total.isfinite(), f"{name} of pair {{pair}} hold NaN or infinite values")
    checks.reject((values < 0).any(1), f"{name} of pair {{pair}} hold a negative weight: pass probabilities")
    checks.reject(
        (values * (1 - real) != 0).any(1),
        f"{name} of pair {{pair}} put weight on padding: apply {side}_mask before the softmax",
    )
    checks.reject(
        (total - 1).abs() > WEIGHT_SUM_TOLERANCE,
        f"{name} of pair {{pair}} do not sum to 1: divide them by their sum over the real tokens",
    )
    return weights


def prepare_confidence(checks: Checks, pair_confidence: Tensor | None, batch: int) -> Tensor | None:
    """Check the factor of each pair's loss.

    Args:
        checks: Where conditions on values are noted.
        pair_confidence: `[B]`, finite and not negative; None if every pair counts fully.
        batch: B.

    Returns:
        The same factors.

    Raises:
        ValueError: If the shape is not `[B]`.
    """
    if pair_confidence is None:
        return None
    if pair_confidence.shape != (batch,):
        raise ValueError(f"pair_confidence must be [{batch}], one factor a pair, got {list(pair_confidence.shape)}")
    values = pair_confidence.detach()
    checks.reject(
        ~(values.isfinite() & (values >= 0)), "pair_confidence of pair {pair} is negative or not finite: use >= 0"
    )
    return pair_confidence


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type a loss is computed in.

    Args:
        *tensors: Its inputs.

    Returns:
        float64 if one of them is, else float32.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute in the tensors' own precision, whatever autocast, TF32 or bf16 matrix products are set outside.

    Squared distances by a matrix product lose all meaning for near tokens with TF32's ten bits.

    Args:
        device_type: Kind of device that the tensors are on, as in `tensor.device.type`.

    Yields:
        Nothing.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    outside = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, outside, strict=True):
            backend.fp32_precision = precision


def chunks(batch: int, elements_per_pair: int, device: torch.device) -> Iterator[slice]:
    """Split a batch so that working memory does not grow with it.

    Args:
        batch: Number of pairs.
        elements_per_pair: Size of a pair's largest matrix.
        device: Device of the tokens.

    Yields:
        Slices of the batch, in order.
    """
    size = max(1, CHUNK_ELEMENTS.get(device.type, ACCELERATOR_CHUNK_ELEMENTS) // max(1, elements_per_pair))
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def rows_of(mask: Tensor | None, pairs: slice) -> Tensor | None:
    """The part of a mask that belongs to some pairs.

    Args:
        mask: `[B, n]` bool or None.
        pairs: A slice of the batch.

    Returns:
        `[c, n]`, or None without a mask.
    """
    return None if mask is None else mask[pairs]


def joint_tokens(
    audio: Tensor, image: Tensor, audio_mask: Tensor | None, image_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both token sets of each pair as one, about their common mean.

    Distances do not see the origin, but |x|^2 + |y|^2 - 2 x.y does: an offset that is large against the distances
    would cancel their digits. The first real audio token is subtracted before the mean, so that equal tokens
    become exactly zero.

    Args:
        audio: `[c, n, d]`, zero at padding.
        image: `[c, m, d]`, zero at padding.
        audio_mask: `[c, n]` bool or None.
        image_mask: `[c, m]` bool or None.
        dtype: To compute in.

    Returns:
        The joint tokens `[c, n + m, d]` (a copy; padding is zero) and `[c, n + m]` ones for real tokens, else zeros.
    """
    n, m = audio.shape[1], image.shape[1]
    joint = audio.new_empty(len(audio), n + m, audio.shape[2], dtype=dtype)
    real = joint.new_ones(joint.shape[:2])
    first = audio[:, 0]
    if audio_mask is not None:
        real[:, :n] = audio_mask
        first = audio[torch.arange(len(audio), device=audio.device), audio_mask.to(torch.uint8).argmax(1)]
    if image_mask is not None:
        real[:, n:] = image_mask
    for tokens, part in ((audio, joint[:, :n]), (image, joint[:, n:])):
        torch.sub(tokens, first[:, None].to(dtype), out=part)
    masked = audio_mask is not None or image_mask is not None
    if masked:
        joint *= real[..., None]
    joint -= joint.sum(1, keepdim=True) / real.sum(1)[:, None, None]
    if masked:
        joint *= real[..., None]
    return joint, real


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances by one matrix product.

    Args:
        x: `[c, n, d]`, near the origin (see `joint_tokens`).
        y: `[c, m, d]`, likewise.

    Returns:
        `[c, n, m]`, never negative.
    """
    norms_x, norms_y = (torch.linalg.vector_norm(tokens, dim=2).square() for tokens in (x, y))
    return torch.baddbmm(norms_y[:, None], x, y.transpose(1, 2), alpha=-2).add_(norms_x[..., None]).clamp_(min=0)


def centre_potentials(potential: Tensor, mask: Tensor | None) -> None:
    """Give dual potentials mean zero over real tokens, and zero at padding, in place.

    A constant in them is no information: weights that sum to 1 cannot follow it.

    Args:
        potential: `[B, n]`.
        mask: `[B, n]` bool, or None if all tokens are real.
    """
    if mask is None:
        potential -= potential.mean(1, keepdim=True)
    else:
        potential *= mask
        potential -= potential.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        potential *= mask


def scale_gradients(
    grads: Sequence[Tensor | None], grad_loss: Tensor, dtypes: Sequence[torch.dtype]
) -> Iterator[Tensor | None]:
    """Token gradients of losses that the forward pass has differentiated already.

    Args:
        grads: `[B, n, d]` each, for a unit loss; None where none is needed.
        grad_loss: `[B]`, the gradient with respect to the losses.
        dtypes: Types of the tokens.

    Yields:
        The gradients, in the types of the tokens.
    """
    for grad, dtype in zip(grads, dtypes, strict=True):
        yield None if grad is None else (grad * grad_loss[:, None, None]).to(dtype)
