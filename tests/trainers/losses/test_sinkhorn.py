"""Entropic transport against the exact one, POT's solvers and finite differences."""

import warnings

import ot
import pytest
import torch
import torch.nn.functional as F

from tests.trainers.losses.common import make_tokens, make_weights, relative
from trainers.losses import Transport, optimal_transport
from trainers.losses.sinkhorn import SinkhornSettings, entropic_transport


def solve_tightly(audio, image, a, b, epsilon=0.02, marginal_penalty=None):
    settings = SinkhornSettings(epsilon, marginal_penalty, tolerance=1e-9, max_iterations=5000)
    return Transport(*entropic_transport(audio, image, a, b, None, None, settings))


def against_exact(audio, image):
    results = []
    for solver in ("exact", "sinkhorn"):
        tokens = [t.detach().requires_grad_() for t in (audio, image)]
        result = optimal_transport(*tokens, solver=solver, return_plan=True)
        results.append((result, *torch.autograd.grad(result.loss.sum(), tokens)))
    (exact, *exact_grads), (near, *near_grads) = results
    cosines = [
        F.cosine_similarity(x.flatten(1), y.flatten(1)).min() for x, y in zip(exact_grads, near_grads, strict=True)
    ]
    return near.loss / exact.loss - 1, cosines, near


def test_near_exact_at_the_size_of_training():
    torch.manual_seed(1)
    audio, image = torch.randn(2, 512, 1024), torch.randn(2, 576, 1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it converges
        excess, cosines, near = against_exact(audio, image)
    assert excess.abs().max() < 0.02 and excess.min() > -1e-5  # a feasible plan is never cheaper
    assert min(cosines) >= 0.99
    assert near.marginal_error.max() < 5e-3
    torch.testing.assert_close(near.plan.sum(2), torch.full((2, 512), 1 / 512), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(near.plan.sum(1), torch.full((2, 576), 1 / 576), rtol=1e-3, atol=1e-7)


def test_cost_is_near_exact_for_clusters_of_unequal_weight():
    torch.manual_seed(2)
    centres = torch.randn(2, 20, 1024)
    audio, image = (centres[:, torch.randint(20, (k,))] + 0.3 * torch.randn(2, k, 1024) for k in (512, 576))
    excess, _, _ = against_exact(audio, image)
    assert excess.min() >= 0 and excess.max() < 0.02


def test_plan_is_that_of_pot():
    audio, image = make_tokens(2, 12, 15, 6, dtype=torch.float64)
    a, b = make_weights(2, 12, dtype=torch.float64), make_weights(2, 15, seed=1, dtype=torch.float64)
    result = solve_tightly(audio, image, a, b)
    assert result.marginal_error.max() < 1e-6
    for k in range(2):
        cost = torch.cdist(audio[k], image[k]).square()
        plan = ot.sinkhorn(a[k], b[k], cost, float(0.02 * cost.mean()), method="sinkhorn_log", stopThr=1e-12)
        torch.testing.assert_close(result.plan[k], plan, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(result.loss[k], (plan * cost).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [0.1, 1.0])
def test_unbalanced_plan_is_that_of_pot(penalty):
    audio, image = make_tokens(2, 12, 15, 6, dtype=torch.float64)
    a, b = make_weights(2, 12, dtype=torch.float64), make_weights(2, 15, seed=1, dtype=torch.float64)
    result = solve_tightly(audio, image, a, b, marginal_penalty=penalty)
    for k in range(2):
        cost = torch.cdist(audio[k], image[k]).square()
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a[k].numpy(), b[k].numpy(), cost.numpy(), float(0.02 * cost.mean()), float(penalty * cost.mean()),
            reg_type="kl", numItermax=100000, stopThr=1e-13,
        )  # fmt: skip
        torch.testing.assert_close(result.plan[k], torch.from_numpy(plan), rtol=1e-4, atol=1e-8)
        kl = sum(
            (p * (p / w).log() - p + w).sum()
            for p, w in ((result.plan[k].sum(1), a[k]), (result.plan[k].sum(0), b[k]))
        )
        torch.testing.assert_close(result.loss[k], (result.plan[k] * cost).sum() + penalty * cost.mean() * kl)


def test_unbalanced_leaves_an_outlier_alone():
    audio, image = make_tokens(1, 20, 20, 6)
    audio[0, 3] += 100
    plan = optimal_transport(audio, image, solver="unbalanced", marginal_penalty=0.2, return_plan=True).plan[0]
    mass = plan.sum(1) * 20
    assert mass[3] < 0.05 and (mass[torch.arange(20) != 3] > 0.5).all()


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_gradients_are_those_of_the_regularised_optimum(penalty):
    """Finite differences of <P, C> + penalties + epsilon KL(P | a b), whose gradient the envelope theorem gives."""
    audio, image = make_tokens(1, 6, 5, 3, dtype=torch.float64)
    a, b = make_weights(1, 6, dtype=torch.float64), make_weights(1, 5, seed=1, dtype=torch.float64)
    scale = torch.cdist(audio, image).square().mean().item()

    def optimum(audio, image, a, b):
        # epsilon is relative to the mean cost: hold it at its value here while the tokens move
        ratio = scale / torch.cdist(audio, image).square().mean().item()
        result = solve_tightly(audio, image, a, b, 0.02 * ratio, None if penalty is None else penalty * ratio)
        product = a[:, :, None] * b[:, None]
        plan = result.plan
        entropy = (torch.special.xlogy(plan, plan / product) - plan + product).sum()
        return (result.loss + 0.02 * scale * entropy).item()

    inputs = [t.clone().requires_grad_() for t in (audio, image, a, b)]
    loss = solve_tightly(*inputs, marginal_penalty=penalty).loss
    grads = torch.autograd.grad(loss.sum(), inputs)
    for k, grad in enumerate(grads):
        for _ in range(3):
            direction = torch.randn_like(grad)
            if k >= 2:
                direction -= direction.mean()
            values = []
            for sign in (1e-4, -1e-4):
                moved = [t + sign * direction if j == k else t for j, t in enumerate((audio, image, a, b))]
                values.append(optimum(*moved))
            slope = (values[0] - values[1]) / 2e-4
            assert abs(slope - (grad * direction).sum().item()) < 1e-4 * (grad.norm() * direction.norm()).item()


def test_weight_gradients_come_near_the_exact_ones():
    audio, image = make_tokens(1, 30, 40, 8, dtype=torch.float64)
    grads = {}
    for solver in ("exact", "sinkhorn"):
        weights = [make_weights(1, k, dtype=torch.float64).requires_grad_() for k in (30, 40)]
        grads[solver] = torch.autograd.grad(optimal_transport(audio, image, *weights, solver=solver).sum(), weights)
    for exact, near in zip(grads["exact"], grads["sinkhorn"], strict=True):
        assert relative(near, exact) < 0.05


def test_no_weight_on_a_token_is_no_mass():
    audio, image = make_tokens(1, 6, 5, 3)
    a = torch.tensor([[0.5, 0, 0.5, 0, 0, 0]], requires_grad=True)
    for solver in ("sinkhorn", "unbalanced"):
        result = optimal_transport(audio, image, a, solver=solver, return_plan=True)
        assert not result.plan[0, [1, 3, 4, 5]].any()
        assert torch.autograd.grad(result.loss.sum(), a)[0].isfinite().all()


def test_stopping_early_warns_with_the_residual():
    audio, image = make_tokens(2, 40, 50, 4)
    a, b = torch.full((2, 40), 1 / 40), torch.full((2, 50), 1 / 50)
    with pytest.warns(UserWarning, match="stopped after 1 iterations with residual"):
        result = Transport(*entropic_transport(audio, image, a, b, None, None, SinkhornSettings(5e-4, None, 1e-3, 1)))
    assert result.marginal_error.max() > 1e-3
    torch.testing.assert_close(result.plan.sum(2), a)  # rounded all the same
