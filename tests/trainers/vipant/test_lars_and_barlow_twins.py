"""LARS and Barlow Twins against their formulas, written independently in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.losses.barlow_twins import barlow_twins
from trainers.vipant.lars import LARS, lars_groups


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(3, 12), dim=st.integers(1, 9), weight=st.floats(0, 1))
def test_barlow_twins_equals_its_formula(seed, batch, dim, weight):
    generator = np.random.default_rng(seed)
    one, other = generator.standard_normal((2, batch, dim))
    correlation = np.array(
        [[np.corrcoef(one[:, i], other[:, j])[0, 1] for j in range(dim)] for i in range(dim)]  # Pearson's
    )
    expected = sum(
        (correlation[i, i] - 1) ** 2 if i == j else weight * correlation[i, j] ** 2
        for i in range(dim)
        for j in range(dim)
    )
    got = barlow_twins(torch.from_numpy(one), torch.from_numpy(other), weight)
    assert got.item() == pytest.approx(expected, rel=2e-3, abs=1e-4)  # the loss adds 1e-5 to variances


def test_barlow_twins_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(barlow_twins, inputs)


def test_barlow_twins_is_invariant_to_scale_and_shift():
    one, other = torch.randn(2, 10, 6)
    torch.testing.assert_close(barlow_twins(3 * one + 2, other), barlow_twins(one, other), rtol=1e-4, atol=1e-5)
    assert barlow_twins(one.bfloat16(), other.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("shapes", "message"), [(((4, 3), (5, 3)), "two equal"), (((1, 3), (1, 3)), "at least 2")])
def test_barlow_twins_refuses(shapes, message):
    with pytest.raises(ValueError, match=message):
        barlow_twins(*(torch.zeros(shape) for shape in shapes))


def test_lars_equals_its_formula():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 4)
    groups = lars_groups(module, weight_lr=0.2, bias_lr=0.0048)
    optimizer = LARS(groups, momentum=0.9, weight_decay=1e-2, eta=1e-3)
    weight, bias = (p.detach().double().numpy().copy() for p in (module.weight, module.bias))
    weight_momentum, bias_momentum = np.zeros_like(weight), np.zeros_like(bias)
    for step in range(4):
        x = torch.randn(5, 3)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        grad, bias_grad = module.weight.grad.double().numpy(), module.bias.grad.double().numpy()
        update = grad + 1e-2 * weight
        update *= 1e-3 * np.linalg.norm(weight) / np.linalg.norm(update)
        weight_momentum = 0.9 * weight_momentum + update
        bias_momentum = 0.9 * bias_momentum + bias_grad
        weight, bias = weight - 0.2 * weight_momentum, bias - 0.0048 * bias_momentum
        optimizer.step()
        np.testing.assert_allclose(module.weight.detach(), weight, atol=1e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(module.bias.detach(), bias, atol=1e-5)


def test_lars_survives_zero_weights_and_missing_gradients():
    weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = LARS(weights, lr=1.0, weight_decay=0.0)
    weights[0].grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weights[0].detach(), -torch.ones(2, 2))
    torch.testing.assert_close(weights[1].detach(), torch.ones(2, 2))
