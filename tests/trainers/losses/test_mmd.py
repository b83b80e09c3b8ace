"""MMD against its formula written out, value and gradient."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.losses.common import make_tokens, relative, value_and_grads
from trainers.losses import mmd


def direct(audio, image):
    losses = []
    for x, y in zip(audio.double(), image.double(), strict=True):
        z, n = torch.cat((x, y)), len(x)
        distance = (z[:, None] - z[None]).square().sum(2)
        bandwidth = distance.detach().sum() / (len(z) ** 2 - len(z))
        kernel = sum(torch.exp(-distance / (bandwidth * 2.0**k)) for k in range(-2, 3))
        losses.append(kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean())
    return torch.stack(losses)


@pytest.mark.parametrize(("n", "m", "d"), [(7, 9, 5), (130, 140, 64), (128, 256, 32), (300, 60, 16)])
def test_value_and_gradient_are_those_of_the_formula(n, m, d):
    audio, image = make_tokens(2, n, m, d)
    value, *grads = value_and_grads(mmd, audio, image)
    expected, *expected_grads = value_and_grads(direct, audio, image)
    assert ((value - expected) / expected).abs().max() < 1e-5
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < 1e-5


def test_value_is_that_of_the_formula_at_the_size_of_training():
    torch.manual_seed(3)
    audio, image = torch.randn(1, 512, 1024), 0.9 * torch.randn(1, 576, 1024) + 0.1
    value, grad, _ = value_and_grads(mmd, audio, image)
    z = torch.cat((audio[0], image[0])).double()
    distance = torch.cdist(z, z, compute_mode="use_mm_for_euclid_dist").square()
    bandwidth = distance.sum() / (1088**2 - 1088)
    powers = [2.0**-k / bandwidth for k in range(-2, 3)]
    kernel = sum(torch.exp(-distance * p) for p in powers)
    sign = torch.cat((torch.full((512,), 1 / 512), torch.full((576,), -1 / 576))).double()
    assert abs(value.item() / (sign @ kernel @ sign).item() - 1) < 1e-5
    slope = -sum(p * torch.exp(-distance * p) for p in powers) * sign[:, None] * sign
    expected = 4 * (slope.sum(1, keepdim=True) * z - slope @ z)[:512]
    assert relative(grad[0], expected) < 1e-5


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), d=st.integers(1, 6), seed=st.integers(0, 999))
def test_formula_for_any_size(n, m, d, seed):
    audio, image = make_tokens(2, n, m, d, dtype=torch.float64, seed=seed)
    value, *grads = value_and_grads(mmd, audio, image)
    expected, *expected_grads = value_and_grads(direct, audio, image)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads[0], expected_grads[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_tiles_do_not_show(tile, monkeypatch):
    audio, image = make_tokens(dtype=torch.float64)
    reference = value_and_grads(mmd, audio, image)
    monkeypatch.setattr(importlib.import_module("trainers.losses.mmd"), "TILE", tile)
    for part, expected in zip(value_and_grads(mmd, audio, image), reference, strict=True):
        torch.testing.assert_close(part, expected)


def test_an_outlier_stays_finite():
    audio, image = make_tokens(1, 40, 50, 4)
    audio[0, 0] = 1e6
    value, *grads = value_and_grads(mmd, audio, image)
    # kernels are up to 5, of which float32 keeps seven digits; here nearly all of it cancels
    torch.testing.assert_close(value.double(), direct(audio, image), rtol=0, atol=5e-6)
    assert all(grad.isfinite().all() for grad in grads)


def test_no_gradient_is_kept_for_image_tokens_that_need_none():
    audio, image = make_tokens()
    loss = mmd(audio.requires_grad_(), image)
    assert [None if saved is None else saved.shape for saved in loss.grad_fn.saved_tensors] == [audio.shape, None]
