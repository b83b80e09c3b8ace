"""What fp8 costs the image tokens that are kept on disk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.dali.image_token_cache import compress, expand
from trainers.losses import mmd, optimal_transport


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.integers(1, 8), st.integers(1, 64))
def test_each_value_keeps_its_size(seed, size, tokens, width):
    values = size * torch.randn(3, tokens, width, generator=torch.Generator().manual_seed(seed))
    found = expand(*compress(values))
    assert found.dtype == torch.float32 and found.shape == values.shape
    smallest = values.abs().amax(-1, keepdim=True) / 448 * 2**-6  # below it fp8 is no longer normal
    assert ((found - values).abs() <= 2**-4 * torch.maximum(values.abs(), smallest)).all()


def test_extremes_and_zeros():
    values = torch.tensor([[0.0, 0.0], [1e30, -1e30], [3e-38, 0.0], [5.0, 1e-9]])
    found = expand(*compress(values))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:3], values[:3], rtol=0.07, atol=0)
    assert found[3].tolist() == [5.0, 0.0]


def test_the_bits_are_those_of_torch():
    values = torch.randn(2, 5, 7)
    bits, scales = compress(values)
    theirs = torch.from_numpy(bits).view(torch.float8_e4m3fn).float() * torch.from_numpy(scales)[..., None]
    assert torch.equal(expand(bits, scales), theirs)
    assert bits.nbytes == values.nbytes / 4 and scales.dtype == np.float32


@pytest.mark.parametrize("loss", [mmd, optimal_transport])
def test_losses_stay_within_half_a_percent(loss):
    """With a few channels that stand out, as CLIP's have."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.ones(256)
    channels[:4] = 30
    image = torch.randn(4, 48, 256, generator=generator) * channels
    audio = torch.randn(4, 40, 256, generator=generator) * channels
    found, exact = (loss(audio, tokens).mean() for tokens in (expand(*compress(image)), image))
    assert found.item() == pytest.approx(exact.item(), rel=5e-3)
