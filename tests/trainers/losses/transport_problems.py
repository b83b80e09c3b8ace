"""Random transport problems, and exact solutions of them checked against POT's simplex on all arcs."""

import numpy as np
import ot
import torch

from trainers.losses.exact_solver import Solution, entropic_potentials, solve_exactly

TOKENS = ("normal", "offset", "clusters", "duplicates", "grid", "line", "equal", "outlier", "constant")
WEIGHTS = ("uniform", "attentive", "peaked", "zeros")


def random_problem(seed, largest, tokens, weights, scale=1.0):
    """Weights a `[n]`, b `[m]` and squared distances `[n, m]`; n and m are from 1 to `largest`."""
    generator = np.random.default_rng(seed)
    n, m, d = *generator.integers(1, largest + 1, 2), generator.integers(1, 40)
    audio, image = generator.normal(size=(n, d)), 0.9 * generator.normal(size=(m, d)) + 0.1
    match tokens:
        case "offset":
            audio += 10
        case "clusters":
            centres = 4 * generator.normal(size=(6, d))
            audio, image = (
                audio + centres[generator.integers(6, size=n)],
                image + centres[generator.integers(6, size=m)],
            )
        case "duplicates":
            audio, image = audio[generator.integers(1 + n // 8, size=n)], image[generator.integers(1 + m // 8, size=m)]
        case "grid":
            audio, image = audio.round(), image.round()
        case "line":
            audio, image = audio[:, :1], image[:, :1]
        case "equal":
            image = audio[generator.integers(n, size=m)]
        case "outlier":
            audio[0] += 1e3
        case "constant":
            audio, image = np.ones((n, d)), np.ones((m, d))
    return *(random_weights(generator, size, weights) for size in (n, m)), scale**2 * ot.dist(audio, image)


def random_weights(generator, size, kind):
    weights = np.ones(size) if kind == "uniform" else np.exp(generator.normal(size=size))
    if kind == "peaked":
        weights **= 6
    if kind == "zeros":
        weights[1:] *= generator.random(size - 1) < 0.6
    return weights / weights.sum()


def checked_solution(a, b, cost) -> Solution:
    """Solve as the loss does, from float32 costs on, and check every claim that is made about the solution."""
    single = torch.from_numpy(cost)[None].float()
    (estimate,) = entropic_potentials(single, *(torch.from_numpy(weights)[None].float() for weights in (a, b)))
    cost = single[0].numpy()
    found = solve_exactly(a, b, cost, estimate)
    return check_solution(found, a, b, cost)


def check_solution(found, a, b, cost) -> Solution:
    """Check plan, cost and dual potentials."""

    exact = cost.astype(np.float64)
    largest = exact.max() or 1.0
    value = found.mass @ exact[found.rows, found.columns]
    expected = largest * ot.emd2(a, b, exact / largest, numItermax=10**7)
    assert (found.mass > 0).all() and len(found.mass) <= np.count_nonzero(a) + np.count_nonzero(b) - 1
    np.testing.assert_allclose(np.bincount(found.rows, found.mass, len(a)), a, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.bincount(found.columns, found.mass, len(b)), b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12 * largest)
    reduced = exact - found.u[:, None] - found.v
    assert reduced[(a > 0)[:, None] | (b > 0)].min() >= -1e-9 * largest
    np.testing.assert_allclose(a @ found.u + b @ found.v, value, rtol=1e-9, atol=1e-9 * largest)
    return found
