"""The front end against Kaldi's definition, frame by frame in float64, and against bad input."""

import logging

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dali import KaldiFbankFeatureExtractor
from modeling_dali.audio_io import read_audio

RATE = 16_000


@pytest.fixture(scope="module")
def extractor():
    return KaldiFbankFeatureExtractor()


def kaldi_fbank(waveform, num_bins=128, rate=RATE):
    """Kaldi's fbank as its source describes it, one frame at a time."""
    length, shift, padded = 400, 160, 512
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))

    def mel(f):
        return 1127.0 * np.log(1.0 + f / 700.0)

    low, high = mel(20.0), mel(rate / 2)
    delta = (high - low) / (num_bins + 1)
    filters = np.zeros((num_bins, padded // 2 + 1))
    for b in range(num_bins):
        left, centre, right = low + b * delta, low + (b + 1) * delta, low + (b + 2) * delta
        for i in range(padded // 2):
            m = mel(i * rate / padded)
            if left < m < right:
                filters[b, i] = (m - left) / (centre - left) if m <= centre else (right - m) / (right - centre)
    rows = []
    for start in range(0, len(waveform) - length + 1, shift):
        frame = waveform[start : start + length].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        spectrum = np.abs(np.fft.rfft(frame * window, padded)) ** 2
        rows.append(np.log(np.maximum(filters @ spectrum, np.finfo(np.float32).eps)))
    return np.array(rows)


def reference(waveform, frames=1024, mean=-5.081, std=4.4849, bins=128):
    waveform = np.asarray(waveform, dtype=np.float64)
    log_mel = kaldi_fbank(waveform - waveform.mean(), bins)[:frames]
    out = np.zeros((frames, bins))
    out[: len(log_mel)] = log_mel
    return (out - mean) / std


def noise(samples, seed=0):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.mark.parametrize("samples", [400, 559, 560, 16_000, 40_001, 163_840])
def test_equals_kaldi(extractor, samples):
    t = np.arange(samples) / RATE
    waveform = noise(samples) + 0.3 * np.sin(2 * np.pi * 440 * t).astype(np.float32) + 0.2
    features = extractor(waveform, sampling_rate=RATE).input_features[0]
    assert features.shape == (1024, 128) and features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), reference(waveform), atol=2e-3)


def test_equals_kaldi_on_real_sound(extractor, shared_data):
    waveform, rate = read_audio(shared_data / "stamps" / "animals__birds__blackbird.ogg")
    features = extractor([waveform], sampling_rate=rate).input_features[0]
    resampled = soxr.resample(waveform, rate, RATE)
    np.testing.assert_allclose(features.numpy(), reference(resampled), atol=2e-3)


def test_equals_torchaudio(extractor):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    waveform = torch.from_numpy(noise(160_000))
    expected = kaldi.fbank(
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    features = extractor(waveform, sampling_rate=RATE).input_features[0, : len(expected)]
    torch.testing.assert_close(features, (expected + 5.081) / 4.4849, atol=2e-3, rtol=0)


def test_other_numbers_serve_another_front_end():
    extractor = KaldiFbankFeatureExtractor(feature_size=64, num_frames=1000, mean=-4.93839311, std=5.75751113)
    waveform = noise(30_000)
    features = extractor(waveform, sampling_rate=RATE).input_features[0]
    expected = reference(waveform, frames=1000, mean=-4.93839311, std=5.75751113, bins=64)
    np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(400, 6_000), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_batch_equals_each_clip_alone(extractor, lengths, seed):
    clips = [noise(n, seed + i) for i, n in enumerate(lengths)]
    batch = extractor(clips, sampling_rate=RATE)
    for i, clip in enumerate(clips):
        alone = extractor(clip, sampling_rate=RATE)
        torch.testing.assert_close(batch.input_features[i], alone.input_features[0], atol=1e-5, rtol=0)
        assert batch.input_features_mask[i].sum() == (len(clip) - 400) // 160 + 1


@settings(max_examples=15, deadline=None)
@given(gain=st.floats(0.05, 5.0), seed=st.integers(0, 99))
def test_gain_shifts_the_log_and_nothing_else(extractor, gain, seed):
    waveform = noise(8_000, seed)
    plain = extractor(waveform, sampling_rate=RATE).input_features[0, :40]
    louder = extractor(waveform * np.float32(gain), sampling_rate=RATE).input_features[0, :40]
    floor = (np.log(np.finfo(np.float32).eps) + 5.081) / 4.4849
    heard = (plain > floor + 0.1) & (louder > floor + 0.1)  # some of the lowest filters hold no FFT bin at all
    assert heard.float().mean() > 0.9
    shift = torch.full_like(plain, 2 * np.log(gain) / 4.4849)
    torch.testing.assert_close((louder - plain)[heard], shift[heard], atol=2e-3, rtol=0)


def test_padding_is_zero_in_the_log_domain(extractor):
    output = extractor(noise(16_000), sampling_rate=RATE)
    assert output.input_features_mask[0].tolist() == [1] * 98 + [0] * 926
    assert (output.input_features[0, 98:] == torch.tensor((0 + 5.081) / 4.4849)).all()


def test_a_long_clip_is_cut_with_a_warning(extractor, caplog):
    waveform = noise(200_000)
    logger = logging.getLogger("modeling_dali.feature_extraction_kaldi_fbank")
    logger.addHandler(caplog.handler)
    try:
        cut = extractor(waveform, sampling_rate=RATE).input_features
    finally:
        logger.removeHandler(caplog.handler)
    assert "Sounds are cut to 10.29 s" in caplog.text
    assert cut.shape == (1, 1024, 128)


def test_forms_of_input(extractor):
    waveform = noise(4_000)
    expected = extractor([waveform], sampling_rate=RATE).input_features
    for form in (
        waveform,
        torch.from_numpy(waveform),
        waveform.tolist(),
        waveform.astype(np.float64),
        waveform[None],
        [torch.from_numpy(waveform).double()],
        [waveform.tolist()],
        (waveform,),
    ):
        torch.testing.assert_close(extractor(form, sampling_rate=RATE).input_features, expected, atol=1e-5, rtol=0)
    assert isinstance(extractor(waveform, sampling_rate=RATE, return_tensors="np").input_features, np.ndarray)


@pytest.mark.parametrize("channels", [1, 2, 6, 12])
def test_channels_are_mixed_to_their_mean(extractor, channels):
    clip = np.stack([noise(4_000, c) for c in range(channels)])
    expected = extractor(clip.mean(0), sampling_rate=RATE).input_features
    torch.testing.assert_close(extractor([clip], sampling_rate=RATE).input_features, expected, atol=1e-3, rtol=0)
    expected = extractor([clip], sampling_rate=RATE).input_features
    assert torch.equal(extractor([clip], sampling_rate=RATE).input_features, expected)
    assert torch.equal(extractor([clip.T], sampling_rate=RATE).input_features, expected)


@pytest.mark.parametrize(("dtype", "atol"), [(np.int16, 0.02), (np.int32, 1e-4)])
def test_integer_pcm(extractor, dtype, atol):
    waveform = noise(4_000).clip(-0.99, 0.99)
    pcm = np.round(waveform * -float(np.iinfo(dtype).min)).astype(dtype)
    expected = extractor(waveform, sampling_rate=RATE).input_features
    torch.testing.assert_close(extractor(pcm, sampling_rate=RATE).input_features, expected, atol=atol, rtol=0)


def test_unsigned_bytes_are_centred_on_128(extractor):
    pcm = np.full(4_000, 128, dtype=np.uint8)
    silence = extractor(np.zeros(4_000, np.float32), sampling_rate=RATE).input_features
    assert torch.equal(extractor(pcm, sampling_rate=RATE).input_features, silence)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_other_rates_are_resampled(extractor, rate):
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 1_000 * t).astype(np.float32)
    at_home = np.sin(2 * np.pi * 1_000 * np.arange(RATE) / RATE).astype(np.float32)
    mel = extractor(tone, sampling_rate=rate).input_features[0, 10:80].mean(0)
    assert mel.argmax() == extractor(at_home, sampling_rate=RATE).input_features[0, 10:80].mean(0).argmax()


def test_each_clip_may_have_its_own_rate(extractor):
    a, b = noise(8_000), noise(24_000, 1)
    both = extractor([a, b], sampling_rate=[8_000, 48_000]).input_features
    assert torch.equal(both[:1], extractor(a, sampling_rate=8_000).input_features)
    assert torch.equal(both[1:], extractor(b, sampling_rate=48_000).input_features)


def test_silence_is_kaldis_floor(extractor):
    features = extractor(np.zeros(16_000, np.float32), sampling_rate=RATE).input_features[0, :98]
    floor = (np.log(np.finfo(np.float32).eps) + 5.081) / 4.4849
    torch.testing.assert_close(features, torch.full_like(features, floor), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(0, np.float32), RATE, "Clip 0: empty: there are no samples"),
        ([], RATE, "list of clips is empty"),
        (
            [np.zeros(800, np.float32), np.array([0.0, np.nan] * 400)],
            RATE,
            "Clip 1: .*400 samples are NaN",
        ),
        (np.full(800, np.inf, np.float32), RATE, "800 samples are NaN or infinite, the first is number 0"),
        (np.zeros((2, 3, 800), np.float32), RATE, r"shape \(2, 3, 800\)"),
        ([np.zeros((2, 3, 800), np.float32)], RATE, r"shape \(2, 3, 800\)"),
        ([np.zeros((100, 800), np.float32)], RATE, "at most 32 channels"),
        (np.zeros(399, np.float32), RATE, "Clip 0: .*399 samples at 16000 Hz are less than one frame of 400"),
        (np.zeros(800, np.int64), RATE, "int64, whose scale is unknown"),
        (np.zeros(800, bool), RATE, "bool, whose scale is unknown"),
        (np.zeros(800, np.complex64), RATE, "complex64"),
        (np.array(["a"] * 800), RATE, "scale is unknown"),
        ("a.wav", RATE, "a.wav: missing"),
        ([[0.0, 1.0], [0.0]], RATE, "less than one frame"),
        (np.zeros(800, np.float32), 0, "Clip 0: bad_rate: 0 Hz"),
        (np.zeros(800, np.float32), float("inf"), "inf Hz"),
        (np.zeros(800, np.float32), float("nan"), "nan Hz"),
        (np.zeros(800, np.float32), 1_000_000_000, "1000000000 Hz"),
        (np.zeros(800, np.float32), "16000", "16000 Hz"),
        ([np.zeros(800, np.float32), np.full(800, 5e37, np.float32)], RATE, r"Clip 1: .*samples reach 5e\+37"),
        (np.full(800, 1e300), RATE, "800 samples are NaN or infinite"),
        (np.zeros(800, np.float32), [RATE, RATE], "2 sampling rates were given for 1 clips"),
    ],
)
def test_bad_input_is_named(extractor, audio, rate, message):
    with pytest.raises(ValueError, match=message):
        extractor(audio, sampling_rate=rate)


def test_a_misspelt_keyword_raises(extractor):
    with pytest.raises(TypeError, match="sample_rate"):
        extractor(noise(800), sample_rate=RATE)


def test_saves_and_loads(extractor, tmp_path):
    KaldiFbankFeatureExtractor(num_frames=1000, mean=-4.9).save_pretrained(tmp_path)
    loaded = KaldiFbankFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.num_frames, loaded.mean) == (1000, -4.9)
    assert loaded(noise(800), sampling_rate=RATE).input_features.shape == (1, 1000, 128)
