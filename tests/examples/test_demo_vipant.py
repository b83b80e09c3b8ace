import json

import pytest
import torch

from datasets_scripts.sounding_world import sounding_world
from examples.sounding_world.demo_vipant import VipAntDemoConfig, evaluate, main, new_processor, run
from modeling_vipant import VipAntModel, VipAntProcessor
from modeling_vipant.library import Embedder, classify

SIZES = {"captions": 128, "video": 64, "supervised": 64, "test": 12}  # a batch of each
STEPS = {"clip_steps": 2, "va_steps": 1, "at_steps": 1}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return output, run(VipAntDemoConfig(str(output), **SIZES, **STEPS))


def test_every_stage_is_written_and_scored(demo):
    output, results = demo
    assert json.loads((output / "results.json").read_text()) == results
    assert "text→sound R@1" in (output / "report.md").read_text()
    for name in ("untrained audio tower", "VA pre-training (no audio-text pair)", "AT fine-tuning (upper bound)"):
        assert 0 <= results[name]["accuracy"] <= 1 and results[name]["chance"] == 1 / 16


def test_its_models_serve_the_command_line(demo, tmp_path):
    sound = sounding_world("test", 1, cache_dir=tmp_path)[0]["audio"]
    (tmp_path / "sound.wav").write_bytes(sound["bytes"])
    (result,) = classify(Embedder.load(str(demo[0] / "va")), [tmp_path / "sound.wav"], ["bell", "dog"])
    assert {label for label, _ in result} == {"bell", "dog"}


def test_a_second_run_takes_up_what_is_there(demo, capsys):
    output, results = demo
    assert run(VipAntDemoConfig(str(output), **SIZES, **STEPS)) == results
    assert capsys.readouterr().out.count("already done in") == 5
    with pytest.raises(ValueError, match="va_steps was 1, is 2"):
        run(VipAntDemoConfig(str(output), **SIZES, **STEPS | {"va_steps": 2}))


def test_evaluation_sees_no_training(demo):
    """The accuracy is that of the nearest class by cosine, worked out clip by clip."""
    output, results = demo
    model, processor = VipAntModel.from_pretrained(output / "va"), VipAntProcessor.from_pretrained(output / "va")
    test = sounding_world("test", SIZES["test"], image_size=64, cache_dir=output / "data")
    assert evaluate(model, processor, test)["accuracy"] == results["VA pre-training (no audio-text pair)"]["accuracy"]


def test_no_sound_meets_a_text_before_the_test():
    for split in ("captions", "video"):
        columns = set(sounding_world(split, 1).column_names)
        assert not {"audio", "captions"} <= columns


def test_the_tokenizer_spells_unknown_words():
    processor = new_processor(["a dog barks"])
    tokens = processor.tokenizer.tokenize("zebra 7")
    assert processor.tokenizer.unk_token not in tokens
    ids = processor(text=["zebra", "a dog barks"], return_tensors="pt")["input_ids"]
    assert (ids[:, 0] == processor.tokenizer.bos_token_id).all() and torch.is_tensor(ids)


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m examples.sounding_world.demo_vipant" in capsys.readouterr().out
