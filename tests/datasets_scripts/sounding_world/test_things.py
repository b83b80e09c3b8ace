import colorsys
from itertools import combinations, pairwise

import numpy as np

from datasets_scripts import sounding_world as world
from datasets_scripts.sounding_world.things import HELD_OUT_PAIRS
from tests.datasets_scripts.sounding_world.one_thing import alone


def test_things_that_never_meet_differ_in_colour():
    for pair in HELD_OUT_PAIRS:
        first, second = (np.array(colorsys.hsv_to_rgb(*world.THINGS[name].colour)) for name in pair)
        assert np.linalg.norm(first - second) > 0.25, pair


def test_no_word_names_two_things():
    for one, other in combinations(world.THINGS.values(), 2):
        assert not one.synonyms & other.synonyms


def nearest_class_accuracy(features):
    """Each class's second half is named by the class mean of the first halves [classes, examples, dim]."""
    half = features.shape[1] // 2
    spread = features[:, :half].std(axis=(0, 1)) + 1e-6
    means, probes = features[:, :half].mean(axis=1) / spread, features[:, half:] / spread
    guesses = np.square(probes[:, :, None] - means).sum(axis=-1).argmin(axis=-1)
    return (guesses == np.arange(len(features))[:, None]).mean()


def sound_features(wave):
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::160] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = [0, 4, 6, 9, 12, 16, 20, 25, 30, 36, 43, 51, 60, 70, 82, 96, 112, 130, 150, 175, 205, 240]
    bands = np.log(np.stack([power[:, low:high].mean(axis=1) for low, high in pairwise(edges)]) + 1e-6)
    bands -= bands.mean()
    return np.concatenate([bands.mean(axis=1), bands.std(axis=1), np.abs(np.diff(bands, axis=1)).mean(axis=1)])


def test_simple_features_tell_the_sounds_apart():
    features = np.array([[sound_features(alone(thing, n).sound(2.56)) for n in range(24)] for thing in world.SOUNDING])
    assert nearest_class_accuracy(features) > 0.85


def test_simple_features_tell_the_pictures_apart():
    def pixels(thing, number):
        return np.asarray(alone(thing, number).picture(32), dtype=float).ravel() / 255

    features = np.array([[pixels(thing, n) for n in range(12)] for thing in world.SOUNDING])
    assert nearest_class_accuracy(features) > 0.85
