import hashlib
import io
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from datasets_scripts import sounding_world as world
from datasets_scripts.sounding_world import scene, sounding_world
from datasets_scripts.sounding_world.dataset import _rows

SMALL = {"image_size": 32, "duration": 1.28, "frames": 2}
METHOD_SPLITS = ("captions", "prefix", "video", "distillation")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    cache = tmp_path_factory.mktemp("world")
    datasets.disable_progress_bars()
    return lambda split, size=8, **options: sounding_world(split, size, cache_dir=cache, **{**SMALL, **options})


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
    contents = {split: set().union(*map(hashes, _rows(list(range(60)), split, **arguments))) for split in world.SPLITS}
    for one, other in combinations(world.SPLITS, 2):
        assert contents[one] and not contents[one] & contents[other], (one, other)


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
