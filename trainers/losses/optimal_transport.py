"""Optimal transport between the audio and image tokens of each clip: exact, entropic, or with relaxed marginals."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import ot
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
    squared_distances,
)
from .sinkhorn import SinkhornSettings, entropic_transport

MAX_PIVOTS = 10_000_000  # of the network simplex; 512 x 576 tokens take some 10^4


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
    debias: bool = False,
    epsilon_scaling: bool = True,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    return_plan: bool = False,
) -> Tensor | Transport:
    r"""Cost of moving the audio tokens onto the image tokens, with squared Euclidean distances.

    Solvers:
        - `exact`: the earth mover's distance, by POT's network simplex on as many threads as there are cores.
          Value and token gradients are summed over the plan's support (at most n + m - 1 entries) from
          differences of tokens, so nothing cancels: equal sets give exactly 0.
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
        debias: For `sinkhorn`, subtract half the entropic cost of each set to itself, so that equal sets give 0.
        epsilon_scaling: Come down to epsilon in stages. Turning it off pays only for an epsilon above 0.05.
        tolerance: L1 marginal error at which `sinkhorn` and `unbalanced` stop.
        max_iterations: At most so many iterations at the final epsilon; a warning tells when they did not suffice.
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
    if debias and solver != "sinkhorn":
        raise ValueError(f"debias removes the entropic bias of solver='sinkhorn'; it has no meaning for {solver!r}")
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
        loss, plan, error = _ExactTransport.apply(audio, image, a, b, audio_mask, image_mask, return_plan)
    else:
        penalty = marginal_penalty if solver == "unbalanced" else None
        settings = SinkhornSettings(epsilon, penalty, epsilon_scaling, tolerance, max_iterations)
        loss, plan, error, scale = entropic_transport(audio, image, a, b, audio_mask, image_mask, settings)
        if debias:
            for tokens, weights, mask in ((audio, a, audio_mask), (image, b, image_mask)):
                own, *_ = entropic_transport(tokens, tokens, weights, weights, mask, mask, settings, scale)
                loss = loss - own / 2
    if pair_confidence is not None:
        loss = loss * pair_confidence
    return Transport(loss, plan, error) if return_plan else loss


class _ExactTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, image, audio_weights, image_weights, audio_mask, image_mask, return_plan):
        (batch, n, width), m = audio.shape, image.shape[1]
        dtype = audio_weights.dtype
        loss = audio.new_empty(batch, dtype=dtype)
        error = audio.new_empty(batch, dtype=dtype)
        plan = audio.new_zeros((batch, n, m) if return_plan else (0,), dtype=dtype)
        potentials = torch.zeros_like(audio_weights), torch.zeros_like(image_weights)
        a, b = (weights.detach().double().cpu().numpy() for weights in (audio_weights, image_weights))
        supports = []  # of each pair's plan: rows, columns, mass
        workers = _own_cores()
        waiting: deque[Future] = deque()

        def collect() -> None:
            k = len(supports)
            *arrays, error[k] = waiting.popleft().result()
            rows, columns, mass, u, v = (torch.from_numpy(array).to(audio.device) for array in arrays)
            mass = mass.to(dtype)
            loss[k] = torch.dot(
                mass, torch.linalg.vector_norm(_differences(audio, image, k, rows, columns), dim=1) ** 2
            )
            if return_plan:
                plan[k, rows, columns] = mass
            potentials[0][k], potentials[1][k] = u, v
            supports.append((rows, columns, mass))

        with full_precision(audio.device.type), ThreadPoolExecutor(workers) as pool:
            for pairs in chunks(batch, max(n * m, (n + m) * width), audio.device):
                masks = (None if mask is None else mask[pairs] for mask in (audio_mask, image_mask))
                joint, _ = joint_tokens(audio[pairs], image[pairs], *masks, dtype=dtype)
                cost = squared_distances(joint[:, :n], joint[:, n:]).cpu().numpy()
                del joint
                for k in range(len(cost)):
                    waiting.append(pool.submit(_network_simplex, a[pairs][k], b[pairs][k], cost[k]))
                    while len(waiting) > workers:  # costs that wait take memory
                        collect()
            while waiting:
                collect()
        for potential, mask in zip(potentials, (audio_mask, image_mask), strict=True):
            centre_potentials(potential, mask)
        ctx.save_for_backward(audio, image, *potentials, *(part for support in supports for part in support))
        ctx.mark_non_differentiable(plan, error)
        return loss, plan, error

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        audio, image, *potentials = ctx.saved_tensors[:4]
        supports = ctx.saved_tensors[4:]
        grads = [
            torch.zeros_like(tokens, dtype=grad_loss.dtype) if needed else None
            for tokens, needed in zip((audio, image), ctx.needs_input_grad[:2], strict=True)
        ]
        for k, (rows, columns, mass) in enumerate(zip(supports[::3], supports[1::3], supports[2::3], strict=True)):
            force = _differences(audio, image, k, rows, columns).mul_((2 * grad_loss[k] * mass)[:, None])
            for grad, index, sign in ((grads[0], rows, 1), (grads[1], columns, -1)):
                if grad is not None:
                    grad[k].index_add_(0, index, force, alpha=sign)
        weight_grads = (
            potential * grad_loss[:, None] if needed else None
            for potential, needed in zip(potentials, ctx.needs_input_grad[2:4], strict=True)
        )
        token_grads = (
            None if grad is None else grad.to(tokens.dtype) for grad, tokens in zip(grads, (audio, image), strict=True)
        )
        return *token_grads, *weight_grads, None, None, None


def _differences(audio: Tensor, image: Tensor, k: int, rows: Tensor, columns: Tensor) -> Tensor:
    """x_i - y_j of pair k over the support of its plan, [support, d]."""
    dtype = compute_dtype(audio, image)
    return audio[k].index_select(0, rows).to(dtype).sub_(image[k].index_select(0, columns))


def _own_cores() -> int:
    """Cores this process may use: all it is bound to, shared with the other processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _network_simplex(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> tuple:
    """Optimal plan of one pair: its support (rows, columns, mass), both dual potentials, the L1 marginal error."""
    rows, columns = a.nonzero()[0], b.nonzero()[0]
    mass_a, mass_b = a[rows], b[columns]
    active = cost if len(rows) == len(a) and len(columns) == len(b) else cost[np.ix_(rows, columns)]
    # POT lets the interpreter go while it solves, so threads do run side by side.
    plan, log = ot.emd(mass_a, mass_b, active, numItermax=MAX_PIVOTS, log=True, check_marginals=False)
    if log["warning"] is not None:
        raise RuntimeError(f"the network simplex failed on a {active.shape} cost matrix: {log['warning']}")
    error = np.abs(plan.sum(1) - mass_a).sum() + np.abs(plan.sum(0) - mass_b).sum()
    # Tokens without weight: the largest feasible potential is the cost of the first mass they would get.
    u, v = np.empty_like(a), np.empty_like(b)
    u[rows], v[columns] = log["u"], log["v"]
    if len(rows) < len(a):
        idle = a == 0
        u[idle] = (cost[np.ix_(idle, columns)] - log["v"]).min(1)
    if len(columns) < len(b):
        idle = b == 0
        v[idle] = (cost[np.ix_(rows, idle)] - log["u"][:, None]).min(0)
    i, j = plan.nonzero()
    return rows[i], columns[j], plan[i, j], u, v, error
