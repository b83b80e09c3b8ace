from itertools import combinations

import numpy as np
import pytest

from datasets_scripts import sounding_world as world
from datasets_scripts.sounding_world import Scene, scene
from datasets_scripts.sounding_world.scenes import _voice
from datasets_scripts.sounding_world.things import HELD_OUT_PAIRS
from tests.datasets_scripts.sounding_world.one_thing import alone


@pytest.mark.parametrize(
    ("split", "variant"),
    [*((split, v) for split in world.SPLITS for v in ("standard", "three")), ("test", "loud_noise")],
)
def test_unseen_combinations_are_unseen_elsewhere(split, variant):
    for index in range(400):
        current = scene(split, index, variant=variant)
        names = {thing.name for thing in (*current.seen, *current.heard)}
        assert not any(pair <= names for pair in HELD_OUT_PAIRS)


def test_unseen_combinations_cover_every_thing():
    met = set()
    for index in range(200):
        heard = {thing.name for thing in scene("test", index, variant="unseen_combinations").heard} - {"wind"}
        assert frozenset(heard) in HELD_OUT_PAIRS
        met |= heard
    assert met == {thing.name for thing in world.SOUNDING}


def test_scenes_have_what_the_variants_promise():
    standard = [scene("test", index) for index in range(600)]
    counts = [sum(thing is not world.WIND for thing in current.heard) for current in standard]
    assert set(counts) == {0, 1, 2} and 0.02 < counts.count(0) / 600 < 0.12
    assert all(world.WIND in current.heard for current, count in zip(standard, counts, strict=True) if count == 0)
    windy = np.mean([world.WIND in current.heard for current, n in zip(standard, counts, strict=True) if n])
    assert 0.03 < windy < 0.15
    assert {thing.name for current in standard for thing in current.seen} == set(world.THINGS) - {"wind"}
    for index in range(50):
        assert len(set(scene("video", index, variant="three").heard) - {world.WIND}) == 3


def test_pictures_alone_do_not_tell_of_the_wind_unless_nothing_else_is_heard():
    for split in ("captions", "prefix"):
        for index in range(300):
            heard = scene(split, index).heard
            assert world.WIND not in heard or heard == (world.WIND,)


def changed_by_things(current, size):
    """Where the picture of a scene differs from that of the same ground with nothing on it."""
    empty = Scene((), (), (), current.variant, current.key)
    return np.any(np.asarray(current.picture(size)) != np.asarray(empty.picture(size)), axis=-1)


def test_things_are_drawn_in_their_boxes_and_nowhere_else():
    size = 64
    for index in range(60):
        current = scene("test", index, variant=world.VARIANTS[index % 2])
        changed = changed_by_things(current, size)
        inside = np.zeros_like(changed)
        for left, top, right, bottom in current.boxes(size):
            assert -2 <= left < right <= size + 2 and -2 <= top < bottom <= size + 2
            region = np.s_[max(0, int(top) - 1) : int(bottom) + 2, max(0, int(left) - 1) : int(right) + 2]
            assert changed[region].mean() > 0.25
            inside[region] = True
        assert not changed[~inside].any()


def test_masks_are_where_things_change_the_picture():
    size = 64
    for index in range(40):
        current = scene("test", index, variant=world.VARIANTS[index % 2])
        changed = changed_by_things(current, size)
        masks = [np.asarray(mask) for mask in current.masks(size)]
        covered = np.max(masks, axis=0) if masks else np.zeros((size, size))
        assert len(masks) == len(current.seen) and not changed[covered == 0].any()
        # A thing may have the very colour of the ground in a few pixels.
        assert changed[covered > 0].mean() > 0.95
        for mask, (left, top, right, bottom) in zip(masks, current.boxes(size), strict=True):
            rows, columns = np.nonzero(mask)
            assert rows.min() >= top - 2 and rows.max() <= bottom + 2
            assert columns.min() >= left - 2 and columns.max() <= right + 2 and mask.max() == 255


def test_frames_of_a_video_differ_a_little():
    for index in range(20):
        frames = [np.asarray(scene("video", index).picture(64, frame), dtype=float) for frame in range(3)]
        assert all(0 < np.abs(one - other).mean() < 40 for one, other in combinations(frames, 2))


def test_sounds_are_finite_loud_enough_and_within_range():
    for variant in world.VARIANTS:
        for index in range(20):
            wave = scene("test", index, variant=variant).sound(1.28)
            assert wave.dtype == np.float32 and wave.shape == (20480,)
            assert np.isfinite(wave).all() and 0.19 < np.abs(wave).max() <= 0.951


def test_variants_change_the_sound_as_they_say():
    def floor(variant):  # the level of the quietest moments below the loudest
        waves = [alone(world.THINGS["clock"], n, variant).sound(2.56) for n in range(20)]
        levels = [np.square(wave.reshape(-1, 160)).mean(axis=1) for wave in waves]
        return np.median([10 * np.log10(np.quantile(level, 0.1) / level.max()) for level in levels])

    assert floor("loud_noise") > floor("standard") + 5
    timbres = {v: [_voice(np.random.default_rng(n), v).timbre for n in range(200)] for v in world.VARIANTS}
    assert max(np.abs(timbres["standard"])) <= 1 < 1.4 < min(np.abs(timbres["unseen_timbres"]))
