"""What holds for every loss between token sets: symmetry, masks, scales, precision, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.losses.common import TOKEN_LOSSES, make_tokens, make_weights, relative, value_and_grads
from trainers.losses import mmd, optimal_transport
from trainers.losses.common import chunks

every_loss = pytest.mark.parametrize("name", TOKEN_LOSSES)
sizes = st.integers(1, 8)


@every_loss
@settings(max_examples=15, deadline=None)
@given(n=sizes, m=sizes, d=sizes, batch=st.integers(1, 3), seed=st.integers(0, 1000))
def test_order_of_tokens_does_not_matter(name, n, m, d, batch, seed):
    audio, image = make_tokens(batch, n, m, d, seed=seed, dtype=torch.float64)
    p, q = torch.randperm(n), torch.randperm(m)
    value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    moved, moved_audio, moved_image = value_and_grads(TOKEN_LOSSES[name], audio[:, p], image[:, q])
    assert torch.isfinite(value).all()
    torch.testing.assert_close(moved, value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moved_audio, grad_audio[:, p], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved_image, grad_image[:, q], rtol=1e-5, atol=1e-6)


@every_loss
def test_batch_is_the_same_as_single_pairs(name):
    audio, image = make_tokens()
    value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    for k in range(len(audio)):
        one, one_audio, one_image = value_and_grads(TOKEN_LOSSES[name], audio[k : k + 1], image[k : k + 1])
        # Sinkhorn stops when the slowest of the pairs it works on has converged
        tolerance = 2e-3 if name in ("sinkhorn", "unbalanced") else 1e-5
        torch.testing.assert_close(one[0], value[k], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(one_audio[0] * (k + 1), grad_audio[k], rtol=0.05, atol=50 * tolerance)
        torch.testing.assert_close(one_image[0] * (k + 1), grad_image[k], rtol=0.05, atol=50 * tolerance)


@every_loss
@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_padding_has_no_effect(name, garbage):
    audio, image = make_tokens()
    value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    padded_audio = torch.cat((torch.full_like(audio[:, :2], garbage), audio), 1)  # in front: the first token too
    padded_image = torch.cat((image, torch.full_like(image[:, :3], garbage)), 1)
    masks = {
        "audio_mask": torch.tensor([False] * 2 + [True] * 7).expand(3, -1),
        "image_mask": torch.tensor([True] * 9 + [False] * 3).expand(3, -1),
    }
    padded = value_and_grads(TOKEN_LOSSES[name], padded_audio, padded_image, **masks)
    torch.testing.assert_close(padded[0], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded[1][:, 2:], grad_audio, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[2][:, :9], grad_image, rtol=1e-4, atol=1e-5)
    assert not padded[1][:, :2].any() and not padded[2][:, 9:].any()


@every_loss
def test_audio_and_image_tokens_play_the_same_part(name):
    """Masks too: any-resolution captioners give ragged image tokens."""
    audio, image = make_tokens()
    masks = torch.arange(7) < torch.tensor([[4], [7], [1]]), torch.arange(9) < torch.tensor([[9], [2], [5]])
    value, grad_audio, grad_image = value_and_grads(
        TOKEN_LOSSES[name], audio, image, audio_mask=masks[0], image_mask=masks[1]
    )
    swapped, *grads = value_and_grads(TOKEN_LOSSES[name], image, audio, audio_mask=masks[1], image_mask=masks[0])
    tolerance = 2e-3 if name in ("sinkhorn", "unbalanced") else 1e-5
    torch.testing.assert_close(swapped, value, rtol=tolerance, atol=tolerance)
    for grad, expected in zip(grads, (grad_image, grad_audio), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0.05, atol=50 * tolerance)
    assert not grad_audio[0, 4:].any() and not grad_image[1, 2:].any()


@every_loss
def test_width_of_a_language_model(name):
    """Width only repeats: each coordinate four times is the tokens times two."""
    audio, image = make_tokens(2, d=1024)
    options = {"audio_mask": torch.arange(7).expand(2, -1) < 6, "image_mask": torch.arange(9).expand(2, -1) > 0}
    value, grad_audio, _ = value_and_grads(TOKEN_LOSSES[name], 2 * audio, 2 * image, **options)
    wide, wide_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio.repeat(1, 1, 4), image.repeat(1, 1, 4), **options)
    assert wide_audio.shape == (2, 7, 4096)
    torch.testing.assert_close(wide, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * wide_audio[..., :1024], grad_audio, rtol=1e-2, atol=1e-3)


@every_loss
def test_masks_that_differ_by_pair(name):
    audio, image = make_tokens(batch=2)
    audio_mask = torch.arange(7) < torch.tensor([[4], [7]])
    image_mask = torch.arange(9) < torch.tensor([[9], [1]])
    value, grad_audio, _ = value_and_grads(
        TOKEN_LOSSES[name], audio, image, audio_mask=audio_mask, image_mask=image_mask
    )
    cut, cut_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio[:1, :4], image[:1])
    tolerance = 2e-3 if name in ("sinkhorn", "unbalanced") else 1e-5
    torch.testing.assert_close(value[:1], cut, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_audio[:1, :4], cut_audio, rtol=0.05, atol=50 * tolerance)
    assert not grad_audio[0, 4:].any()


@every_loss
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_scales(name, scale):
    if name == "attentive":
        pytest.skip("its entropies have a scale of their own")
    audio, image = make_tokens()
    value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    scaled, scaled_audio, scaled_image = value_and_grads(TOKEN_LOSSES[name], audio * scale, image * scale)
    degree = 0 if name == "mmd" else 2  # MMD has no scale, transport is in squared distances
    assert relative(scaled / scale**degree, value) < 1e-4
    assert relative(scaled_audio / scale ** (degree - 1), grad_audio) < 1e-3
    assert relative(scaled_image / scale ** (degree - 1), grad_image) < 1e-3


@every_loss
def test_an_offset_of_all_tokens_changes_nothing(name):
    audio, image = make_tokens()
    offset = 64.0
    reference = value_and_grads(TOKEN_LOSSES[name], (audio + offset) - offset, (image + offset) - offset)
    moved = value_and_grads(TOKEN_LOSSES[name], audio + offset, image + offset)
    assert relative(moved[0], reference[0]) < 1e-4
    assert relative(moved[1], reference[1]) < 1e-3


@pytest.mark.parametrize("name", ["mmd", "exact"])
def test_equal_sets_give_zero(name):
    audio, _ = make_tokens(n=40, d=16)
    value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, audio[:, torch.randperm(40)])
    assert value.abs().max() < 1e-6
    assert grad_audio.abs().max() < 1e-6 and grad_image.abs().max() < 1e-6


def test_exact_of_equal_sets_is_exactly_zero_at_any_offset():
    audio, _ = make_tokens(n=60, d=32)
    for offset in (0, 300):
        value, grad_audio, _ = value_and_grads(optimal_transport, audio + offset, (audio + offset).flip(1))
        assert not value.any() and not grad_audio.any()


@every_loss
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_tokens_that_are_all_equal(name, value):
    audio, image = torch.full((2, 6, 4), value), torch.full((2, 5, 4), value)
    loss, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    expected = -10.0 * (torch.tensor(6.0).log() + torch.tensor(5.0).log()) if name == "attentive" else 0.0
    torch.testing.assert_close(loss, torch.ones(2) * expected, rtol=1e-5, atol=1e-5)
    assert not grad_audio.any() and not grad_image.any()


@every_loss
def test_duplicate_rows_and_single_tokens(name):
    audio, image = make_tokens(batch=1, n=4, m=4)
    value, grad, _ = value_and_grads(TOKEN_LOSSES[name], audio, image)
    if name != "attentive" and name != "mmd":  # MMD's bandwidth counts tokens, the entropies too
        doubled, doubled_grad, _ = value_and_grads(TOKEN_LOSSES[name], audio.repeat(1, 2, 1), image)
        torch.testing.assert_close(doubled, value, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(doubled_grad[:, :4] + doubled_grad[:, 4:], grad, rtol=0.05, atol=0.05)
    one, one_audio, one_image = value_and_grads(TOKEN_LOSSES[name], audio[:, :1], image[:, :1])
    assert torch.isfinite(one).all() and torch.isfinite(one_audio).all()
    torch.testing.assert_close(one_audio, -one_image)
    if name in ("exact", "sinkhorn"):
        torch.testing.assert_close(one, (audio[:, 0] - image[:, 0]).square().sum(1))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tokens_inside_autocast(name, dtype):
    audio, image = (tokens.to(dtype) for tokens in make_tokens(n=30, m=40, d=64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad_audio, grad_image = value_and_grads(TOKEN_LOSSES[name], audio, image)
    reference, reference_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio.float(), image.float())
    assert value.dtype == torch.float32 and grad_audio.dtype == grad_image.dtype == dtype
    torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_audio.float(), reference_audio, rtol=1e-2, atol=1e-5)


def test_low_precision_matrix_products_outside_are_not_used():
    audio, image = make_tokens(n=30, m=40, d=256)
    reference = mmd(audio, image)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(mmd(audio, image), reference)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@every_loss
def test_confidence_multiplies_the_losses(name):
    audio, image = make_tokens()
    confidence = torch.tensor([0.0, 0.5, 2.0], requires_grad=True)
    value, grad_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio, image)
    weighted, weighted_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio, image, pair_confidence=confidence)
    torch.testing.assert_close(weighted, value * confidence.detach())
    torch.testing.assert_close(weighted_audio, grad_audio * confidence.detach()[:, None, None])


@every_loss
def test_without_gradient_the_value_is_the_same(name):
    audio, image = make_tokens()
    value, grad_audio, _ = value_and_grads(TOKEN_LOSSES[name], audio, image)
    with torch.no_grad():
        torch.testing.assert_close(TOKEN_LOSSES[name](audio, image), value)
    frozen = audio.clone().requires_grad_()
    (TOKEN_LOSSES[name](frozen, image) * torch.arange(1, 4)).sum().backward()  # image tokens are CLIP's
    torch.testing.assert_close(frozen.grad, grad_audio, rtol=1e-5, atol=1e-6)


@every_loss
def test_nan_tokens_are_named(name):
    audio, image = make_tokens()
    audio[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="audio_tokens of pair 1 hold NaN"):
        TOKEN_LOSSES[name](audio, image)
    image[2, 0, 0] = -float("inf")
    with pytest.raises(ValueError, match="image_tokens of pair 2 hold NaN or infinite"):
        TOKEN_LOSSES[name](audio.nan_to_num(), image)


@every_loss
def test_shapes_that_do_not_fit_are_named(name):
    loss, (audio, image) = TOKEN_LOSSES[name], make_tokens()
    with pytest.raises(ValueError, match="audio_tokens are 5 wide but image_tokens 4"):
        loss(audio, image[..., :4])
    with pytest.raises(ValueError, match="3 clips but image_tokens 2"):
        loss(audio, image[:2])
    with pytest.raises(ValueError, match=r"image_tokens must be a floating-point tensor \[batch, tokens, width\]"):
        loss(audio, image[0])
    with pytest.raises(ValueError, match="audio_tokens must be a floating-point tensor"):
        loss(audio[:, :0], image)
    with pytest.raises(ValueError, match=r"audio_mask must be bool \[3, 7\]"):
        loss(audio, image, audio_mask=torch.ones(3, 7))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="image_mask of pair 1 marks no token as real"):
        loss(audio, image, image_mask=mask)
    with pytest.raises(ValueError, match="pair_confidence of pair 2 is negative"):
        loss(audio, image, pair_confidence=torch.tensor([1.0, 0, -1]))
    with pytest.raises(ValueError, match=r"pair_confidence must be \[3\]"):
        loss(audio, image, pair_confidence=torch.ones(3, 1))


@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "unbalanced"])
def test_weights_that_are_no_weights_are_named(solver):
    audio, image = make_tokens()
    weights = make_weights(3, 7)
    bad = weights.clone()
    bad[1, 0], bad[1, 1] = -bad[1, 0], bad[1, 1] + 2 * bad[1, 0]
    with pytest.raises(ValueError, match="audio_weights of pair 1 hold a negative weight"):
        optimal_transport(audio, image, bad, solver=solver)
    bad = weights.clone()
    bad[2] *= 1.01
    with pytest.raises(ValueError, match="audio_weights of pair 2 do not sum to 1"):
        optimal_transport(audio, image, bad, solver=solver)
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="audio_weights of pair 0 hold NaN"):
        optimal_transport(audio, image, bad, solver=solver)
    with pytest.raises(ValueError, match=r"image_weights must be \[3, 9\]"):
        optimal_transport(audio, image, weights, weights, solver=solver)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 6] = False
    with pytest.raises(ValueError, match="audio_weights of pair 0 put weight on padding"):
        optimal_transport(audio, image, weights, audio_mask=mask, solver=solver)


def test_options_that_make_no_sense_are_named():
    audio, image = make_tokens()
    with pytest.raises(ValueError, match="choose 'exact', 'sinkhorn' or 'unbalanced'"):
        optimal_transport(audio, image, solver="emd")
    with pytest.raises(ValueError, match="must be positive"):
        optimal_transport(audio, image, solver="sinkhorn", epsilon=0.0)


def test_chunks_cover_a_batch_once_and_in_order():
    device = torch.device("cpu")
    covered = [k for part in chunks(10, 2**20 // 3, device) for k in range(part.start, part.stop)]
    assert covered == list(range(10))
    assert len(list(chunks(4, 2**30, device))) == 4  # a pair that is too large still gets its turn


@every_loss
def test_several_chunks_are_the_same_as_one(name, monkeypatch):
    audio, image = make_tokens(batch=5)
    reference = value_and_grads(TOKEN_LOSSES[name], audio, image)
    monkeypatch.setitem(__import__("trainers.losses.common", fromlist=["x"]).CHUNK_ELEMENTS, "cpu", 2 * 16 * 16)
    split = value_and_grads(TOKEN_LOSSES[name], audio, image)
    tolerance = 2e-3 if name in ("sinkhorn", "unbalanced") else 1e-5
    torch.testing.assert_close(split[0], reference[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(split[1], reference[1], rtol=0.05, atol=0.2 if tolerance > 1e-4 else 1e-5)
