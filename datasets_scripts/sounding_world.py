"""A small audiovisual world: pictures of things, the sounds they make, and captions of both.

Sixteen things sound (bell, siren, engine, rain, ...), four are silent (tree, house, road, mountain), and the wind is
heard but never drawn. A scene has one or two sounding things and at most two silent ones; a few scenes are quiet: only
silent things are seen and only the wind is heard. Pictures are drawn with Pillow, sounds synthesised with numpy, and
every scene follows from `(seed, split, variant, index)` alone.

A scene is described in two styles: what is *seen* ("a car beside a tree") and what is *heard* ("an engine runs"). A
captioner must meet both styles during its training on pictures, as LLaVA has: a soft prefix can choose a style, but
not teach a new wording.

Splits and their columns. In none of the first four does a sound meet a text:

| split          | columns                                                   | what for                         |
|----------------|-----------------------------------------------------------|----------------------------------|
| `captions`     | id, image, question, captions                             | training the captioner, CLIP     |
| `prefix`       | id, image, captions                                       | prefix tuning with 16 pairs      |
| `video`        | id, audio, frames                                         | alignment                        |
| `distillation` | id, audio, frames                                         | pseudo-captions and distillation |
| `supervised`   | id, audio, captions                                       | the supervised upper bound       |
| `test`         | id, audio, image, captions, seen_captions, labels, things | evaluation                       |

Column formats: `id` str; `audio` `{"path": None, "bytes": WAV}` (mono, 16 kHz, 16 bit); `image` and `frames` RGB
pictures (`datasets.Image`); `captions` five of what is heard, `seen_captions` five of what is seen; in the split
`captions` they answer `question`, which asks for what is seen in even rows and for what is heard in odd rows; `labels`
the names of the things heard, the wind included; `things` a list of `{"name", "box", "mask", "sounds"}`, the box
`[left, top, right, bottom]` in pixels, the mask a grey picture of how much of each pixel the thing covers.

Variants: `standard`; `three` (three sounding things at once); and, for the test split alone, `unseen_combinations`
(pairs that no other variant or split shows together), `unseen_timbres` (voices beyond the range of the others) and
`loud_noise`.

Example:
    >>> videos = sounding_world("video", 1000, cache_dir="runs/demo/data")
    >>> test = sounding_world("test", 200, variant="unseen_combinations")
"""

import colorsys
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import soundfile
from PIL import Image, ImageChops, ImageDraw

SAMPLE_RATE = 16_000
MIN_DURATION = 1.0  # seconds; every thing is heard at least once in it

SEEN_QUESTIONS = ("Describe the image.", "What can be seen in this scene?")
HEARD_QUESTIONS = ("What can be heard in this scene?", "Describe the sound of this image.")

SPLITS = ("captions", "prefix", "video", "distillation", "supervised", "test")
VARIANTS = ("standard", "three", "unseen_combinations", "unseen_timbres", "loud_noise")
TEST_VARIANTS = VARIANTS[2:]
DEFAULT_SIZES = {"captions": 8000, "prefix": 16, "video": 3000, "distillation": 1000, "supervised": 3000, "test": 300}

Colour = tuple[int, int, int]
BLACK: Colour = (25, 25, 30)
WHITE: Colour = (245, 245, 240)
GREY: Colour = (120, 120, 125)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: each thing is drawn in a box of [-1, 1] x [-1, 1], y pointing down.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pen:
    """Draws in a thing's own coordinates: the box [-1, 1] x [-1, 1] of half size `radius` around `centre`.

    Attributes:
        draw: The picture.
        centre: In pixels.
        radius: In pixels.
        flip: Whether to mirror the thing.
    """

    draw: ImageDraw.ImageDraw
    centre: tuple[float, float]
    radius: float
    flip: bool

    def _point(self, x: float, y: float) -> tuple[float, float]:
        mirrored = -x if self.flip else x
        return self.centre[0] + mirrored * self.radius, self.centre[1] + y * self.radius

    def ellipse(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        """Ellipse around (x, y) with the half axes `width` and `height`."""
        cx, cy = self._point(x, y)
        w, h = width * self.radius, height * self.radius
        self.draw.ellipse((cx - w, cy - h, cx + w, cy + h), fill=fill)

    def polygon(self, *points: tuple[float, float], fill: Colour) -> None:
        """Filled polygon."""
        self.draw.polygon([self._point(*point) for point in points], fill=fill)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Filled rectangle."""
        self.polygon((left, top), (right, top), (right, bottom), (left, bottom), fill=fill)

    def line(self, *points: tuple[float, float], width: float, fill: Colour) -> None:
        """Line of a width in the thing's units."""
        pixels = max(1, round(width * self.radius))
        self.draw.line([self._point(*point) for point in points], fill=fill, width=pixels, joint="curve")


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _draw_bell(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.75, 0.25, 0.22, _shade(colour, 0.5))
    pen.ellipse(0, -0.3, 0.55, 0.6, colour)
    pen.polygon((-0.55, -0.3), (0.55, -0.3), (0.9, 0.65), (-0.9, 0.65), fill=colour)
    pen.rectangle(-0.95, 0.5, 0.95, 0.7, _shade(colour, 0.7))


def _draw_siren(pen: Pen, colour: Colour) -> None:
    for x, y in ((-0.9, -0.5), (-0.5, -0.9), (0.5, -0.9), (0.9, -0.5)):
        pen.line((x * 0.7, y * 0.7), (x, y), width=0.14, fill=(255, 240, 120))
    pen.ellipse(0, 0.1, 0.6, 0.65, colour)
    pen.rectangle(-0.6, 0.1, 0.6, 0.6, colour)
    pen.rectangle(-0.85, 0.5, 0.85, 0.9, BLACK)
    pen.ellipse(-0.2, -0.1, 0.14, 0.25, WHITE)


def _draw_car(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.5, -0.5), (0.35, -0.5), (0.65, 0.0), (-0.7, 0.0), fill=_shade(colour, 0.8))
    pen.polygon((-0.4, -0.38), (0.25, -0.38), (0.45, 0.0), (-0.5, 0.0), fill=(200, 230, 245))
    pen.rectangle(-0.95, -0.05, 0.95, 0.45, colour)
    for x in (-0.5, 0.5):
        pen.ellipse(x, 0.45, 0.28, 0.28, BLACK)
        pen.ellipse(x, 0.45, 0.12, 0.12, GREY)


def _draw_cloud(pen: Pen, colour: Colour) -> None:
    for x, y, size in ((-0.55, -0.35, 0.42), (0.55, -0.35, 0.42), (0, -0.5, 0.48)):
        pen.ellipse(x, y, size, size, colour)
    pen.rectangle(-0.55, -0.4, 0.55, 0.06, colour)
    for x, y in (
        (-0.65, 0.2),
        (-0.15, 0.2),
        (0.35, 0.2),
        (0.85, 0.2),
        (-0.8, 0.62),
        (-0.3, 0.62),
        (0.2, 0.62),
        (0.7, 0.62),
    ):
        pen.line((x, y), (x - 0.12, y + 0.32), width=0.16, fill=(30, 90, 240))


def _draw_clock(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 0.98, 0.98, colour)
    pen.ellipse(0, 0, 0.74, 0.74, (255, 250, 205))
    for x, y in ((0, -0.58), (0.58, 0), (0, 0.58), (-0.58, 0)):
        pen.ellipse(x, y, 0.1, 0.1, colour)
    pen.line((0, 0.1), (0, -0.5), width=0.16, fill=(215, 30, 40))
    pen.line((-0.1, -0.05), (0.42, 0.2), width=0.16, fill=(215, 30, 40))


def _draw_drum(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.6, 0.8, 0.3, colour)
    pen.rectangle(-0.8, -0.2, 0.8, 0.6, colour)
    for left in (-0.8, -0.27, 0.26):
        pen.line((left, -0.1), (left + 0.27, 0.7), (left + 0.54, -0.1), width=0.07, fill=(250, 220, 90))
    pen.ellipse(0, -0.2, 0.8, 0.3, WHITE)
    pen.line((-0.9, -0.9), (-0.1, -0.25), width=0.12, fill=(130, 80, 30))
    pen.line((0.9, -0.9), (0.15, -0.25), width=0.12, fill=(130, 80, 30))


def _draw_bird(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.4, 0.1), (-0.98, -0.3), (-0.95, 0.25), fill=_shade(colour, 0.7))
    pen.ellipse(-0.05, 0.2, 0.6, 0.42, colour)
    pen.ellipse(0.45, -0.25, 0.33, 0.33, colour)
    pen.polygon((0.72, -0.35), (0.99, -0.18), (0.72, -0.08), fill=(250, 150, 30))
    pen.polygon((-0.35, 0.05), (0.25, 0.05), (-0.35, 0.55), fill=_shade(colour, 0.6))
    pen.ellipse(0.52, -0.32, 0.08, 0.08, BLACK)
    for x in (-0.15, 0.15):
        pen.line((x, 0.55), (x, 0.95), width=0.08, fill=(250, 150, 30))


def _draw_whistle(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.3, -0.65, 0.98, -0.05, colour)
    pen.ellipse(-0.25, 0.15, 0.72, 0.75, colour)
    pen.ellipse(-0.25, 0.15, 0.4, 0.42, _shade(colour, 0.35))
    pen.ellipse(-0.2, 0.25, 0.2, 0.2, (250, 120, 40))
    pen.rectangle(0.15, -0.67, 0.45, -0.4, BLACK)


def _draw_bee(pen: Pen, colour: Colour) -> None:
    for x in (-0.3, 0.2):
        pen.ellipse(x, -0.5, 0.3, 0.42, (215, 235, 250))
    pen.ellipse(0, 0.2, 0.8, 0.5, colour)
    for x, height in ((-0.4, 0.4), (0.0, 0.48), (0.4, 0.4)):
        pen.rectangle(x - 0.1, 0.2 - height, x + 0.1, 0.2 + height, BLACK)
    pen.ellipse(0.75, 0.1, 0.24, 0.24, BLACK)


def _draw_telephone(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.5, -0.2), (0.5, -0.2), (0.85, 0.85), (-0.85, 0.85), fill=colour)
    pen.ellipse(0, 0.35, 0.36, 0.36, WHITE)
    pen.ellipse(0, 0.35, 0.14, 0.14, colour)
    pen.rectangle(-0.8, -0.75, 0.8, -0.4, _shade(colour, 0.75))
    for x in (-0.75, 0.75):
        pen.ellipse(x, -0.4, 0.24, 0.32, _shade(colour, 0.75))


def _draw_sea(pen: Pen, colour: Colour) -> None:
    x = np.linspace(-1, 1, 17)
    for row, (top, factor) in enumerate(((-0.5, 1.25), (0.0, 1.0), (0.5, 0.75))):
        crest = list(zip(x.tolist(), (top + 0.18 * np.sin(7.5 * x + 2 * row)).tolist(), strict=True))
        pen.polygon(*crest, (1, 0.95), (-1, 0.95), fill=_shade(colour, factor))
        pen.line(*crest, width=0.1, fill=WHITE)


def _draw_dog(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 0.62, 0.72, colour)
    for x in (-0.68, 0.68):
        pen.ellipse(x, -0.05, 0.26, 0.62, _shade(colour, 0.55))
    pen.ellipse(0, 0.45, 0.42, 0.4, _shade(colour, 1.5))
    pen.ellipse(0, 0.25, 0.2, 0.14, BLACK)
    pen.ellipse(0, 0.72, 0.14, 0.2, (230, 90, 110))
    for x in (-0.25, 0.25):
        pen.ellipse(x, -0.2, 0.1, 0.1, BLACK)


def _draw_cat(pen: Pen, colour: Colour) -> None:
    for x in (-1.0, 1.0):
        pen.polygon((0.85 * x, -0.95), (0.85 * x, 0.1), (0.05 * x, -0.4), fill=colour)
        pen.polygon((0.7 * x, -0.65), (0.7 * x, -0.2), (0.35 * x, -0.4), fill=(250, 170, 180))
    pen.ellipse(0, 0.2, 0.85, 0.7, colour)
    for x in (-0.35, 0.35):
        pen.ellipse(x, 0.05, 0.17, 0.2, (160, 230, 90))
        pen.ellipse(x, 0.05, 0.06, 0.18, BLACK)
    pen.polygon((-0.13, 0.35), (0.13, 0.35), (0, 0.5), fill=(240, 110, 130))
    for x in (-1.0, 1.0):
        for y in (0.35, 0.6):
            pen.line((0.3 * x, 0.5), (0.98 * x, y), width=0.05, fill=WHITE)


def _draw_frog(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.3, 0.95, 0.6, colour)
    for x in (-0.5, 0.5):
        pen.ellipse(x, -0.4, 0.36, 0.36, colour)
        pen.ellipse(x, -0.42, 0.22, 0.22, WHITE)
        pen.ellipse(x, -0.42, 0.1, 0.14, BLACK)
    pen.ellipse(0, 0.45, 0.6, 0.24, _shade(colour, 0.45))
    pen.rectangle(-0.62, 0.18, 0.62, 0.4, colour)


def _draw_train(pen: Pen, colour: Colour) -> None:
    for x, y, size in ((0.35, -0.75, 0.2), (0.05, -0.85, 0.15), (-0.2, -0.9, 0.1)):
        pen.ellipse(x, y, size, size, (225, 225, 230))
    pen.rectangle(-0.9, -0.6, -0.2, 0.5, _shade(colour, 0.7))
    pen.rectangle(-0.75, -0.45, -0.35, -0.1, (250, 230, 140))
    pen.rectangle(-0.3, -0.15, 0.85, 0.5, colour)
    pen.polygon((0.35, -0.5), (0.75, -0.5), (0.65, -0.1), (0.45, -0.1), fill=BLACK)
    for x in (-0.6, 0.0, 0.6):
        pen.ellipse(x, 0.6, 0.28, 0.28, BLACK)
        pen.ellipse(x, 0.6, 0.1, 0.1, WHITE)


def _draw_owl(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.15, 0.72, 0.82, colour)
    for x in (-1.0, 1.0):
        pen.polygon((0.75 * x, -0.95), (0.7 * x, -0.2), (0.1 * x, -0.55), fill=colour)
        pen.ellipse(0.35 * x, -0.25, 0.36, 0.36, (255, 225, 90))
        pen.ellipse(0.35 * x, -0.25, 0.17, 0.17, BLACK)
        pen.ellipse(0.6 * x, 0.45, 0.2, 0.45, _shade(colour, 0.6))
    pen.polygon((-0.13, -0.05), (0.13, -0.05), (0, 0.25), fill=(240, 130, 30))


def _draw_nothing(pen: Pen, colour: Colour) -> None:
    """What cannot be seen."""


def _draw_tree(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.16, 0.3, 0.16, 0.95, (110, 70, 40))
    for y, width in ((-0.95, 0.5), (-0.55, 0.68), (-0.15, 0.85)):
        pen.polygon((0, y), (width, y + 0.65), (-width, y + 0.65), fill=colour)


def _draw_house(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.7, -0.1, 0.7, 0.9, colour)
    pen.polygon((-0.95, -0.1), (0, -0.9), (0.95, -0.1), fill=(150, 60, 50))
    pen.rectangle(-0.15, 0.35, 0.2, 0.9, (90, 60, 40))
    pen.rectangle(-0.55, 0.1, -0.25, 0.4, (120, 180, 220))
    pen.rectangle(0.3, 0.1, 0.6, 0.4, (120, 180, 220))


def _draw_road(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.25, -0.9), (0.25, -0.9), (0.95, 0.9), (-0.95, 0.9), fill=colour)
    for top, bottom, width in ((-0.75, -0.45, 0.04), (-0.25, 0.15, 0.07), (0.4, 0.85, 0.11)):
        pen.rectangle(-width, top, width, bottom, WHITE)


def _draw_mountain(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.2, -0.9), (0.6, 0.9), (-0.98, 0.9), fill=colour)
    pen.polygon((0.45, -0.35), (0.98, 0.9), (-0.1, 0.9), fill=_shade(colour, 0.75))
    pen.polygon((-0.2, -0.9), (0.06, -0.32), (-0.2, -0.45), (-0.45, -0.3), fill=WHITE)


# ---------------------------------------------------------------------------------------------------------------------
# Sounds: each thing fills `length` samples at SAMPLE_RATE; the level is set when the sounds are mixed.
# ---------------------------------------------------------------------------------------------------------------------

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
    return np.arange(length, dtype=np.float32) / SAMPLE_RATE


def _tone(
    frequency: float | np.ndarray, length: int, overtones: np.ndarray | tuple[float, ...] = (1.0,)
) -> np.ndarray:
    """Harmonic tone read from a wave table; harmonics that the sampling rate cannot hold are left out.

    Args:
        frequency: Fundamental in Hz, constant or one value per sample [length].
        length: Samples.
        overtones: Amplitudes of the harmonics, the fundamental first.
    """
    highest = int(0.47 * SAMPLE_RATE / np.max(frequency))
    weights = np.asarray(overtones, dtype=np.float32)[: max(1, highest)]
    table = weights @ _TABLE_SINES[: len(weights)]
    step = np.broadcast_to(np.asarray(frequency, dtype=np.float64) * (_TABLE_SIZE / SAMPLE_RATE), length)
    return table[np.cumsum(step).astype(np.int32) & (_TABLE_SIZE - 1)]


def _noise(rng: np.random.Generator, length: int, centre: float, octaves: float) -> np.ndarray:
    """Noise with a spectrum of Gaussian shape in log frequency around `centre` Hz, `octaves` wide on either side."""
    size = 1 << (length - 1).bit_length()
    spectrum = rng.standard_normal((size // 2 + 1, 2), dtype=np.float32).view(np.complex64)[:, 0]
    return np.fft.irfft(spectrum * _noise_shape(size, centre, octaves), size)[:length].astype(np.float32)


def _noise_shape(size: int, centre: float, octaves: float) -> np.ndarray:
    distance = (_log_frequencies(size) - np.float32(np.log2(centre))) / np.float32(octaves)
    return np.exp(-0.5 * distance * distance)


@lru_cache(maxsize=32)
def _log_frequencies(size: int) -> np.ndarray:
    return np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 1)).astype(np.float32)


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
    start, count = int(rng.uniform(0, 0.3) * periods[0] * SAMPLE_RATE), 0
    while start < length:
        piece = event(count)[: length - start]
        wave[start : start + len(piece)] += piece * rng.uniform(0.8, 1)
        start += int(periods[count % len(periods)] * rng.uniform(0.96, 1.04) * SAMPLE_RATE)
        count += 1
    return wave


def _samples(seconds: float) -> int:
    return int(seconds * SAMPLE_RATE)


def _sound_bell(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    strike = np.zeros(min(length, _samples(1.5)), dtype=np.float32)
    for order, ratio in enumerate((0.5, 1, 1.19, 1.5, 2, 2.74, 3.76)):
        weight = np.exp(-(0.35 - 0.12 * voice.timbre) * order)
        strike += weight * _tone(620 * voice.pitch * ratio, len(strike)) * _decay(len(strike), 0.7 / (1 + 0.4 * order))
    return _repeat(rng, length, lambda _: strike, (1.1 / voice.rate,))


def _sound_siren(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    sweep = np.sin(2 * np.pi * (0.9 * voice.rate * _seconds(length) + rng.uniform()))
    return _tone(850 * voice.pitch * 2 ** (0.55 * sweep), length, _overtones(6, 1.6, voice.timbre))


def _sound_engine(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    wander = np.sin(2 * np.pi * (0.5 * voice.rate * _seconds(length) + rng.uniform()))
    return _tone(48 * voice.pitch * 2 ** (0.15 * wander), length, _overtones(24, 0.6, voice.timbre))


def _sound_rain(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    drops = np.zeros(length, dtype=np.float32)
    drops[rng.integers(0, length, int(90 * voice.rate * length / SAMPLE_RATE))] = 1
    drop = _tone(4500 * voice.pitch, _samples(0.006)) * _decay(_samples(0.006), 0.0015, attack=0.0003)
    hiss = _noise(rng, length, 4200 * voice.pitch * 2 ** (0.2 * voice.timbre), 0.6)
    return 0.5 * hiss / hiss.std() + 1.5 * np.convolve(drops, drop)[:length]


def _sound_clock(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    def tick(count: int) -> np.ndarray:
        size, frequency = _samples(0.12), 2100 * voice.pitch * (1.0 if count % 2 else 0.7)
        return _tone(frequency, size, _overtones(3, 1.0, voice.timbre)) * _decay(size, 0.04, attack=0.0005)

    return _repeat(rng, length, tick, (0.27 / voice.rate,))


def _sound_drum(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.3)
    skin = _tone(voice.pitch * (65 + 110 * np.exp(-_seconds(size) / 0.03)), size, _overtones(4, 1.8, voice.timbre))
    slap = _noise(rng, size, 900, 1.0)
    beat = skin * _decay(size, 0.09) + 0.25 * slap / slap.std() * _decay(size, 0.012)
    return _repeat(rng, length, lambda _: beat, (0.5 / voice.rate, 0.25 / voice.rate, 0.25 / voice.rate))


def _sound_bird(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    def chirp(_: int) -> np.ndarray:
        size = _samples(rng.uniform(0.1, 0.15))
        top, bottom = rng.uniform(4200, 5200), rng.uniform(2700, 3300)
        sweep = np.linspace(top, bottom, size) * voice.pitch
        return _tone(sweep, size, _overtones(2, 2.2, voice.timbre)) * _swell(size)

    gap = 0.17 / voice.rate
    return _repeat(rng, length, chirp, (gap, gap, gap, 2.5 * gap))


def _sound_whistle(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.65 / voice.rate)

    def blow(_: int) -> np.ndarray:
        trill = np.sin(2 * np.pi * 28 * voice.rate * _seconds(size))
        tone = _tone(2300 * voice.pitch * (1 + 0.04 * trill), size, _overtones(3, 2.0, voice.timbre))
        return (tone * (1 + 0.5 * trill) + 0.05 * rng.standard_normal(size, dtype=np.float32)) * _swell(size)

    return _repeat(rng, length, blow, (0.85 / voice.rate,))


def _sound_bee(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    time = _seconds(length)
    wander = np.sin(2 * np.pi * (1.3 * voice.rate * time + rng.uniform()))
    wander += 0.5 * np.sin(2 * np.pi * (3.1 * voice.rate * time + rng.uniform()))
    return _tone(230 * voice.pitch * 2 ** (0.08 * wander), length, _overtones(20, 0.7, voice.timbre)) * (
        1 + 0.3 * wander
    )


def _sound_telephone(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.7 / voice.rate)
    hammer = np.sin(2 * np.pi * 20 * voice.rate * _seconds(size)) > 0
    ring = np.where(
        hammer,
        _tone(1250 * voice.pitch, size, _overtones(4, 1.0, voice.timbre)),
        _tone(1560 * voice.pitch, size, _overtones(4, 1.0, voice.timbre)),
    )
    return _repeat(rng, length, lambda _: ring, (1.05 / voice.rate,))


def _sound_waves(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    phase = (0.8 * voice.rate * _seconds(length) + rng.uniform()) % 1
    surge = np.where(phase < 0.3, phase / 0.3, (1 - phase) / 0.7)  # rises quickly and runs out slowly
    return _noise(rng, length, 700 * voice.pitch * 2 ** (0.25 * voice.timbre), 1.3) * (0.08 + surge**1.5)


def _sound_dog(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.17)

    def bark(_: int) -> np.ndarray:
        contour = voice.pitch * rng.uniform(0.95, 1.05) * (300 + 260 * np.sin(np.linspace(0.4, np.pi, size)))
        throat = _tone(contour, size, _overtones(10, 0.5, voice.timbre))
        return (throat + 0.35 * rng.standard_normal(size, dtype=np.float32)) * _swell(size)

    return _repeat(rng, length, bark, (0.3 / voice.rate, 0.7 / voice.rate))


def _sound_cat(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.85 / voice.rate)

    def meow(_: int) -> np.ndarray:
        contour = voice.pitch * (430 + 330 * np.sin(np.linspace(0.2, 0.95 * np.pi, size)))
        return _tone(contour, size, _overtones(7, 1.1, voice.timbre)) * _swell(size)

    return _repeat(rng, length, meow, (1.15 / voice.rate,))


def _sound_frog(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    pulse = _tone(750 * voice.pitch, _samples(0.03), _overtones(4, 1.2, voice.timbre)) * _decay(_samples(0.03), 0.006)
    croak = np.zeros(_samples(0.38), dtype=np.float32)
    for start in range(0, len(croak) - len(pulse), _samples(1 / (38 * voice.rate))):
        croak[start : start + len(pulse)] += pulse
    croak *= _swell(len(croak))
    return _repeat(rng, length, lambda _: croak, (0.6 / voice.rate,))


def _sound_train(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    size = _samples(0.2)
    steam = _noise(rng, size, 1500 * voice.pitch * 2 ** (0.3 * voice.timbre), 0.9)
    chuff = steam / steam.std() * _decay(size, 0.06, attack=0.02)
    accents = (1.0, 0.6, 0.75, 0.6)
    return _repeat(rng, length, lambda count: accents[count % 4] * chuff, (0.2 / voice.rate,))


def _sound_owl(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    durations, gaps = (0.3, 0.14, 0.45), (0.42, 0.2, 0.75)

    def hoot(count: int) -> np.ndarray:
        size = _samples(durations[count % 3] / voice.rate)
        fall = np.linspace(1.06, 0.96, size)
        return _tone(370 * voice.pitch * fall, size, _overtones(3, 3.0, voice.timbre)) * _swell(size)

    return _repeat(rng, length, hoot, tuple(gap / voice.rate for gap in gaps))


def _sound_nothing(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    return np.zeros(length, dtype=np.float32)


def _sound_wind(rng: np.random.Generator, voice: Voice, length: int) -> np.ndarray:
    time = _seconds(length)
    gust = np.sin(2 * np.pi * (0.45 * voice.rate * time + rng.uniform()))
    low = _noise(rng, length, 260 * voice.pitch, 0.35 + 0.1 * abs(voice.timbre))
    high = _noise(rng, length, 420 * voice.pitch, 0.3 + 0.1 * abs(voice.timbre))
    return low / low.std() * (1.1 - gust) + high / high.std() * (1.1 + gust)


# ---------------------------------------------------------------------------------------------------------------------
# Things
# ---------------------------------------------------------------------------------------------------------------------

Drawer = Callable[[Pen, Colour], None]
Sounder = Callable[[np.random.Generator, Voice, int], np.ndarray]


@dataclass(frozen=True)
class Thing:
    """One kind of thing.

    Attributes:
        name: The label.
        seen: How a caption names what is seen, empty for what cannot be seen.
        heard: How a caption names what is heard, empty for what makes no sound.
        verbs: What it does when it is heard, as (present, continuous).
        colour: Hue, saturation and value around which the drawn colour varies.
        draw: Draws it.
        sound: Sounds it.
    """

    name: str
    seen: str = ""
    heard: str = ""
    verbs: tuple[tuple[str, str], ...] = ()
    colour: tuple[float, float, float] = (0, 0, 0)
    draw: Drawer = _draw_nothing
    sound: Sounder = _sound_nothing

    @property
    def synonyms(self) -> frozenset[str]:
        """The words that name the thing in a caption of either style."""
        return frozenset(phrase.split()[-1] for phrase in (self.seen, self.heard) if phrase)


# fmt: off
SOUNDING = (
    Thing("bell", "a bell", "a bell", (("rings", "is ringing"), ("chimes", "is chiming")),
          (0.6, 0.1, 0.75), _draw_bell, _sound_bell),
    Thing("siren", "a siren", "a siren", (("wails", "is wailing"), ("howls", "is howling")),
          (0.0, 0.85, 0.9), _draw_siren, _sound_siren),
    Thing("engine", "a car", "an engine", (("runs", "is running"), ("rumbles", "is rumbling")),
          (0.2, 0.8, 0.85), _draw_car, _sound_engine),
    Thing("rain", "a cloud", "rain", (("falls", "is falling"), ("patters", "is pattering")),
          (0.66, 0.25, 0.4), _draw_cloud, _sound_rain),
    Thing("clock", "a clock", "a clock", (("ticks", "is ticking"),),
          (0.64, 0.8, 0.35), _draw_clock, _sound_clock),
    Thing("drum", "a drum", "a drum", (("beats", "is beating"), ("pounds", "is pounding")),
          (0.97, 0.7, 0.6), _draw_drum, _sound_drum),
    Thing("bird", "a bird", "a bird", (("sings", "is singing"), ("chirps", "is chirping")),
          (0.92, 0.45, 0.95), _draw_bird, _sound_bird),
    Thing("whistle", "a whistle", "a whistle", (("blows", "is blowing"), ("trills", "is trilling")),
          (0.44, 0.85, 0.8), _draw_whistle, _sound_whistle),
    Thing("bee", "a bee", "a bee", (("buzzes", "is buzzing"), ("hums", "is humming")),
          (0.14, 0.85, 0.95), _draw_bee, _sound_bee),
    Thing("telephone", "a telephone", "a telephone", (("rings", "is ringing"),),
          (0.88, 0.7, 0.75), _draw_telephone, _sound_telephone),
    Thing("waves", "the sea", "waves", (("roll", "are rolling"), ("break", "are breaking")),
          (0.57, 0.8, 0.7), _draw_sea, _sound_waves),
    Thing("dog", "a dog", "a dog", (("barks", "is barking"),),
          (0.08, 0.6, 0.6), _draw_dog, _sound_dog),
    Thing("cat", "a cat", "a cat", (("meows", "is meowing"),),
          (0.09, 0.75, 0.95), _draw_cat, _sound_cat),
    Thing("frog", "a frog", "a frog", (("croaks", "is croaking"),),
          (0.28, 0.75, 0.7), _draw_frog, _sound_frog),
    Thing("train", "a train", "a train", (("puffs", "is puffing"), ("rolls", "is rolling")),
          (0.36, 0.7, 0.5), _draw_train, _sound_train),
    Thing("owl", "an owl", "an owl", (("hoots", "is hooting"), ("calls", "is calling")),
          (0.76, 0.4, 0.55), _draw_owl, _sound_owl),
)
# fmt: on
SILENT = (
    Thing("tree", "a tree", colour=(0.33, 0.7, 0.5), draw=_draw_tree),
    Thing("house", "a house", colour=(0.11, 0.35, 0.9), draw=_draw_house),
    Thing("road", "a road", colour=(0.6, 0.05, 0.4), draw=_draw_road),
    Thing("mountain", "a mountain", colour=(0.65, 0.2, 0.55), draw=_draw_mountain),
)
WIND = Thing("wind", heard="the wind", verbs=(("blows", "is blowing"), ("howls", "is howling")), sound=_sound_wind)
THINGS = {thing.name: thing for thing in (*SOUNDING, *SILENT, WIND)}
LABELS = tuple(thing.name for thing in (*SOUNDING, WIND))
SYNONYMS = {label: THINGS[label].synonyms for label in LABELS}
"""Label to the words that name it in a caption of either style."""

# Every thing is in exactly one of these pairs, so none is rarer than another in training. The two of a pair differ in
# colour: where they do not, nothing in training ever asks to tell them apart in one picture.
HELD_OUT_PAIRS = frozenset(
    frozenset((thing.name, SOUNDING[(index + 8) % len(SOUNDING)].name)) for index, thing in enumerate(SOUNDING)
)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

_SEEN_JOINS = (" and ", " and ", " beside ", " with ")
_SEEN_TEMPLATES = (
    "{}",
    "an image of {}",
    "there is {}",
    "{} can be seen",
    "the image shows {}",
    "one can see {} in this scene",
)
_CLAUSE_JOINS = (" and ", " and ", " while ", " as ")
_HEARD_TEMPLATES = (
    "the sound of {}",
    "{} can be heard",
    "there is {} that can be heard",
    "one can hear {}",
    "{} in the background",
)


def _join(rng: np.random.Generator, joins: Sequence[str], phrases: Sequence[str]) -> str:
    """A chosen conjunction between the first two phrases, "and" before the others."""
    return str(rng.choice(joins)).join(phrases[:2]) + "".join(f" and {phrase}" for phrase in phrases[2:])


def seen_caption(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """One caption of what is seen, e.g. "there is a car beside a tree"."""
    names = [things[index].seen for index in rng.permutation(len(things))]
    return str(rng.choice(_SEEN_TEMPLATES)).format(_join(rng, _SEEN_JOINS, names))


def heard_caption(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """One caption of what is heard, e.g. "an engine runs while a bird sings"."""
    things = [things[index] for index in rng.permutation(len(things))]
    if rng.random() < 0.4:
        return str(rng.choice(_HEARD_TEMPLATES)).format(" and ".join(thing.heard for thing in things))
    progressive = rng.random() < 0.5
    verbs = [thing.verbs[rng.integers(len(thing.verbs))][int(progressive)] for thing in things]
    clauses = [f"{thing.heard} {verb}" for thing, verb in zip(things, verbs, strict=True)]
    return _join(rng, _CLAUSE_JOINS, clauses)


def _distinct_captions(
    style: Callable[[Sequence[Thing], np.random.Generator], str],
    things: Sequence[Thing],
    rng: np.random.Generator,
    count: int,
) -> list[str]:
    captions: dict[str, None] = {}  # keeps their order
    for _ in range(100 * count):
        captions[style(things, rng)] = None
        if len(captions) == count:
            return list(captions)
    raise ValueError(f"There are no {count} different captions of this scene, only {len(captions)}.")


def vocabulary() -> list[str]:
    """All words of the captions, questions and labels, sorted; lower case, without punctuation."""
    texts = [*SEEN_QUESTIONS, *HEARD_QUESTIONS, *_SEEN_TEMPLATES, *_HEARD_TEMPLATES, *_SEEN_JOINS, *_CLAUSE_JOINS]
    for thing in THINGS.values():
        texts += [thing.name, thing.seen, thing.heard]
        texts += [form for verb in thing.verbs for form in verb]
    return sorted(set(re.findall("[a-z]+", " ".join(texts).lower())))


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------

# Independent random streams of one scene.
_COMPOSITION, _PICTURE, _MOTION, _SOUND, _SEEN_TEXT, _HEARD_TEXT = range(6)


@dataclass(frozen=True)
class Scene:
    """What is seen and heard in one example.

    Attributes:
        seen: The things in the picture, those that sound first.
        heard: The things that sound, in the picture or not.
        places: Centre x, centre y and half size of each seen thing, as fractions of the picture's side.
        variant: One of `VARIANTS`.
        key: Non-negative integers that, with a stream number, seed everything else.
    """

    seen: tuple[Thing, ...]
    heard: tuple[Thing, ...]
    places: tuple[tuple[float, float, float], ...]
    variant: str
    key: tuple[int, ...]

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((*self.key, *stream))

    def captions(self, style: Literal["seen", "heard"], count: int = 5) -> list[str]:
        """`count` different captions of what is seen or heard; the simplest scenes have six or seven.

        Raises:
            ValueError: If there are not so many.
        """
        if style == "seen":
            return _distinct_captions(seen_caption, self.seen, self._rng(_SEEN_TEXT), count)
        return _distinct_captions(heard_caption, self.heard, self._rng(_HEARD_TEXT), count)

    def boxes(self, image_size: int) -> list[list[float]]:
        """Box [left, top, right, bottom] in pixels of each seen thing in `picture(image_size)`."""
        return [[image_size * edge for edge in (x - half, y - half, x + half, y + half)] for x, y, half in self.places]

    def picture(self, image_size: int, frame: int | None = None) -> Image.Image:
        """Draws the scene.

        Args:
            image_size: Side in pixels.
            frame: Which frame of the video, in which the things have moved a little; None for the still picture.
        """
        (sky, ground, horizon), looks = self._looks()
        side = 2 * image_size  # drawn at twice the size and averaged: smooth edges
        canvas = Image.new("RGB", (side, side), sky)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((0, int(horizon * side), side, side), fill=ground)
        motion = self._rng(_MOTION, frame) if frame is not None else None
        for thing, (x, y, half), (colour, flip) in zip(self.seen, self.places, looks, strict=True):
            if motion is not None:
                x, y = x + motion.uniform(-0.03, 0.03), y + motion.uniform(-0.03, 0.03)
                half *= motion.uniform(0.93, 1.05)
            thing.draw(Pen(draw, (x * side, y * side), half * side, flip), colour)
        return canvas.reduce(2)

    def masks(self, image_size: int) -> list[Image.Image]:
        """For each seen thing, a grey picture of how much of every pixel of `picture(image_size)` it covers."""
        side = 2 * image_size
        masks = []
        for thing, (x, y, half), (colour, flip) in zip(self.seen, self.places, self._looks()[1], strict=True):
            grounds = [Image.new("RGB", (side, side), ground) for ground in ("white", "black")]
            for ground in grounds:
                thing.draw(Pen(ImageDraw.Draw(ground), (x * side, y * side), half * side, flip), colour)
            same = ImageChops.invert(ImageChops.difference(*grounds))  # what it covers looks the same on both
            masks.append(same.getchannel(0).reduce(2))
        return masks

    def _looks(self) -> tuple[tuple[Colour, Colour, float], list[tuple[Colour, bool]]]:
        """Sky, ground and where they meet; colour of each thing and whether it is mirrored."""
        rng = self._rng(_PICTURE)
        ground, sky = (_colour(rng, rng.uniform(), 0.12, 0.8, spread=(1, 0.12, 0.2)) for _ in range(2))
        horizon = rng.uniform(0.5, 0.9)
        return (sky, ground, horizon), [(_colour(rng, *thing.colour), bool(rng.integers(2))) for thing in self.seen]

    def sound(self, duration: float) -> np.ndarray:
        """Synthesises the scene.

        Args:
            duration: Seconds.

        Returns:
            Mono waveform float32 [duration * SAMPLE_RATE] within [-1, 1].
        """
        rng = self._rng(_SOUND)
        length = round(duration * SAMPLE_RATE)
        mixture = np.zeros(length, dtype=np.float32)
        for thing in self.heard:
            onset = int(rng.uniform(0, 0.2) * length)
            wave = thing.sound(rng, _voice(rng, self.variant), length - onset)
            # Between the average level and the level where there is sound: a clock ticks louder than the rain falls,
            # but not so loud that it is as loud on average.
            power = wave * wave
            level = (power * power).mean() ** 0.25
            fade = np.minimum(np.arange(len(wave)) / (0.01 * SAMPLE_RATE), 1)
            mixture[onset:] += _decibels(rng.uniform(-5, 0)) / level * wave * fade
        noise = _noise(rng, length, 2 ** rng.uniform(7, 12.5), 2.5)
        signal_to_noise = rng.uniform(0, 8) if self.variant == "loud_noise" else rng.uniform(14, 40)
        mixture += _decibels(-signal_to_noise) / noise.std() * noise
        return mixture * np.float32(rng.uniform(0.2, 0.95) / np.abs(mixture).max())


def _decibels(level: float) -> np.float32:
    return np.float32(10 ** (level / 20))


def _colour(
    rng: np.random.Generator,
    hue: float,
    saturation: float,
    value: float,
    spread: tuple[float, float, float] = (0.035, 0.12, 0.1),
) -> Colour:
    varied = np.array((hue, saturation, value)) + np.array(spread) * rng.uniform(-1, 1, 3)
    red, green, blue = colorsys.hsv_to_rgb(varied[0] % 1, *np.clip(varied[1:], 0, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _voice(rng: np.random.Generator, variant: str) -> Voice:
    timbre = rng.uniform(-1, 1)
    if variant == "unseen_timbres":
        timbre = np.copysign(rng.uniform(1.5, 2.2), timbre)
    return Voice(pitch=2 ** rng.uniform(-0.25, 0.25), rate=2 ** rng.uniform(-0.3, 0.3), timbre=timbre)


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centre x, centre y and half size: one thing large and anywhere, two in two halves, more in the quarters."""
    if count == 1:
        half = rng.uniform(0.32, 0.46)
        return [(rng.uniform(half, 1 - half), rng.uniform(half, 1 - half), half)]
    if count == 2:
        places = []
        upright = rng.random() < 0.3
        for centre in rng.permutation((0.25, 0.75)):
            half = rng.uniform(0.2, 0.25)
            along, across = centre + rng.uniform(-0.03, 0.03), rng.uniform(half, 1 - half)
            places.append((across, along, half) if upright else (along, across, half))
        return places
    quarters = rng.permutation(((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)))[:count]
    return [
        (x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03), rng.uniform(0.19, 0.24))
        for x, y in quarters.tolist()
    ]


def _choose(rng: np.random.Generator, pool: Sequence[Thing], count: int) -> list[Thing]:
    return [pool[index] for index in rng.choice(len(pool), count, replace=False)]


def _sounding_things(rng: np.random.Generator, variant: str, count: int) -> list[Thing]:
    if variant == "unseen_combinations":
        pairs = sorted(sorted(pair) for pair in HELD_OUT_PAIRS)
        return [THINGS[name] for name in pairs[rng.integers(len(pairs))]]
    while True:
        things = _choose(rng, SOUNDING, count)
        if not any(pair <= {thing.name for thing in things} for pair in HELD_OUT_PAIRS):
            return things


def scene(split: str, index: int, seed: int = 0, variant: str = "standard") -> Scene:
    """The scene number `index` of a split.

    Args:
        split: One of `SPLITS`.
        index: Which scene, from 0.
        seed: Of the whole world: other seeds give other scenes throughout.
        variant: One of `VARIANTS`.

    Raises:
        ValueError: If there is no such split or variant, or the variant is for the test split alone.
    """
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} in the sounding world; it has {', '.join(SPLITS)}.")
    if variant not in VARIANTS:
        raise ValueError(f"No variant {variant!r} of the sounding world; it has {', '.join(VARIANTS)}.")
    if variant in TEST_VARIANTS and split != "test":
        raise ValueError(
            f"The variant {variant!r} measures generalisation and exists for the split 'test' only, not {split!r}."
        )
    key = (seed, SPLITS.index(split), VARIANTS.index(variant), index)
    rng = np.random.default_rng((*key, _COMPOSITION))
    quiet = variant == "standard" and rng.random() < 0.06
    if quiet:
        seen, heard = _choose(rng, SILENT, int(rng.integers(1, 3))), []
    else:
        count = 3 if variant == "three" else int(rng.integers(1, 3))
        heard = _sounding_things(rng, variant, count)
        seen = heard + _choose(rng, SILENT, int(rng.integers(0, 2)))
    # Where nothing is heard yet, a picture lets one expect the wind; elsewhere no picture tells of it.
    has_sound = "audio" in _features(split)
    if quiet or (has_sound and rng.random() < 0.08):
        heard = [*heard, WIND]
    return Scene(tuple(seen), tuple(heard), tuple(_places(rng, len(seen))), variant, key)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------

_STRING = datasets.Value("string")
_STRINGS = datasets.List(_STRING)
_AUDIO = {"path": _STRING, "bytes": datasets.Value("binary")}
_VIDEO_COLUMNS = {"audio": _AUDIO, "frames": datasets.List(datasets.Image())}
_COLUMNS: dict[str, dict] = {
    "captions": {"image": datasets.Image(), "question": _STRING, "captions": _STRINGS},
    "prefix": {"image": datasets.Image(), "captions": _STRINGS},
    "video": _VIDEO_COLUMNS,
    "distillation": _VIDEO_COLUMNS,
    "supervised": {"audio": _AUDIO, "captions": _STRINGS},
    "test": {
        "audio": _AUDIO,
        "image": datasets.Image(),
        "captions": _STRINGS,
        "seen_captions": _STRINGS,
        "labels": _STRINGS,
        "things": datasets.List(
            {
                "name": _STRING,
                "box": datasets.List(datasets.Value("float32"), length=4),
                "mask": datasets.Image(),
                "sounds": datasets.Value("bool"),
            }
        ),
    },
}


def _features(split: str) -> datasets.Features:
    return datasets.Features({"id": _STRING, **_COLUMNS[split]})


def _png(picture: Image.Image) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return {"path": None, "bytes": buffer.getvalue()}


def _wav(waveform: np.ndarray) -> dict:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return {"path": None, "bytes": buffer.getvalue()}


def _rows(
    indices: list[int], split: str, seed: int, variant: str, image_size: int, duration: float, frames: int
) -> Iterator[dict]:
    columns = _COLUMNS[split]
    for index in indices:
        current = scene(split, index, seed, variant)
        row: dict = {"id": f"{split}-{variant}-{seed}-{index:06d}"}
        if "image" in columns:
            row["image"] = _png(current.picture(image_size))
        if "audio" in columns:
            row["audio"] = _wav(current.sound(duration))
        if "frames" in columns:
            row["frames"] = [_png(current.picture(image_size, frame)) for frame in range(frames)]
        if "question" in columns:
            style: Literal["seen", "heard"] = "heard" if index % 2 else "seen"
            questions = HEARD_QUESTIONS if index % 2 else SEEN_QUESTIONS
            row["question"] = questions[index // 2 % len(questions)]
            row["captions"] = current.captions(style)
        elif "captions" in columns:
            row["captions"] = current.captions("heard")
        if split == "test":
            row["seen_captions"] = current.captions("seen")
            row["labels"] = [thing.name for thing in current.heard]
            shown = zip(current.seen, current.boxes(image_size), current.masks(image_size), strict=True)
            row["things"] = [
                {"name": thing.name, "box": box, "mask": _png(mask), "sounds": thing in current.heard}
                for thing, box, mask in shown
            ]
        yield row


def sounding_world(
    split: str,
    size: int | None = None,
    seed: int = 0,
    variant: str = "standard",
    *,
    image_size: int = 64,
    duration: float = 2.56,
    frames: int = 4,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Builds one split of the world; the columns of each are listed at the top of this module.

    Args:
        split: One of `SPLITS`.
        size: Number of examples, `DEFAULT_SIZES[split]` if None.
        seed: Of the whole world: other seeds give other scenes throughout.
        variant: One of `VARIANTS`.
        image_size: Side of the pictures in pixels.
        duration: Length of the sounds in seconds.
        frames: Pictures per video.
        cache_dir: Where the examples are kept for the next call with the same arguments, the cache folder of
            `datasets` if None.
        num_proc: Processes that draw and synthesise, one if None.

    Returns:
        The examples, mapped from disk.

    Raises:
        ValueError: If an argument is out of range, there is no such split or variant, or the variant is for the test
            split alone.
    """
    size = DEFAULT_SIZES.get(split, 1) if size is None else size
    for name, value, least in (("size", size, 1), ("image_size", image_size, 16), ("frames", frames, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}.")
    if duration < MIN_DURATION:
        raise ValueError(
            f"duration must be at least {MIN_DURATION} seconds, not {duration}: shorter scenes can be silent."
        )
    scene(split, 0, seed, variant)  # says what is wrong before anything is written
    arguments = {
        "split": split,
        "seed": seed,
        "variant": variant,
        "image_size": image_size,
        "duration": duration,
        "frames": frames,
    }
    recipe = json.dumps([arguments, size], sort_keys=True).encode() + Path(__file__).read_bytes()
    return datasets.Dataset.from_generator(
        _rows,
        features=_features(split),
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"indices": list(range(size)), **arguments},
        num_proc=num_proc,
        fingerprint=hashlib.sha256(recipe).hexdigest()[:16],  # a change of this file makes the world anew
    )
