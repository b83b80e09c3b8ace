"""Scenes: which things are seen and heard together, and where; everything follows from the seed."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from datasets_scripts.sounding_world.captions import distinct_captions, heard_caption, seen_caption
from datasets_scripts.sounding_world.pictures import Colour, Pen
from datasets_scripts.sounding_world.sounds import SAMPLING_RATE, Voice, noise
from datasets_scripts.sounding_world.things import HELD_OUT_PAIRS, SILENT, SOUNDING, THINGS, WIND, Thing

SPLITS = ("captions", "prefix", "video", "distillation", "supervised", "test")
VARIANTS = ("standard", "three", "unseen_combinations", "unseen_timbres", "loud_noise")
TEST_VARIANTS = VARIANTS[2:]
SPLITS_WITHOUT_SOUND = ("captions", "prefix")

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
            return distinct_captions(seen_caption, self.seen, self._rng(_SEEN_TEXT), count)
        return distinct_captions(heard_caption, self.heard, self._rng(_HEARD_TEXT), count)

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
            Mono waveform float32 [duration * SAMPLING_RATE] within [-1, 1].
        """
        rng = self._rng(_SOUND)
        length = round(duration * SAMPLING_RATE)
        mixture = np.zeros(length, dtype=np.float32)
        for thing in self.heard:
            onset = int(rng.uniform(0, 0.2) * length)
            wave = thing.sound(rng, _voice(rng, self.variant), length - onset)
            # Between the average level and the level where there is sound: a clock ticks louder than the rain falls,
            # but not so loud that it is as loud on average.
            power = wave * wave
            level = (power * power).mean() ** 0.25
            fade = np.minimum(np.arange(len(wave)) / (0.01 * SAMPLING_RATE), 1)
            mixture[onset:] += _decibels(rng.uniform(-5, 0)) / level * wave * fade
        hiss = noise(rng, length, 2 ** rng.uniform(7, 12.5), 2.5)
        signal_to_noise = rng.uniform(0, 8) if self.variant == "loud_noise" else rng.uniform(14, 40)
        mixture += _decibels(-signal_to_noise) / hiss.std() * hiss
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
        seed: Seed of the whole world: other seeds give other scenes throughout.
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
    if quiet or (split not in SPLITS_WITHOUT_SOUND and rng.random() < 0.08):
        heard = [*heard, WIND]
    return Scene(tuple(seen), tuple(heard), tuple(_places(rng, len(seen))), variant, key)
