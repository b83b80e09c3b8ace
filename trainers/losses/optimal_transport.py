"""Optimal transport between the audio and image tokens of each clip: exact, entropic, or with relaxed marginals."""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import (
    Checks,
    centre_potentials,
    chunks,
    compute_dtype,
    full_precision,
    joint_tokens,
    prepare_confidence,
    prepare_tokens,
    prepare_weights,
    rows_of,
    scale_gradients,
    squared_distances,
)
from .exact_solver import Estimate, Floats, Solution, entropic_potentials, solve_exactly
from .sinkhorn import SinkhornSettings, entropic_transport


class Transport(NamedTuple):
    """Losses with what led to them.

    Attributes:
        loss: `[B]`, with gradients.
        plan: `[B, n, m]`: how much of audio token i goes to image token j. No gradient; zero at padding.
        marginal_error: `[B]`, L1 distance of the plan's marginals from the weights: rounding for `exact`, what was
            left when `sinkhorn` stopped (its plan is then rounded onto the marginals), the mass that was created or
            destroyed for `unbalanced`.
    """

    loss: Tensor
    plan: Tensor
    marginal_error: Tensor


def optimal_transport(
    audio_tokens: Tensor,
    image_tokens: Tensor,
    audio_weights: Tensor | None = None,
    image_weights: Tensor | None = None,
    solver: Literal["exact", "sinkhorn", "unbalanced"] = "exact",
    *,
    audio_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    pair_confidence: Tensor | None = None,
    epsilon: float = 5e-4,
    marginal_penalty: float = 1.0,
    return_plan: bool = False,
) -> Tensor | Transport:
    r"""Cost of moving the audio tokens onto the image tokens, with squared Euclidean distances.

    Solvers:
        - `exact`: the earth mover's distance, proven optimal pair by pair on as many threads as there are cores (see
          `exact_solver`). Value and token gradients are summed over the plan's support (at most n + m - 1 entries)
          from differences of tokens, so nothing cancels: equal sets give exactly 0.
        - `sinkhorn`: entropic plans of the whole batch on the tokens' device. The loss is the transport cost
          <P, C> of the plan, rounded to its marginals, without the entropic term.
        - `unbalanced`: entropic plans whose marginals may differ from the weights, for clips whose picture shows what
          does not sound: the loss is <P, C> + rho KL(P 1 | a) + rho KL(P^T 1 | b).

    Gradients hold the plan fixed (envelope theorem); weights get the dual potentials, centred over the real tokens.
    Computed in float32 (float64 for float64 inputs), the network simplex in float64; differentiable once.

    Args:
        audio_tokens: `[B, n, d]`, any floating type.
        image_tokens: `[B, m, d]`.
        audio_weights: `[B, n]`, not negative and of sum 1 over the real tokens; None for uniform weights.
        image_weights: `[B, m]`, likewise.
        solver: See above.
        audio_mask: `[B, n]` bool, True for real tokens. Padding has no weight; what stands there, NaN included, has
            no effect.
        image_mask: `[B, m]` bool, likewise.
        pair_confidence: `[B]`, not negative: a factor for each pair's loss.
        epsilon: Entropic regularisation of `sinkhorn` and `unbalanced`, relative to the pair's mean cost.
        marginal_penalty: rho of `unbalanced`, relative to the pair's mean cost. Infinity would be `sinkhorn`.
        return_plan: Return the plan and its marginal error too.

    Returns:
        `[B]` losses, or a `Transport` if `return_plan`.

    Raises:
        ValueError: For NaN, shapes that do not fit, weights that are negative or do not sum to 1, an unknown solver.
        RuntimeError: If the network simplex does not finish.

    Source:
        An Eye for an Ear (arXiv 2410.05997), distribution alignment by optimal transport.
    """
    if solver not in ("exact", "sinkhorn", "unbalanced"):
        raise ValueError(f"solver is {solver!r}: choose 'exact', 'sinkhorn' or 'unbalanced'")
    if epsilon <= 0 or marginal_penalty <= 0:
        raise ValueError(f"epsilon ({epsilon}) and marginal_penalty ({marginal_penalty}) must be positive")
    checks = Checks()
    audio, image = prepare_tokens(checks, audio_tokens, image_tokens, audio_mask, image_mask)
    dtype = compute_dtype(audio, image)
    a = prepare_weights(checks, "audio", audio_weights, audio, audio_mask, dtype)
    b = prepare_weights(checks, "image", image_weights, image, image_mask, dtype)
    pair_confidence = prepare_confidence(checks, pair_confidence, len(audio))
    checks.raise_if_any()

    if solver == "exact":
        loss, plan, error = _ExactTransport.apply(  # type: ignore[no-untyped-call]
            audio, image, a, b, audio_mask, image_mask, return_plan
        )
    else:
        settings = SinkhornSettings(epsilon, marginal_penalty if solver == "unbalanced" else None)
        loss, plan, error = entropic_transport(audio, image, a, b, audio_mask, image_mask, settings)
    if pair_confidence is not None:
        loss = loss * pair_confidence
    return Transport(loss, plan, error) if return_plan else loss


class _ExactTransport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        audio: Tensor,
        image: Tensor,
        audio_weights: Tensor,
        image_weights: Tensor,
        audio_mask: Tensor | None,
        image_mask: Tensor | None,
        return_plan: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, n, _), m = audio.shape, image.shape[1]
        dtype = audio_weights.dtype
        loss, error = audio.new_empty(2, batch, dtype=dtype)
        plan = audio.new_zeros((batch, n, m) if return_plan else (0,), dtype=dtype)
        potentials = torch.zeros_like(audio_weights), torch.zeros_like(image_weights)
        # Gradients for a unit loss: the backward pass only scales them.
        grads = [
            torch.zeros_like(tokens, dtype=dtype) if needed else None
            for tokens, needed in zip((audio, image), ctx.needs_input_grad[:2], strict=True)
        ]
        failures = 0
        with full_precision(audio.device.type):
            problems = _problems(audio, image, audio_weights, image_weights, audio_mask, image_mask)
            for k, solution in enumerate(_solve_in_threads(problems)):
                rows, columns, mass, u, v = (torch.from_numpy(array).to(audio.device) for array in solution[:5])
                mass = mass.to(dtype)
                moves = audio[k].index_select(0, rows).to(dtype).sub_(image[k].index_select(0, columns))
                loss[k] = torch.dot(mass, torch.linalg.vector_norm(moves, dim=1).square())
                moves *= 2 * mass[:, None]
                for grad, index, sign in ((grads[0], rows, 1), (grads[1], columns, -1)):
                    if grad is not None:
                        grad[k].index_add_(0, index, moves, alpha=sign)
                if return_plan:
                    plan[k, rows, columns] = mass
                potentials[0][k], potentials[1][k] = u, v
                error[k] = solution.marginal_error
                failures += solution.shortlist_failed
        if failures:
            warnings.warn(
                f"{failures} of {batch} pairs needed the network simplex on all arcs, because no shortlist led to a "
                "proof of optimality: their results are exact too, but took longer",
                stacklevel=3,
            )
        for potential, mask in zip(potentials, (audio_mask, image_mask), strict=True):
            centre_potentials(potential, mask)
        ctx.save_for_backward(*grads, *potentials)
        ctx.dtypes = audio.dtype, image.dtype
        ctx.mark_non_differentiable(plan, error)
        return loss, plan, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *grads, audio_potentials, image_potentials = ctx.saved_tensors
        weight_grads = (
            potentials * grad_loss[:, None] if needed else None
            for potentials, needed in zip((audio_potentials, image_potentials), ctx.needs_input_grad[2:4], strict=True)
        )
        return *scale_gradients(grads, grad_loss, ctx.dtypes), *weight_grads, None, None, None


def _problems(
    audio: Tensor,
    image: Tensor,
    audio_weights: Tensor,
    image_weights: Tensor,
    audio_mask: Tensor | None,
    image_mask: Tensor | None,
) -> Iterator[tuple[Floats, Floats, Floats, Estimate | None]]:
    """Arguments of `solve_exactly`, pair by pair; costs and first potentials are computed on the tokens' device."""
    (batch, n, width), m = audio.shape, image.shape[1]
    a64, b64 = (weights.detach().double().cpu().numpy() for weights in (audio_weights, image_weights))
    for pairs in chunks(batch, max(n * m, (n + m) * width), audio.device):
        masks = rows_of(audio_mask, pairs), rows_of(image_mask, pairs)
        joint, _ = joint_tokens(audio[pairs], image[pairs], *masks, dtype=audio_weights.dtype)
        cost = squared_distances(joint[:, :n], joint[:, n:])
        del joint
        estimates = entropic_potentials(cost, audio_weights[pairs], image_weights[pairs])
        yield from zip(a64[pairs], b64[pairs], cost.cpu().numpy(), estimates, strict=True)


def _solve_in_threads(problems: Iterable[tuple[Floats, Floats, Floats, Estimate | None]]) -> Iterator[Solution]:
    """Solutions in the order of the problems, which are drawn while the ones before are being solved."""
    workers = _own_cores()
    waiting: deque[Future[Solution]] = deque()
    with ThreadPoolExecutor(workers) as pool:  # POT lets the interpreter go while it solves
        for problem in problems:
            waiting.append(pool.submit(solve_exactly, *problem))
            if len(waiting) > workers:  # costs that wait take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _own_cores() -> int:
    """Cores this process may use: all it is bound to, shared with the other processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
