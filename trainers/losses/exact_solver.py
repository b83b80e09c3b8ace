"""Exact optimal transport by shortlist and price: a network simplex that need not look at every arc.

Most arcs of the full bipartite graph lie in no optimal plan, yet a network simplex spends most of its time on them.

1. `entropic_potentials` estimates the dual potentials of a whole batch with a few Sinkhorn iterations.
2. `solve_exactly` shortlists the arcs of one pair whose reduced costs c_ij - u_i - v_j are small, adds those of a
   feasible plan, and solves the transport problem on the shortlist with POT's network simplex.
3. All arcs are priced with the dual potentials (u, v) of that solution. Lowering each v_j by the most negative reduced
   cost of its column makes (u, v) feasible for the full problem, so by weak duality the plan costs at most
   <P, C> - <a, u> - <b, v> more than an optimal one. A gap within rounding proves the plan optimal. Otherwise (u, v)
   and the plan make the next shortlist.
"""

from typing import Any, NamedTuple

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from ot.backend import NumpyBackend
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]
Arcs = tuple[Indices, Indices]  # rows and columns
Flags = NDArray[np.bool_]

MIN_ARCS = 180 * 180  # a smaller problem is solved sooner than shortlisted
ARCS = 14  # of a shortlist, for each row or column, whichever are more
FEWEST_ARCS = 7  # of any row or column
SAMPLE_STRIDE = 101  # the threshold of a shortlist comes from every 101st reduced cost; a prime, to meet all columns
ROUNDING = 1e-11  # gap that is none, relative to the cost of the plan
POT_ROUNDING = 5e-10  # gap that is none where all arcs of negative reduced cost were on the shortlist
MAX_ROUNDS = 10  # one or two are the rule
MASS_ERROR = 1e-12  # L1 distance of a plan's marginals from the weights, by rounding
MAX_PIVOTS = 10_000_000  # of the network simplex; 512 x 576 tokens take some 10^4

EPSILON = 0.25  # of the entropic potentials, relative to the threshold of a shortlist
MAX_ITERATIONS, CHECK_EVERY = 30, 10  # each check waits for the device
CONVERGED, STALLING = 0.02, 0.7  # L1 marginal error, and its decrease between two checks, at which to stop
FAR = 0.1  # marginal error after the first check that calls for a coarse problem
GROUPS = 96  # of rows and of columns in the coarse problem
MIN_EXPONENT = -60.0  # products with a kernel that underflows take ten times as long


class Estimate(NamedTuple):
    """Dual potentials of one pair to begin with.

    Attributes:
        u: `[n]`, of the rows; without meaning where the weight is zero.
        v: `[m]`, of the columns, likewise.
    """

    u: Floats
    v: Floats


class Solution(NamedTuple):
    """An optimal plan of one pair, and the dual potentials that prove it optimal.

    Attributes:
        rows: `[s]`, where the plan is positive, at most n + m - 1 entries.
        columns: `[s]`, likewise.
        mass: `[s]`, what the plan moves there.
        u: `[n]`, dual potentials of the rows.
        v: `[m]`, dual potentials of the columns.
        marginal_error: L1 distance of the plan's marginals from the weights.
        shortlist_failed: Whether all arcs went to the simplex because no shortlist had led to a proof.
    """

    rows: Indices
    columns: Indices
    mass: Floats
    u: Floats
    v: Floats
    marginal_error: float
    shortlist_failed: bool


def entropic_potentials(cost: Tensor, a: Tensor, b: Tensor) -> list[Estimate] | list[None]:
    """Estimate the dual potentials of a batch, on the device of the costs.

    A few Sinkhorn iterations do for most token sets. They hardly move mass between distant clusters of unequal weight;
    where that shows, they begin again from the potentials of a coarse problem between groups of rows and columns.

    Args:
        cost: `[c, n, m]`, not negative.
        a: `[c, n]`, weights of the rows, of sum 1.
        b: `[c, m]`, weights of the columns, of sum 1.

    Returns:
        One estimate a pair, on the CPU, or None for each if the problems are too small to need them.
    """
    if cost[0].numel() < MIN_ARCS:
        return [None] * len(cost)
    u, v, error = _sinkhorn(cost, a, b, torch.zeros_like(b), give_up_above=FAR)
    if (error > FAR).any():
        u, v, _ = _sinkhorn(cost, a, b, _coarse_potentials(cost, a, b), give_up_above=torch.inf)
    return [Estimate(*pair) for pair in zip(u.cpu().numpy(), v.cpu().numpy(), strict=True)]


def _sinkhorn(
    cost: Tensor, a: Tensor, b: Tensor, start_v: Tensor, give_up_above: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials [c, n] and [c, m], by iterations in the kernel domain, and L1 marginal errors [c] of their plans."""
    tiny = torch.finfo(cost.dtype).tiny
    idle = None if a.all() and b.all() else (a == 0)[:, :, None] | (b == 0)[:, None]
    reduced = cost - start_v[:, None]
    if idle is not None:
        reduced.masked_fill_(idle, reduced.max())
    u = reduced.amin(2)
    reduced -= u[..., None]
    v = reduced.amin(1)
    reduced -= v[:, None]
    if idle is not None:
        reduced.masked_fill_(idle, torch.inf)
    threshold = reduced.flatten(1)[:, ::SAMPLE_STRIDE].kthvalue(_rank(*cost.shape[1:]) + 1, dim=1).values
    mean = cost.mean((1, 2)).clamp(min=tiny)
    epsilon = EPSILON * torch.where((threshold > 0) & (threshold < mean), threshold, mean)[:, None]
    kernel = reduced.mul_(-1 / epsilon[..., None]).clamp_(min=MIN_EXPONENT).exp_()
    kernel_t = kernel.transpose(1, 2).contiguous()

    scaling_a, error = torch.ones_like(a), torch.full_like(a[:, 0], torch.inf)
    for iteration in range(1, MAX_ITERATIONS + 1):
        # A row vector times the matrix: the other way round MKL's batched product is ten times slower.
        scaling_b = b / torch.bmm(scaling_a[:, None], kernel)[:, 0].clamp_(min=tiny)
        reached = torch.bmm(scaling_b[:, None], kernel_t)[:, 0].clamp_(min=tiny)
        if iteration % CHECK_EVERY == 0:
            previous, error = error, (scaling_a * reached - a).abs().sum(1)
            improving = (error > CONVERGED) & (error < STALLING * previous)
            if not improving.any() or (error > give_up_above).any():
                break
        scaling_a = a / reached
    return u + epsilon * scaling_a.log(), start_v + v + epsilon * scaling_b.log(), error


def _coarse_potentials(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Potentials of the columns [c, m], equal within groups, from exact transport between groups.

    A row belongs to the group of the nearest of a few columns spread over the set, and a column to that of a row.
    """
    (batch, n, m), device = cost.shape, cost.device
    some_rows, some_columns = (
        torch.arange(min(GROUPS, size), device=device) * size // min(GROUPS, size) for size in (n, m)
    )
    row_group, column_group = cost[:, :, some_columns].argmin(2), cost[:, some_rows].argmin(1)
    rows = a.new_zeros(batch, n, len(some_columns)).scatter_(2, row_group[..., None], a[..., None])
    columns = b.new_zeros(batch, m, len(some_rows)).scatter_(2, column_group[..., None], b[..., None])
    mass_a, mass_b = rows.sum(1), columns.sum(1)
    coarse = rows.transpose(1, 2) @ cost @ columns / (mass_a[..., None] * mass_b[:, None]).clamp(min=1e-30)
    problems = zip(*(tensor.double().cpu().numpy() for tensor in (mass_a, mass_b, coarse)), strict=True)
    v = torch.from_numpy(np.stack([solve_exactly(*problem).v for problem in problems]))
    return v.to(device, cost.dtype).gather(1, column_group)


def solve_exactly(a: Floats, b: Floats, cost: Floats, estimate: Estimate | None = None) -> Solution:
    """Find an optimal plan of one pair.

    Args:
        a: `[n]`, weights of the rows, not negative, of sum 1, float64.
        b: `[m]`, weights of the columns, likewise.
        cost: `[n, m]`, not negative.
        estimate: Potentials to begin with. They change the time taken, not the cost of the plan; None to solve on all
            arcs.

    Returns:
        The plan and its dual potentials. Those of a row or column without weight are the largest feasible ones: what
        the first mass given to it would cost.

    Raises:
        RuntimeError: If the network simplex fails on the full problem.
    """
    rows, columns = a.nonzero()[0], b.nonzero()[0]
    if len(rows) == len(a) and len(columns) == len(b):
        return _solve(a, b, cost, estimate)
    if estimate is not None:
        estimate = Estimate(estimate.u[rows], estimate.v[columns])
    part = _solve(a[rows], b[columns], cost[np.ix_(rows, columns)], estimate)
    u, v = np.empty_like(a), np.empty_like(b)
    u[rows], v[columns] = part.u, part.v
    u[a == 0] = (cost[np.ix_(a == 0, columns)] - part.v).min(1)
    v[b == 0] = (cost[np.ix_(rows, b == 0)] - part.u[:, None]).min(0)
    return part._replace(rows=rows[part.rows], columns=columns[part.columns], u=u, v=v)


def _solve(a: Floats, b: Floats, cost: Floats, estimate: Estimate | None) -> Solution:
    """`solve_exactly` for weights that are all positive."""
    b = b * (a.sum() / b.sum())
    scale = float(cost.mean())
    if estimate is None or scale == 0:
        return _solve_all_arcs(a, b, cost)
    u, v = estimate.u, estimate.v
    plan = _north_west_corner(a, b, np.argsort(u), np.argsort(-v))
    reduced = cost - u[:, None]
    reduced -= v
    keep = _shortlist(reduced, plan)
    for _ in range(MAX_ROUNDS):
        solved = _simplex(a, b, cost, keep, u.astype(np.float64), v.astype(np.float64))
        if solved is None:
            break
        plan, mass, u, v = solved
        reduced = cost - u[:, None]
        reduced -= v
        feasible_v = v + np.minimum(reduced.min(0), 0)
        price, bound = mass @ cost[plan], a @ u + b @ feasible_v
        gap = abs(price - bound) / (price + 1e-3 * scale)
        if gap <= ROUNDING or (gap <= POT_ROUNDING and not (reduced < 0)[~keep].any()):
            return Solution(*plan, mass, u, feasible_v, _marginal_error(a, b, plan, mass), shortlist_failed=False)
        keep |= _shortlist(reduced, plan)
    return _solve_all_arcs(a, b, cost)._replace(shortlist_failed=True)


def _rank(n: int, m: int) -> int:
    """Place of a shortlist's threshold among the sampled reduced costs."""
    return min(ARCS * max(n, m), n * m - 1) // SAMPLE_STRIDE


def _shortlist(reduced: Floats, plan: Arcs) -> Flags:
    """Which arcs [n, m] to solve on: those of small reduced cost, some of each row and column, and those of a plan."""
    n, m = reduced.shape
    rank = _rank(n, m)
    keep: Flags = reduced < np.partition(reduced.ravel()[::SAMPLE_STRIDE], rank)[rank]
    few, last = np.flatnonzero(np.count_nonzero(keep, axis=1) < FEWEST_ARCS), min(FEWEST_ARCS, m) - 1
    keep[few[:, None], np.argpartition(reduced[few], last, axis=1)[:, : last + 1]] = True
    few, last = np.flatnonzero(np.count_nonzero(keep, axis=0) < FEWEST_ARCS), min(FEWEST_ARCS, n) - 1
    keep[np.argpartition(reduced[:, few], last, axis=0)[: last + 1], few] = True
    keep[plan] = True
    return keep


def _north_west_corner(a: Floats, b: Floats, rows: Indices, columns: Indices) -> Arcs:
    """Arcs of the plan that serves rows and columns in the order given."""
    ends_a, ends_b = a[rows].cumsum()[:-1], b[columns].cumsum()[:-1]
    ends = np.sort(np.concatenate((ends_a, ends_b)))
    i = np.append(0, np.searchsorted(ends_a, ends, side="right"))
    j = np.append(0, np.searchsorted(ends_b, ends, side="right"))
    return rows[i], columns[j]


def _simplex(
    a: Floats, b: Floats, cost: Floats, keep: Flags, u: Floats, v: Floats
) -> tuple[Arcs, Floats, Floats, Floats] | None:
    """Plan, its mass and dual potentials of the problem that has these arcs only; None if they do not suffice."""
    i, j = np.divmod(np.flatnonzero(keep), len(b))
    # Costs less potentials and a constant rank all plans as before. The simplex begins with the cheapest arc of each
    # column, which is then near an optimal one, and needs costs that are not negative.
    reduced = cost[i, j] - u[i] - v[j]
    lowest = reduced.min()
    arc_costs, unit = _in_simplex_units(reduced - lowest)
    graph = NumpyBackend().coo_matrix(arc_costs, i, j, shape=cost.shape)
    plan, log = ot.emd(a, b, graph, numItermax=MAX_PIVOTS, log=True, check_marginals=False)
    support, mass = (plan.row.astype(np.intp), plan.col.astype(np.intp)), plan.data
    # On arcs that hold no feasible plan POT only warns, and what it returns is too cheap.
    if log["warning"] is not None or _marginal_error(a, b, support, mass) > MASS_ERROR:
        return None
    return support, mass, u + unit * log["u"], v + unit * log["v"] + lowest


def _solve_all_arcs(a: Floats, b: Floats, cost: Floats) -> Solution:
    scaled, unit = _in_simplex_units(cost)
    plan, log = ot.emd(a, b, scaled, numItermax=MAX_PIVOTS, log=True, check_marginals=False)
    if log["warning"] is not None:
        raise RuntimeError(f"the network simplex failed on a {cost.shape} cost matrix: {log['warning']}")
    i, j = plan.nonzero()
    mass, u, v = plan[i, j], unit * log["u"], unit * log["v"]
    return Solution(i, j, mass, u, v, _marginal_error(a, b, (i, j), mass), shortlist_failed=False)


def _marginal_error(a: Floats, b: Floats, plan: Arcs, mass: Floats) -> float:
    rows, columns = np.bincount(plan[0], mass, len(a)), np.bincount(plan[1], mass, len(b))
    return float(np.abs(rows - a).sum() + np.abs(columns - b).sum())


def _in_simplex_units(cost: Floats) -> tuple[Floats, float]:
    """Costs divided by a power of two that makes the largest about 1000, and that power.

    POT prices a missing arc at n + m times the largest cost plus 1, and takes for zero what is small against that.
    """
    _, exponent = np.frexp(cost.max())
    unit = float(np.ldexp(1.0, int(exponent) - 10))
    return cost.astype(np.float64) / unit, unit
