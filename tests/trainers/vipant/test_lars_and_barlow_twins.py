"""LARS and Barlow Twins against their formulas, written independently in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.released import seeded
from trainers.losses.barlow_twins import BarlowTwins, correlation_loss
from trainers.vipant.lars import LARS, lars_groups


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(3, 12), dim=st.integers(1, 9), weight=st.floats(0, 1))
def test_correlation_loss_equals_its_formula(seed, batch, dim, weight):
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
    got = correlation_loss(torch.from_numpy(one), torch.from_numpy(other), weight)
    assert got.item() == pytest.approx(expected, rel=2e-3, abs=1e-4)  # the loss adds 1e-5 to variances


def test_barlow_twins_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    loss = BarlowTwins(4, (3, 6, 2)).double()
    torch.autograd.gradcheck(loss, inputs)


# Of BarlowLossHead (cvap/module/decoder/loss_head.py) made for widths 16-32-64-64 with the released weight: the loss,
# and norms of the gradients of the first side and of two of its parameters.
AUTHORS_LOSS, AUTHORS_INPUT = 101.30742645263672, 5.9617462158203125
AUTHORS_WEIGHTS = {"projector.0.weight": 110.25757598876953, "projector.1.bias": 60.635738372802734}


def test_barlow_twins_is_the_authors():
    loss = BarlowTwins(16, (32, 64, 64))
    seeds = {
        "0.weight": 73,
        "1.bias": 74,
        "1.weight": 78,
        "3.weight": 79,
        "4.bias": 80,
        "4.weight": 84,
        "6.weight": 85,
    }
    with torch.no_grad():
        for name, seed in seeds.items():
            parameter = loss.projector.get_parameter(name)
            parameter.copy_(seeded(tuple(parameter.shape), seed, 0.3))
    audio, image = seeded((8, 16), 7, 3.0).requires_grad_(), seeded((8, 16), 8, 2.0)
    value = loss(audio, image)
    value.backward()
    assert value.item() == pytest.approx(AUTHORS_LOSS, rel=1e-5)
    assert audio.grad.norm().item() == pytest.approx(AUTHORS_INPUT, rel=1e-4)
    for name, norm in AUTHORS_WEIGHTS.items():
        assert loss.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-4)


def test_the_projector_has_the_released_sizes():
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in BarlowTwins().parameters()]
    assert shapes == [(2048, 512), (2048,), (2048,), (4096, 2048), (4096,), (4096,), (4096, 4096)]


def test_barlow_twins_computes_in_float32():
    one, other = torch.randn(2, 10, 6)
    assert BarlowTwins(6, (4, 4, 3))(one.bfloat16(), other.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("shapes", "message"), [(((4, 3), (5, 3)), "two equal"), (((1, 3), (1, 3)), "at least 2")])
def test_barlow_twins_refuses(shapes, message):
    with pytest.raises(ValueError, match=message):
        correlation_loss(*(torch.zeros(shape) for shape in shapes), 0.1)


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
