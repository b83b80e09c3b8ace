"""Exact transport against POT's own, pair by pair, and against finite differences."""

import subprocess
import sys

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.losses.common import make_tokens, make_weights, relative
from trainers.losses import Transport, exact_solver, optimal_transport


def reference(audio, image, a, b):
    return torch.stack([ot.emd2(p, q, ot.dist(x, y)) for x, y, p, q in zip(audio, image, a, b, strict=True)])


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 25), m=st.integers(1, 25), d=st.integers(1, 12), uniform=st.booleans(), seed=st.integers(0, 999)
)
def test_value_is_that_of_emd2(n, m, d, uniform, seed):
    audio, image = make_tokens(2, n, m, d, seed=seed)
    a, b = (
        (torch.full((2, n), 1 / n), torch.full((2, m), 1 / m))
        if uniform
        else (make_weights(2, n, seed), make_weights(2, m, seed + 1))
    )
    expected = reference(audio.double(), image.double(), a.double() / a.double().sum(1, True), b.double())
    value = optimal_transport(audio, image) if uniform else optimal_transport(audio, image, a, b)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_emd2(dtype):
    audio, image = make_tokens(3, 60, 70, 48)
    a, b = make_weights(3, 60), make_weights(3, 70, seed=1)
    inputs = [t.to(dtype).requires_grad_() for t in (audio, image, a, b)]
    expected_inputs = [t.double().requires_grad_() for t in (audio, image, a, b)]
    factors = torch.tensor([1.0, -2.0, 0.5])
    value, expected = optimal_transport(*inputs), reference(*expected_inputs)
    assert ((value - expected) / expected).abs().max() < 1e-5
    grads = torch.autograd.grad((value * factors).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * factors).sum(), expected_inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < 1e-4


def test_gradients_are_finite_differences():
    audio, image = make_tokens(1, 6, 5, 3, dtype=torch.float64)
    a, b = make_weights(1, 6, dtype=torch.float64), make_weights(1, 5, seed=1, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (audio, image, a, b)]
    grads = torch.autograd.grad(optimal_transport(*inputs).sum(), inputs)
    for k, (tensor, grad) in enumerate(zip((audio, image, a, b), grads, strict=True)):
        for _ in range(5):
            direction = torch.randn_like(tensor)
            if k >= 2:
                direction -= direction.mean()  # weights stay on the simplex
            step = 1e-6 * direction

            def value(change, k=k):
                moved = [t + change if j == k else t for j, t in enumerate((audio, image, a, b))]
                return optimal_transport(*moved).item()

            slope = (value(step) - value(-step)) / 2e-6
            assert abs(slope - (grad * direction).sum().item()) < 1e-4 * (grad.norm() * direction.norm()).item()


def test_gradient_to_a_weight_of_zero_is_the_cost_of_giving_it_mass():
    audio, image = make_tokens(1, 6, 5, 3, dtype=torch.float64)
    a, b = make_weights(1, 6, dtype=torch.float64), make_weights(1, 5, seed=1, dtype=torch.float64)
    a[0, 2] = b[0, 4] = 0
    a, b = a / a.sum(), b / b.sum()
    inputs = [t.clone().requires_grad_() for t in (a, b)]
    grads = torch.autograd.grad(optimal_transport(audio, image, *inputs).sum(), inputs)
    start = optimal_transport(audio, image, a, b).item()
    for side, index in ((0, 2), (1, 4)):
        weights = [a.clone(), b.clone()]
        weights[side][0, index] += 1e-7
        weights[side][0, 0] -= 1e-7
        slope = (optimal_transport(audio, image, *weights).item() - start) / 1e-7
        assert abs(slope - (grads[side][0, index] - grads[side][0, 0]).item()) < 1e-4 * abs(slope)


def test_plan():
    audio, image = make_tokens(2, 12, 9, 4)
    a, b = make_weights(2, 12), make_weights(2, 9, seed=1)
    result = optimal_transport(audio, image, a, b, return_plan=True)
    assert isinstance(result, Transport) and not result.plan.requires_grad
    assert result.plan.shape == (2, 12, 9) and (result.plan >= 0).all()
    torch.testing.assert_close(result.plan.sum(2), a)
    torch.testing.assert_close(result.plan.sum(1), b)
    assert result.marginal_error.max() < 1e-6
    torch.testing.assert_close((result.plan * torch.cdist(audio, image).square()).sum((1, 2)), result.loss)
    for k in range(2):
        cost = torch.cdist(audio[k].double(), image[k].double()).square().numpy()
        plan = ot.emd((a[k].double() / a[k].double().sum()).numpy(), b[k].double().numpy(), cost)
        torch.testing.assert_close(result.plan[k].double(), torch.from_numpy(plan), rtol=1e-5, atol=1e-6)


def test_weight_gradients_do_not_reach_padding():
    audio, image = make_tokens(1, 6, 5, 3)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    a = torch.cat((make_weights(1, 4), torch.zeros(1, 2)), 1).requires_grad_()
    (grad,) = torch.autograd.grad(optimal_transport(audio, image, a, audio_mask=mask).sum(), a)
    assert not grad[0, 4:].any() and grad[0, :4].any()
    assert grad.sum().abs() < 1e-5  # centred over the real tokens


def test_near_sets_far_from_the_origin_keep_their_digits():
    audio, _ = make_tokens(1, 20, 20, 8)
    audio = (audio + 1000).requires_grad_()
    image = (audio.detach() + 0.25)[:, torch.randperm(20)]
    value = optimal_transport(audio, image)
    torch.testing.assert_close(value, torch.tensor([8 * 0.25**2]))
    (grad,) = torch.autograd.grad(value.sum(), audio)
    torch.testing.assert_close(grad, torch.full_like(grad, -2 * 0.25 / 20))


def test_a_failed_simplex_is_an_error(monkeypatch):
    monkeypatch.setattr(exact_solver, "MAX_PIVOTS", 1)
    with pytest.raises(RuntimeError, match="network simplex failed on a"), pytest.warns(UserWarning):
        optimal_transport(*make_tokens(1, 30, 30, 4))


def test_losses_import_no_model():
    code = "import sys, trainers.losses; print('transformers' in sys.modules or 'modeling_dali' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("tokens", ["normal", "clusters", "duplicates"])
@pytest.mark.parametrize("masked", [False, True])
def test_shortlists_give_what_the_simplex_on_all_arcs_gives(tokens, masked, monkeypatch):
    """Values, gradients and dual potentials; weights are such that the optimum is one."""
    audio, image = make_tokens(2, 200, 190, 8)
    if tokens == "clusters":
        audio, image = audio + 5 * audio[:, :4].repeat(1, 50, 1), image + 5 * audio[:, :5].repeat(1, 38, 1)
    if tokens == "duplicates":
        audio[:, 50:100] = audio[:, :50]
    a, b = make_weights(2, 200), make_weights(2, 190, seed=1)
    masks = {}
    if masked:
        masks = {"audio_mask": torch.arange(200) < torch.tensor([[200], [180]]), "image_mask": torch.arange(190) > 2}
        masks["image_mask"] = masks["image_mask"].expand(2, -1)
        a, b = a * masks["audio_mask"], b * masks["image_mask"]
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    results = []
    for min_arcs in (0, 10**9):
        monkeypatch.setattr(exact_solver, "MIN_ARCS", min_arcs)
        inputs = [t.detach().double().requires_grad_() for t in (audio, image, a, b)]
        result = optimal_transport(*inputs, return_plan=True, **masks)
        results.append((result.loss, result.plan, *torch.autograd.grad(result.loss.sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        if tokens == "duplicates" and found.ndim == 3:  # which of two equal tokens goes where is open
            found, expected = found.sum(1), expected.sum(1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_shortlists_that_fail_are_counted(monkeypatch):
    audio, image = make_tokens(3, 190, 200, 4)
    expected = optimal_transport(audio.double(), image.double())
    monkeypatch.setattr(exact_solver, "MAX_ROUNDS", 0)
    with pytest.warns(UserWarning, match="3 of 3 pairs needed the network simplex on all arcs"):
        value = optimal_transport(audio, image)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
