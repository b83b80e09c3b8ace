"""Shortlist and price against POT's simplex on all arcs, and what holds of an optimal plan."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.losses.transport_problems import (
    TOKENS,
    WEIGHTS,
    check_solution,
    checked_solution,
    random_problem,
)
from trainers.losses import exact_solver


@pytest.fixture
def shortlists_at_any_size(monkeypatch):
    monkeypatch.setattr(exact_solver, "MIN_ARCS", 0)


@pytest.mark.usefixtures("shortlists_at_any_size")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    largest=st.sampled_from([3, 30, 200]),
    tokens=st.sampled_from(TOKENS),
    weights=st.sampled_from(WEIGHTS),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e6]),
)
def test_random_problems(seed, largest, tokens, weights, scale):
    checked_solution(*random_problem(seed, largest, tokens, weights, scale))


@pytest.mark.parametrize("tokens", ["normal", "clusters", "duplicates", "line"])
@pytest.mark.parametrize("weights", ["uniform", "peaked"])
def test_no_shortlist_fails(tokens, weights):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        problem = random_problem(generator.integers(2**32), 400, tokens, weights)
        assert not checked_solution(*problem).shortlist_failed


@pytest.mark.usefixtures("shortlists_at_any_size")
def test_wrong_potentials_cost_time_only():
    a, b, cost = random_problem(3, 120, "normal", "attentive")
    generator = np.random.default_rng(0)
    estimate = exact_solver.Estimate(*(1e3 * generator.normal(size=len(weights)) for weights in (a, b)))
    check_solution(exact_solver.solve_exactly(a, b, cost, estimate), a, b, cost)


@pytest.mark.usefixtures("shortlists_at_any_size")
def test_arcs_without_a_feasible_plan_lead_to_the_dense_solver(monkeypatch):
    """POT answers such a problem with a plan that is too cheap, and a warning."""
    a, b, cost = random_problem(4, 120, "normal", "attentive")
    diagonal = np.eye(*cost.shape, dtype=bool)
    monkeypatch.setattr(exact_solver, "_shortlist", lambda reduced, plan: diagonal)
    with pytest.warns(UserWarning, match="infeasible"):
        assert checked_solution(a, b, cost).shortlist_failed


@pytest.mark.usefixtures("shortlists_at_any_size")
def test_potentials_come_near_those_of_an_optimal_plan():
    a, b, cost = random_problem(11, 400, "normal", "attentive")
    tensors = [torch.from_numpy(x)[None].float() for x in (cost, a, b)]
    (estimate,) = exact_solver.entropic_potentials(*tensors)
    solution = exact_solver.solve_exactly(a, b, cost)
    bound = a @ estimate.u + b @ (cost - estimate.u[:, None]).min(0)  # by weak duality, below the optimum
    optimum = solution.mass @ cost[solution.rows, solution.columns]
    assert 0.9 * optimum < bound <= optimum * (1 + 1e-6)


@pytest.mark.usefixtures("shortlists_at_any_size")
def test_potentials_of_a_batch_are_those_of_its_pairs():
    problems = [random_problem(20, 60, "normal", weights) for weights in ("uniform", "zeros")]
    costs, a, b = (torch.stack([torch.from_numpy(p[k]).float() for p in problems]) for k in (2, 0, 1))
    for k, estimate in enumerate(exact_solver.entropic_potentials(costs, a, b)):
        (alone,) = exact_solver.entropic_potentials(costs[k : k + 1], a[k : k + 1], b[k : k + 1])
        used = a[k].numpy() > 0
        np.testing.assert_allclose(estimate.u[used], alone.u[used], rtol=0.02, atol=0.02 * costs[k].mean().item())
