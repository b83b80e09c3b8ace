import colorsys
import hashlib
import io
from itertools import combinations, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from datasets_scripts import sounding_world as world
from datasets_scripts.sounding_world import Scene, scene, sounding_world

SMALL = {"image_size": 32, "duration": 1.28, "frames": 2}
METHOD_SPLITS = ("captions", "prefix", "video", "distillation")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    cache = tmp_path_factory.mktemp("world")
    datasets.disable_progress_bars()
    return lambda split, size=8, **options: sounding_world(split, size, cache_dir=cache, **{**SMALL, **options})


def words(captions):
    return [set(caption.split()) for caption in captions]


def named(caption, things):
    return {thing.name for thing in things if thing.synonyms & set(caption.split())}


# What meets what


def test_no_sound_meets_text_before_the_test(build):
    texts = {"captions", "caption", "seen_captions", "question", "labels", "things"}
    for split in METHOD_SPLITS:
        columns = set(build(split).column_names)
        assert not ("audio" in columns and columns & texts), f"{split}: {sorted(columns)}"
    assert set(world.SPLITS) == {*METHOD_SPLITS, "supervised", "test"}


def test_columns_are_what_the_module_says(build):
    rows = [line.split("|")[1:3] for line in world.__doc__.splitlines() if line.startswith("| `")]
    documented = {split.strip(" `"): columns.strip().split(", ") for split, columns in rows}
    assert documented == {split: build(split).column_names for split in world.SPLITS}


def test_ids_do_not_tell_what_is_heard(build):
    for row in build("video"):
        assert not any(name in row["id"].removeprefix("video-standard") for name in world.LABELS)


def test_splits_share_no_picture_and_no_sound(build):
    def hashes(row):
        pieces = [row["audio"]["bytes"]] if "audio" in row else []
        pictures = [row["image"]] if "image" in row else row.get("frames", [])
        return {hashlib.sha256(piece).hexdigest() for piece in [*pieces, *(picture["bytes"] for picture in pictures)]}

    arguments = {"seed": 0, "variant": "standard", **SMALL}
    contents = {
        split: set().union(*map(hashes, world._rows(list(range(60)), split, **arguments))) for split in world.SPLITS
    }
    for one, other in combinations(world.SPLITS, 2):
        assert contents[one] and not contents[one] & contents[other], (one, other)


@pytest.mark.parametrize(
    ("split", "variant"),
    [*((split, v) for split in world.SPLITS for v in ("standard", "three")), ("test", "loud_noise")],
)
def test_unseen_combinations_are_unseen_elsewhere(split, variant):
    for index in range(400):
        current = scene(split, index, variant=variant)
        names = {thing.name for thing in (*current.seen, *current.heard)}
        assert not any(pair <= names for pair in world.HELD_OUT_PAIRS)


def test_unseen_combinations_cover_every_thing():
    met = set()
    for index in range(200):
        heard = {thing.name for thing in scene("test", index, variant="unseen_combinations").heard} - {"wind"}
        assert frozenset(heard) in world.HELD_OUT_PAIRS
        met |= heard
    assert met == {thing.name for thing in world.SOUNDING}


def test_things_that_never_meet_differ_in_colour():
    for pair in world.HELD_OUT_PAIRS:
        first, second = (np.array(colorsys.hsv_to_rgb(*world.THINGS[name].colour)) for name in pair)
        assert np.linalg.norm(first - second) > 0.25, pair


# Everything from the seed


def test_same_seed_same_world_other_seed_other_world(build, tmp_path):
    one = build("test", 6)
    again = sounding_world("test", 6, cache_dir=tmp_path, **SMALL)
    assert one.to_dict() == again.to_dict()
    longer, other = build("test", 9), build("test", 6, seed=1)
    assert longer.select(range(6)).to_dict() == one.to_dict()
    assert all(a["audio"]["bytes"] != b["audio"]["bytes"] for a, b in zip(one, other, strict=True))


def test_second_call_reads_what_the_first_wrote(build):
    (first,) = build("video", 5).cache_files
    written = Path(first["filename"]).stat().st_mtime_ns
    assert build("video", 5).cache_files == [first]
    assert Path(first["filename"]).stat().st_mtime_ns == written
    assert build("video", 5, frames=3).cache_files != [first]


def test_two_processes_write_the_same_world(build, tmp_path):
    one_process = sounding_world("prefix", 7, cache_dir=tmp_path, **SMALL)
    assert build("prefix", 7, num_proc=2).to_dict() == one_process.to_dict()


# Scenes


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


def alone(thing, number, variant="standard"):
    return Scene((thing,), (thing,), ((0.5, 0.5, 0.4),), variant, (7, world.SOUNDING.index(thing), number, 0))


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


def test_variants_change_the_sound_as_they_say():
    def floor(variant):  # the level of the quietest moments below the loudest
        waves = [alone(world.THINGS["clock"], n, variant).sound(2.56) for n in range(20)]
        levels = [np.square(wave.reshape(-1, 160)).mean(axis=1) for wave in waves]
        return np.median([10 * np.log10(np.quantile(level, 0.1) / level.max()) for level in levels])

    assert floor("loud_noise") > floor("standard") + 5
    timbres = {v: [world._voice(np.random.default_rng(n), v).timbre for n in range(200)] for v in world.VARIANTS}
    assert max(np.abs(timbres["standard"])) <= 1 < 1.4 < min(np.abs(timbres["unseen_timbres"]))


# Captions


def test_captions_name_what_is_seen_and_heard_and_nothing_else():
    for index in range(300):
        current = scene("test", index, variant=("standard", "three", "unseen_combinations")[index % 3])
        for caption in current.captions("heard"):
            assert named(caption, world.THINGS.values()) == {thing.name for thing in current.heard}, caption
        for caption in current.captions("seen"):
            assert named(caption, world.THINGS.values()) == {thing.name for thing in current.seen}, caption


def test_more_captions_than_there_are_is_an_error():
    current = alone(world.THINGS["clock"], 0)
    assert len(current.captions("heard", 7)) == 7
    with pytest.raises(ValueError, match="no 8 different captions of this scene, only 7"):
        current.captions("heard", 8)


def test_captions_of_a_scene_differ_and_use_known_words():
    vocabulary = set(world.vocabulary())
    assert len(vocabulary) < 150
    for index in range(300):
        current = scene("captions", index)
        for style in ("seen", "heard"):
            captions = current.captions(style)
            assert len(set(captions)) == 5 and set().union(*words(captions)) <= vocabulary
    wording = " ".join((*world.SEEN_QUESTIONS, *world.HEARD_QUESTIONS, *world.LABELS)).lower()
    assert set(wording.replace(".", "").replace("?", "").split()) <= vocabulary


def test_image_captions_come_in_both_styles_under_their_questions(build):
    rows = build("captions", 40)
    for index, row in enumerate(rows):
        current = scene("captions", index)
        style, questions = ("heard", world.HEARD_QUESTIONS) if index % 2 else ("seen", world.SEEN_QUESTIONS)
        assert row["question"] in questions and row["captions"] == current.captions(style)
    assert set(rows["question"]) == {*world.SEEN_QUESTIONS, *world.HEARD_QUESTIONS}


def test_rows_of_the_test_split_agree_with_their_scenes(build):
    for index, row in enumerate(build("test", 20)):
        current = scene("test", index)
        assert set(row["labels"]) == {thing["name"] for thing in row["things"] if thing["sounds"]} | (
            {"wind"} & set(row["labels"])
        )
        assert row["image"].size == (32, 32) and row["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(current.picture(32)))
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert rate == 16_000
        np.testing.assert_allclose(wave, current.sound(1.28), atol=1 / 32000)
        for thing, mask in zip(row["things"], current.masks(32), strict=True):
            np.testing.assert_array_equal(np.asarray(thing["mask"]), np.asarray(mask))
        assert len(row["captions"]) == len(row["seen_captions"]) == 5


def test_no_word_names_two_things():
    for one, other in combinations(world.THINGS.values(), 2):
        assert not one.synonyms & other.synonyms


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "No split 'train'.*captions, prefix"),
        (("test", 4, 0, "four"), "No variant 'four'.*three"),
        (("video", 4, 0, "unseen_timbres"), "for the split 'test' only"),
        (("video", 0), "size must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        sounding_world(*arguments)


@pytest.mark.parametrize("options", [{"duration": 0.2}, {"image_size": 4}, {"frames": 0}])
def test_sizes_out_of_range_are_told(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sounding_world("video", 2, **options)
