"""Scores, entropies and the schedule of attentive transport."""

import math

import pytest
import torch

from tests.trainers.losses.common import make_tokens, make_weights
from trainers.losses import EntropySchedule, Transport, TransportScorer, attentive_transport, optimal_transport


def test_weights_are_the_formula_of_the_paper():
    audio, image = make_tokens(2, 7, 9, 8)
    scorer = TransportScorer(8, num_heads=None, uniform_mix=0.0, temperature=0.5)
    alpha, beta = scorer(audio, image)
    for weights, x, y, (q, k, v) in (
        (alpha, audio, image, (scorer.a_q, scorer.i_k, scorer.i_v)),
        (beta, image, audio, (scorer.i_q, scorer.a_k, scorer.a_v)),
    ):
        attention = torch.softmax(q(x) @ k(y).mT / math.sqrt(8), -1)
        torch.testing.assert_close(weights, torch.softmax((attention @ v(y)).mean(2) / 0.5, 1))


def test_weights_of_the_released_form_are_mixed_with_uniform_ones():
    audio, image = make_tokens(2, 7, 9, 16)
    scorer = TransportScorer(16)
    alpha, beta = scorer(audio, image)
    attended = scorer.audio_scorer(scorer.a_q(audio), scorer.i_k(image), scorer.i_v(image))[0]
    torch.testing.assert_close(alpha, 0.5 * torch.softmax(attended.mean(2) / 20, 1) + 0.5 / 7)
    torch.testing.assert_close(alpha.sum(1), torch.ones(2))
    torch.testing.assert_close(beta.sum(1), torch.ones(2))
    assert (beta >= 0.5 / 9).all()


def test_parameters_carry_the_names_of_the_released_checkpoint():
    names = {name.rsplit(".", 1)[0] for name in TransportScorer(16).state_dict()}
    linear = {f"{side}_{part}" for side in "ai" for part in "qkv"}
    scorers = {"audio_scorer", "audio_scorer.out_proj", "image_scorer", "image_scorer.out_proj"}
    assert names == linear | scorers


@pytest.mark.parametrize("num_heads", [None, 2])
def test_scores_do_not_see_padding(num_heads):
    audio, image = make_tokens(2, 7, 9, 8)
    scorer = TransportScorer(8, num_heads=num_heads, temperature=0.1)
    alpha, beta = scorer(audio, image)
    padded_audio = torch.cat((audio, torch.full((2, 3, 8), float("nan"))), 1)
    padded_image = torch.cat((torch.full((2, 2, 8), float("nan")), image), 1)
    audio_mask, image_mask = torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 11, dtype=torch.bool)
    audio_mask[:, 7:] = image_mask[:, :2] = False
    padded_alpha, padded_beta = scorer(padded_audio, padded_image, audio_mask, image_mask)
    torch.testing.assert_close(padded_alpha[:, :7], alpha)
    torch.testing.assert_close(padded_beta[:, 2:], beta)
    assert not padded_alpha[:, 7:].any() and not padded_beta[:, :2].any()
    loss = attentive_transport(
        padded_audio, padded_image, padded_alpha, padded_beta, 3.0, audio_mask=audio_mask, image_mask=image_mask
    )
    torch.testing.assert_close(loss, attentive_transport(audio, image, alpha, beta, 3.0), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in scorer.parameters())


def test_scores_inside_autocast_still_sum_to_one():
    audio, image = make_tokens(2, 200, 300, 16)
    scorer = TransportScorer(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alpha, beta = scorer(audio.bfloat16(), image.bfloat16())
        attentive_transport(audio.bfloat16(), image.bfloat16(), alpha, beta, 1.0)
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha.sum(1), torch.ones(2), rtol=1e-5, atol=0)


def test_loss_is_transport_less_entropies():
    audio, image = make_tokens()
    alpha, beta = make_weights(3, 7).requires_grad_(), make_weights(3, 9, seed=1)
    loss = attentive_transport(audio, image, alpha, beta, 5.0)
    entropy = torch.distributions.Categorical(alpha).entropy() + torch.distributions.Categorical(beta).entropy()
    expected = optimal_transport(audio, image, alpha, beta) - 5.0 * entropy
    torch.testing.assert_close(loss, expected)
    grad, expected_grad = (torch.autograd.grad(x.sum(), alpha, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(grad - grad.mean(1, True), expected_grad - expected_grad.mean(1, True))


def test_zero_weights_give_finite_gradients():
    audio, image = make_tokens(1)
    alpha = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0]], requires_grad=True)
    (grad,) = torch.autograd.grad(attentive_transport(audio, image, alpha, None, 5.0).sum(), alpha)
    assert grad.isfinite().all()


def test_a_scorer_learns_which_tokens_have_a_partner():
    """Half of the image tokens have no counterpart in the sound: their weight falls."""
    torch.manual_seed(0)
    audio = torch.randn(2, 12, 16)
    image = torch.cat((audio + 0.01 * torch.randn_like(audio), 6 + torch.randn(2, 12, 16)), 1)
    scorer = TransportScorer(16, num_heads=2, temperature=1.0, uniform_mix=0.0)
    optimizer = torch.optim.Adam(scorer.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        attentive_transport(audio, image, *scorer(audio, image), 1.0).mean().backward()
        optimizer.step()
    _, beta = scorer(audio, image)
    assert (beta[:, 12:].sum(1) < 0.1).all()


def test_plan_and_solver_options_pass_through():
    audio, image = make_tokens()
    result = attentive_transport(audio, image, None, None, 2.0, solver="sinkhorn", epsilon=0.05, return_plan=True)
    plain = optimal_transport(audio, image, solver="sinkhorn", epsilon=0.05)
    assert isinstance(result, Transport) and result.plan.shape == (3, 7, 9)
    torch.testing.assert_close(result.loss, plain - 2.0 * (math.log(7) + math.log(9)))


def test_schedule():
    schedule = EntropySchedule()
    assert schedule(0.0) == (True, 500.0)
    assert schedule(0.999).uniform and not schedule(1.0).uniform
    # lambda of the released code in its epochs 2 to 6 (traintest_distribution_alignment.py, lines 116 to 122)
    for epoch, weight in enumerate((500.0, 400.0, 300.0, 200.0, 100.0), start=1):
        assert schedule(epoch).entropy_weight == schedule(epoch + 0.99).entropy_weight == weight
    linear = EntropySchedule(staircase=False)
    assert [linear(epoch).entropy_weight for epoch in (1.0, 1.5, 3.0, 5.0)] == [500.0, 450.0, 300.0, 100.0]
    assert schedule(5.0).entropy_weight == 100.0
    assert schedule(19.5) == (False, 100.0)
    # the same whatever came before: a resumed run asks a new object
    assert [EntropySchedule()(e / 7) for e in range(40)] == [schedule(e / 7) for e in reversed(range(40))][::-1]
    falling = [schedule(e / 10).entropy_weight for e in range(100)]
    assert falling == sorted(falling, reverse=True)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="temperature"):
        TransportScorer(8, temperature=0)
    with pytest.raises(ValueError, match="uniform_mix"):
        TransportScorer(8, uniform_mix=2)
    with pytest.raises(ValueError, match="decay_end"):
        EntropySchedule(decay_end=0.5)
