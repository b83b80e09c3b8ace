import pytest

from datasets_scripts import sounding_world as world
from datasets_scripts.sounding_world import scene
from tests.datasets_scripts.sounding_world.one_thing import alone


def words(captions):
    return [set(caption.split()) for caption in captions]


def named(caption, things):
    return {thing.name for thing in things if thing.synonyms & set(caption.split())}


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
