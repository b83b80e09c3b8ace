"""VIP-ANT's front end against figures of the authors' own functions, and the part of a clip that it hears."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dali.feature_extraction_kaldi_fbank import crop_clip
from modeling_vipant import vipant_feature_extractor

RATE = 44_100


def clip(seconds, gains):
    """A rising tone in noise, with equal stretches of different loudness."""
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    x = 0.2 * np.sin(2 * np.pi * (300 * t + 40 * t * t)) + 0.05 * np.random.default_rng(7).standard_normal(n)
    return (x * np.repeat(gains, n // len(gains))).astype(np.float32)


# By the authors' `_extract_kaldi_spectrogram` in evaluation, zero-padded and normalised as their data sets do it, over
# torchaudio's Kaldi fbank: every fortieth bin of four frames, and the mean of all values.
FIGURES = {
    "whole": (
        (6.0, [1], 1000),
        [
            [-0.3581, 0.4934, 1.0959, 1.6223],
            [-0.1939, 0.6733, 0.9904, 1.6717],
            [0.8577, 0.8577, 0.8577, 0.8577],
            [0.8577, 0.8577, 0.8577, 0.8577],
        ],
        0.83453584,
    ),
    "centre, 10 s": (
        (24.0, [1], 1000),
        [
            [-0.3094, 0.4975, 1.3180, 1.6106],
            [-0.3830, 0.5423, 1.3132, 1.6954],
            [-0.3015, 0.5990, 1.0601, 1.5358],
            [-0.4433, 0.4519, 1.1154, 1.6439],
        ],
        0.80250442,
    ),
    "centre, 18 s": (
        (24.0, [1], 1800),
        [
            [-0.4591, 0.4224, 1.2763, 1.6792],
            [-0.5979, 0.6249, 1.2147, 1.5942],
            [-0.3015, 0.5990, 1.0601, 1.5358],
            [-0.0688, 1.5640, 1.0726, 1.7069],
        ],
        0.80356283,
    ),
    "quiet centre, loud start": (
        (24.0, [1, 1e-3, 1e-3, 1e-3], 1000),
        [
            [-0.3581, 0.4934, 1.0959, 1.6223],
            [-0.1939, 0.6733, 0.9904, 1.6717],
            [-1.9112, -1.9112, -1.0772, -0.7983],
            [-1.9112, -1.7777, -1.1402, -0.6492],
        ],
        -0.08527747,
    ),
    "quiet centre, loud end": (
        (24.0, [1e-4, 1e-3, 1e-3, 1], 1000),
        [
            [-1.9112, -1.9112, -1.3253, -0.8192],
            [-1.9112, -0.8696, -1.1500, -0.7118],
            [-0.1383, 0.6485, 1.3089, 1.6543],
            [-0.1711, 0.6176, 1.0438, 1.6256],
        ],
        -0.10604773,
    ),
}


@pytest.mark.parametrize("case", FIGURES)
def test_equals_the_authors_features(case):
    (seconds, gains, num_frames), values, mean = FIGURES[case]
    extractor = vipant_feature_extractor(num_frames=num_frames)
    features = extractor(clip(seconds, gains), sampling_rate=RATE, truncation=True).input_features[0].numpy()
    np.testing.assert_allclose(features[100 :: num_frames // 4, 5::40], values, atol=1e-3)
    assert features.mean() == pytest.approx(mean, abs=1e-4)


def test_other_rates_are_brought_to_the_extractors():
    """A clip at 48 kHz gives what the same sound at 44.1 kHz gives, up to the resampler's pass band."""

    def sweep(rate):
        t = np.arange(rate * 4) / rate
        return np.sin(2 * np.pi * (200 * t + 500 * t * t)).astype(np.float32)

    extractor = vipant_feature_extractor()
    here = extractor(sweep(RATE), sampling_rate=RATE).input_features[0, 5:380]
    there = extractor(sweep(48_000), sampling_rate=48_000).input_features[0, 5:380]
    loud = here > here.amax(-1, keepdim=True) - 1.0
    torch.testing.assert_close(there[loud], here[loud], atol=0.02, rtol=0)


def test_the_call_chooses_the_crop():
    extractor = vipant_feature_extractor(num_frames=100)
    sound = clip(4.0, [1])
    reach = extractor.crop_samples
    assert reach == int(1.05 * RATE)
    excess = len(sound) - reach
    for crop, left in (("start", 0), ("center", round(excess / 2)), (None, round(excess / 2))):
        expected = extractor(sound[left : left + reach], sampling_rate=RATE).input_features
        found = extractor(sound, sampling_rate=RATE, crop=crop, truncation=True)
        assert torch.equal(found.input_features, expected)
        assert found.input_features_mask.all()  # the margin keeps the last frame whole
    with pytest.raises(ValueError, match="`crop` is one of start, center, random, not 'middle'"):
        extractor(sound, sampling_rate=RATE, crop="middle")


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 400), length=st.integers(2, 200), seed=st.integers(0, 99))
def test_random_crops_lie_in_the_clip(samples, length, seed):
    torch.manual_seed(seed)
    sound = torch.arange(float(samples))  # as loud everywhere: no fallback but for very short crops
    found = crop_clip(sound, length, "random")
    assert len(found) == min(samples, length)
    assert (found.diff() == 1).all() and found[0] >= 0 and found[-1] < samples


def test_random_crops_vary_and_follow_the_seed():
    sound = torch.randn(5_000)
    torch.manual_seed(0)
    first = [crop_clip(sound, 1_000, "random") for _ in range(20)]
    torch.manual_seed(0)
    again = [crop_clip(sound, 1_000, "random") for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(crop[0]) for crop in first}) > 15


def test_a_silent_crop_gives_way_to_the_louder_end():
    quiet, loud = 1e-3 * torch.randn(3_000), torch.randn(1_000)
    assert torch.equal(crop_clip(torch.cat([loud, quiet]), 1_000, "center"), loud)
    assert torch.equal(crop_clip(torch.cat([0.1 * quiet[:1_500], quiet, loud]), 1_000, "center"), loud)
