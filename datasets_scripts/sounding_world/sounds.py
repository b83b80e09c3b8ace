"""Sounds of things, synthesised with numpy: each fills `length` samples; their levels are set when they are mixed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SAMPLING_RATE = 16_000
_TABLE_SIZE = 2048
_TABLE_PHASE = 2 * np.pi * np.arange(_TABLE_SIZE) / _TABLE_SIZE
_TABLE_SINES = np.sin(np.outer(np.arange(1, 65), _TABLE_PHASE)).astype(np.float32)


@dataclass(frozen=True)
class Voice:
    """How one thing sounds in one scene.

    Attributes:
        pitch: Factor on every frequency.
        rate: Factor on how fast events and modulations follow each other.
        timbre: Brightness and balance of the overtones; in [-1, 1], beyond it for unseen timbres.
    """

    pitch: float
    rate: float
    timbre: float


def _overtones(count: int, slope: float, timbre: float) -> np.ndarray:
    """Amplitudes of `count` harmonics that fall with frequency to the power of `slope`, brighter with `timbre`."""
    order = np.arange(1, count + 1)
    even = np.clip(1 - 0.3 * timbre, 0, None)
    return (order ** -(slope - 0.35 * timbre) * np.where(order % 2 == 0, even, 1)).astype(np.float32)


def _seconds(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.float32) / SAMPLING_RATE


def _tone(
    frequency: float | np.ndarray, length: int, overtones: np.ndarray | tuple[float, ...] = (1.0,)
) -> np.ndarray:
    """Harmonic tone read from a wave table; harmonics that the sampling rate cannot hold are left out.

    Args:
        frequency: Fundamental in Hz, constant or one value per sample [length].
        length: Samples.
        overtones: Amplitudes of the harmonics, the fundamental first.
    """
    highest = int(0.47 * SAMPLING_RATE / np.max(frequency))
    weights = np.asarray(overtones, dtype=np.float32)[: max(1, highest)]
    table = weights @ _TABLE_SINES[: len(weights)]
    step = np.broadcast_to(np.asarray(frequency, dtype=np.float64) * (_TABLE_SIZE / SAMPLING_RATE), length)
    return table[np.cumsum(step).astype(np.int32) & (_TABLE_SIZE - 1)]


def noise(rng: np.random.Generator, length: int, centre: float, octaves: float) -> np.ndarray:
    """Noise with a spectrum of Gaussian shape in log frequency around `centre` Hz, `octaves` wide on either side."""
    size = 1 << (length - 1).bit_length()
    spectrum = rng.standard_normal((size // 2 + 1, 2), dtype=np.float32).view(np.complex64)[:, 0]
    return np.fft.irfft(spectrum * _noise_shape(size, centre, octaves), size)[:length].astype(np.float32)


def _noise_shape(size: int, centre: float, octaves: float) -> np.ndarray:
    distance = (_log_frequencies(size) - np.float32(np.log2(centre))) / np.float32(octaves)
    return np.exp(-0.5 * distance * distance)


@lru_cache(maxsize=32)
def _log_frequencies(size: int) -> np.ndarray:
    return np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLING_RATE), 1)).astype(np.float32)


def _decay(length: int, seconds: float, attack: float = 0.003) -> np.ndarray:
    time = _seconds(length)
    return np.minimum(time / attack, 1) * np.exp(-time / seconds)


def _swell(length: int) -> np.ndarray:
    """Smooth rise and fall over the whole event."""
    return np.sqrt(np.abs(np.sin(np.linspace(0, np.pi, length, dtype=np.float32))))


def _repeat(
    rng: np.random.Generator, length: int, event: Callable[[int], np.ndarray], periods: tuple[float, ...]
) -> np.ndarray:
    """Lays `event(0)`, `event(1)`, ... one after the other, `periods` seconds apart in turn, slightly irregularly."""
    wave = np.zeros(length, dtype=np.float32)
    start, count = int(rng.uniform(0, 0.3) * periods[0] * SAMPLING_RATE), 0
    while start < length:
        piece = event(count)[: length - start]
        wave[start : start + len(piece)] += piece * rng.uniform(0.8, 1)
        start += int(periods[count % len(periods)] * rng.uniform(0.96, 1.04) * SAMPLING_RATE)
        count += 1
    return wave


def _samples(seconds: float) -> int:
    return int(seconds * SAMPLING_RATE)


def bell(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    strike = np.zeros(min(length, _samples(1.5)), dtype=np.float32)
    for order, ratio in enumerate((0.5, 1, 1.19, 1.5, 2, 2.74, 3.76)):
        weight = np.exp(-(0.35 - 0.12 * voice.timbre) * order)
        strike += weight * _tone(620 * voice.pitch * ratio, len(strike)) * _decay(len(strike), 0.7 / (1 + 0.4 * order))
    return _repeat(rng, length, lambda _: strike, (1.1 / voice.rate,))


def siren(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    sweep = np.sin(2 * np.pi * (0.9 * voice.rate * _seconds(length) + rng.uniform()))
    return _tone(850 * voice.pitch * 2 ** (0.55 * sweep), length, _overtones(6, 1.6, voice.timbre))


def engine(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    wander = np.sin(2 * np.pi * (0.5 * voice.rate * _seconds(length) + rng.uniform()))
    return _tone(48 * voice.pitch * 2 ** (0.15 * wander), length, _overtones(24, 0.6, voice.timbre))


def rain(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    drops = np.zeros(length, dtype=np.float32)
    drops[rng.integers(0, length, int(90 * voice.rate * length / SAMPLING_RATE))] = 1
    drop = _tone(4500 * voice.pitch, _samples(0.006)) * _decay(_samples(0.006), 0.0015, attack=0.0003)
    hiss = noise(rng, length, 4200 * voice.pitch * 2 ** (0.2 * voice.timbre), 0.6)
    return 0.5 * hiss / hiss.std() + 1.5 * np.convolve(drops, drop)[:length]


def clock(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    def tick(count: int) -> np.ndarray:
        size, frequency = _samples(0.12), 2100 * voice.pitch * (1.0 if count % 2 else 0.7)
        return _tone(frequency, size, _overtones(3, 1.0, voice.timbre)) * _decay(size, 0.04, attack=0.0005)

    return _repeat(rng, length, tick, (0.27 / voice.rate,))


def drum(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.3)
    skin = _tone(voice.pitch * (65 + 110 * np.exp(-_seconds(size) / 0.03)), size, _overtones(4, 1.8, voice.timbre))
    slap = noise(rng, size, 900, 1.0)
    beat = skin * _decay(size, 0.09) + 0.25 * slap / slap.std() * _decay(size, 0.012)
    return _repeat(rng, length, lambda _: beat, (0.5 / voice.rate, 0.25 / voice.rate, 0.25 / voice.rate))


def bird(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    def chirp(_: int) -> np.ndarray:
        size = _samples(rng.uniform(0.1, 0.15))
        top, bottom = rng.uniform(4200, 5200), rng.uniform(2700, 3300)
        sweep = np.linspace(top, bottom, size) * voice.pitch
        return _tone(sweep, size, _overtones(2, 2.2, voice.timbre)) * _swell(size)

    gap = 0.17 / voice.rate
    return _repeat(rng, length, chirp, (gap, gap, gap, 2.5 * gap))


def whistle(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.65 / voice.rate)

    def blow(_: int) -> np.ndarray:
        trill = np.sin(2 * np.pi * 28 * voice.rate * _seconds(size))
        tone = _tone(2300 * voice.pitch * (1 + 0.04 * trill), size, _overtones(3, 2.0, voice.timbre))
        return (tone * (1 + 0.5 * trill) + 0.05 * rng.standard_normal(size, dtype=np.float32)) * _swell(size)

    return _repeat(rng, length, blow, (0.85 / voice.rate,))


def bee(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    time = _seconds(length)
    wander = np.sin(2 * np.pi * (1.3 * voice.rate * time + rng.uniform()))
    wander += 0.5 * np.sin(2 * np.pi * (3.1 * voice.rate * time + rng.uniform()))
    return _tone(230 * voice.pitch * 2 ** (0.08 * wander), length, _overtones(20, 0.7, voice.timbre)) * (
        1 + 0.3 * wander
    )


def telephone(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.7 / voice.rate)
    hammer = np.sin(2 * np.pi * 20 * voice.rate * _seconds(size)) > 0
    ring = np.where(
        hammer,
        _tone(1250 * voice.pitch, size, _overtones(4, 1.0, voice.timbre)),
        _tone(1560 * voice.pitch, size, _overtones(4, 1.0, voice.timbre)),
    )
    return _repeat(rng, length, lambda _: ring, (1.05 / voice.rate,))


def waves(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    phase = (0.8 * voice.rate * _seconds(length) + rng.uniform()) % 1
    surge = np.where(phase < 0.3, phase / 0.3, (1 - phase) / 0.7)  # rises quickly and runs out slowly
    return noise(rng, length, 700 * voice.pitch * 2 ** (0.25 * voice.timbre), 1.3) * (0.08 + surge**1.5)


def dog(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.17)

    def bark(_: int) -> np.ndarray:
        contour = voice.pitch * rng.uniform(0.95, 1.05) * (300 + 260 * np.sin(np.linspace(0.4, np.pi, size)))
        throat = _tone(contour, size, _overtones(10, 0.5, voice.timbre))
        return (throat + 0.35 * rng.standard_normal(size, dtype=np.float32)) * _swell(size)

    return _repeat(rng, length, bark, (0.3 / voice.rate, 0.7 / voice.rate))


def cat(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.85 / voice.rate)

    def meow(_: int) -> np.ndarray:
        contour = voice.pitch * (430 + 330 * np.sin(np.linspace(0.2, 0.95 * np.pi, size)))
        return _tone(contour, size, _overtones(7, 1.1, voice.timbre)) * _swell(size)

    return _repeat(rng, length, meow, (1.15 / voice.rate,))


def frog(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    pulse = _tone(750 * voice.pitch, _samples(0.03), _overtones(4, 1.2, voice.timbre)) * _decay(_samples(0.03), 0.006)
    croak = np.zeros(_samples(0.38), dtype=np.float32)
    for start in range(0, len(croak) - len(pulse), _samples(1 / (38 * voice.rate))):
        croak[start : start + len(pulse)] += pulse
    croak *= _swell(len(croak))
    return _repeat(rng, length, lambda _: croak, (0.6 / voice.rate,))


def train(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.2)
    steam = noise(rng, size, 1500 * voice.pitch * 2 ** (0.3 * voice.timbre), 0.9)
    chuff = steam / steam.std() * _decay(size, 0.06, attack=0.02)
    accents = (1.0, 0.6, 0.75, 0.6)
    return _repeat(rng, length, lambda count: accents[count % 4] * chuff, (0.2 / voice.rate,))


def owl(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    durations, gaps = (0.3, 0.14, 0.45), (0.42, 0.2, 0.75)

    def hoot(count: int) -> np.ndarray:
        size = _samples(durations[count % 3] / voice.rate)
        fall = np.linspace(1.06, 0.96, size)
        return _tone(370 * voice.pitch * fall, size, _overtones(3, 3.0, voice.timbre)) * _swell(size)

    return _repeat(rng, length, hoot, tuple(gap / voice.rate for gap in gaps))


def nothing(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    return np.zeros(length, dtype=np.float32)


def wind(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    time = _seconds(length)
    gust = np.sin(2 * np.pi * (0.45 * voice.rate * time + rng.uniform()))
    low = noise(rng, length, 260 * voice.pitch, 0.35 + 0.1 * abs(voice.timbre))
    high = noise(rng, length, 420 * voice.pitch, 0.3 + 0.1 * abs(voice.timbre))
    return low / low.std() * (1.1 - gust) + high / high.std() * (1.1 + gust)
