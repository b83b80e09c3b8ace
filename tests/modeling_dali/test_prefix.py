"""The soft prefix: PEFT's adapter on disk, two places in the prompt, and nothing left behind when it is taken off."""

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from modeling_dali.chat_templates import SYSTEM
from tests.tiny import tiny_dali


def sound(seed=0, samples=8_000):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def with_prefix(position, length=5, tower="clip"):
    model, processor = tiny_dali(tower)
    torch.manual_seed(2)
    model.add_prefix(length, position)
    with torch.no_grad():
        model.model.prefix.mul_(100)  # large enough to show
    processor.follow(model.config)
    return model, processor


def ask(processor, sounds, questions=None, **kwargs):
    questions = questions or ["What can be heard ?"] * len(sounds)
    return processor(
        text=[processor.caption_prompt("audio", question=question, **kwargs) for question in questions],
        audio=sounds,
        sampling_rate=16_000,
        return_tensors="pt",
    )


def test_prompts():
    _, processor = with_prefix("after_media")
    question = "Describe the sound that can be heard in this scene."
    user = f"{SYSTEM} USER:"
    assert processor.caption_prompt("audio_image") == f"{user} <image><audio><prefix>\n{question} ASSISTANT:"
    assert processor.caption_prompt("audio", prefix=False) == f"{user} <audio>\n{question} ASSISTANT:"
    processor.prefix_position = "front"
    assert processor.caption_prompt("image") == f"<prefix>{user} <image>\n{question} ASSISTANT:"
    processor.prefix_length = 0
    assert processor.caption_prompt("audio") == f"{user} <audio>\n{question} ASSISTANT:"


@pytest.mark.parametrize("position", ["after_media", "front"])
def test_where_the_prefix_stands(position):
    model, processor = with_prefix(position)
    ids = ask(processor, [sound()])["input_ids"][0].tolist()
    prefix, audio = model.config.prefix_token_index, model.config.audio_token_index
    start = ids.index(prefix)
    assert ids[start : start + 5] == [prefix] * 5 and ids.count(prefix) == 5
    if position == "front":
        assert start == 0 and ids[5] == processor.tokenizer.bos_token_id
    else:
        assert ids[start - 1] == audio


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("position", ["after_media", "front"])
def test_a_left_padded_batch_equals_its_rows(position, tower):
    model, processor = with_prefix(position, tower=tower)
    sounds = [sound(0), sound(1), sound(2, 20_000)]
    questions = ["What ?", "What can be heard in this scene ?", "Describe the sound"]
    batch = ask(processor, sounds, questions)
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        logits = model(**batch).logits
        texts = processor.decode_captions(model.generate(**batch, max_new_tokens=8, do_sample=False), batch)
        for i in range(3):
            alone = ask(processor, sounds[i : i + 1], questions[i : i + 1])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[i, -length:], model(**alone).logits[0], atol=1e-5, rtol=1e-5)
            text = processor.decode_captions(model.generate(**alone, max_new_tokens=8, do_sample=False), alone)
            assert text == texts[i : i + 1]


@pytest.mark.parametrize("position", ["after_media", "front"])
def test_taking_the_prefix_off_leaves_nothing(position):
    model, processor = tiny_dali()
    inputs = ask(processor, [sound(0), sound(1)])
    with torch.no_grad():
        before = model(**inputs).logits
        model.add_prefix(5, position)
        assert torch.equal(model(**inputs).logits, before)  # a prompt without `<prefix>` does not see it
        processor.follow(model.config)
        assert not torch.equal(model(**ask(processor, [sound(0), sound(1)])).logits[:, -1], before[:, -1])
        model.remove_prefix()
        assert torch.equal(model(**inputs).logits, before)
    assert model.config.prefix_length == 0
    assert not any("prefix" in name for name, _ in model.named_parameters())


def test_front_equals_pefts_prompt_tuning(tmp_path):
    model, processor = with_prefix("front")
    model.save_prefix(tmp_path)
    inputs = ask(processor, [sound()])
    plain = ask(processor, [sound()], prefix=False)
    with torch.no_grad():
        expected = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        bare, _ = tiny_dali()
        peft_model = PeftModel.from_pretrained(bare, str(tmp_path)).eval()
        assert peft_model.active_peft_config.num_virtual_tokens == 5
        torch.testing.assert_close(peft_model(**plain).logits, expected, atol=1e-5, rtol=1e-5)
        theirs = peft_model.generate(**plain, max_new_tokens=8, do_sample=False)
        assert theirs[:, plain["input_ids"].shape[1] :].tolist() == text.tolist()


def test_sound_reaches_the_model_inside_peft():
    """PEFT hands on embeddings and no ids: models that look for ids lose the sound there without a word."""
    model, processor = tiny_dali()
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        one, other = (peft_model(**ask(processor, [sound(seed)])).logits for seed in (0, 1))
    assert (one - other).abs().max() > 1e-2


def test_an_adapter_trained_with_peft_loads(tmp_path):
    model, processor = tiny_dali()
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    inputs = ask(processor, [sound()])
    with torch.no_grad():
        expected = peft_model(**inputs).logits
    peft_model.save_pretrained(tmp_path)
    ours, processor = tiny_dali()
    ours.load_prefix(tmp_path, "front")
    processor.follow(ours.config)
    with torch.no_grad():
        logits = ours(**ask(processor, [sound()])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_round_trips_bit_for_bit(tmp_path):
    model, _ = with_prefix("after_media")
    model.save_prefix(tmp_path)
    other, _ = tiny_dali()
    other.load_prefix(tmp_path)
    assert torch.equal(other.model.prefix, model.model.prefix)
    assert (other.config.prefix_length, other.config.prefix_position) == (5, "after_media")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_new_prefix_is_small_noise():
    model, _ = tiny_dali()
    torch.manual_seed(0)
    model.add_prefix(400)
    assert model.model.prefix.std().item() == pytest.approx(1e-4, rel=0.05)
    assert model.model.prefix.requires_grad


def test_errors_say_what_is_wrong(tmp_path):
    model, processor = tiny_dali()
    with pytest.raises(ValueError, match="holds no prefix"):
        model.save_prefix(tmp_path)
    with pytest.raises(ValueError, match="`prefix_length` is 0"):
        processor(text="<prefix> What ?", return_tensors="pt")
    with pytest.raises(ValueError, match="not at `behind`"):
        model.add_prefix(4, "behind")
    processor.prefix_length = 4
    with pytest.raises(ValueError, match="4 <prefix> placeholders, but there are 0"):
        model(**processor(text="<prefix> What ?", return_tensors="pt"))
    model.add_prefix(3)
    with pytest.raises(ValueError, match="4 <prefix> placeholders, but there are 3"):
        model(**processor(text="<prefix> What ?", return_tensors="pt"))
    wide, _ = with_prefix("front")
    wide.set_prefix(torch.zeros(2, 7))
    wide.config.text_config.hidden_size = 7
    wide.save_prefix(tmp_path)
    with pytest.raises(ValueError, match="7 wide, the language model 32"):
        model.load_prefix(tmp_path)
