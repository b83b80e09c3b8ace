"""The processor of any captioner: its own outputs untouched, with sound and the prefix in their places."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

from modeling_dali import DaliCaptionerProcessor, DaliForImageTextToText
from tests.tiny import tiny_audio_config, tiny_feature_extractor, tiny_tokenizer
from tests.tiny_captioners import CHAT_TEMPLATE, tiny_captioner, tiny_gemma3_processor

QUESTION = "Describe the sound that can be heard in this scene."


def tiny_llava_processor():
    image_processor = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    sizes = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    return LlavaProcessor(image_processor, tiny_tokenizer(), **sizes, chat_template=template)


OWN = {"llava": tiny_llava_processor, "gemma3": tiny_gemma3_processor}
PLACEHOLDERS = {"llava": "<image>", "gemma3": "<boi>"}


@pytest.fixture(scope="module", params=OWN)
def hearing(request):
    own = OWN[request.param]()
    model = DaliForImageTextToText.from_captioner(
        tiny_captioner(request.param).model, audio_config=tiny_audio_config(), tokenizer=own.tokenizer
    )
    model.add_prefix(3)
    return model, DaliCaptionerProcessor.for_model(model.config, own, tiny_feature_extractor()), request.param


def sound(seed=0, samples=8_000):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def mixed(processor, **kwargs):
    """Picture and sound, a long sound, a picture, text."""
    modalities = ("audio_image", "audio", "image")
    return processor(
        text=[*(processor.caption_prompt(modality) for modality in modalities), "a dog"],
        images=[picture(0), picture(1)],
        audio=[sound(0), sound(1, 25_000)],
        sampling_rate=16_000,
        return_tensors="pt",
        **kwargs,
    )


def test_the_prompt_is_the_captioners_template(hearing):
    _, processor, name = hearing
    expected = f"USER: {PLACEHOLDERS[name]}<audio><prefix>\n{QUESTION} ASSISTANT:"
    assert processor.caption_prompt("audio_image").split() == expected.split()


def test_a_mixed_batch_equals_its_rows(hearing):
    model, processor, _ = hearing
    inputs = mixed(processor)
    audio, prefix = (
        inputs["input_ids"] == getattr(model.config, f"{kind}_token_index") for kind in ("audio", "prefix")
    )
    assert audio.sum(1).tolist() == [32, 96, 0, 0] and prefix.sum(1).tolist() == [3, 3, 3, 0]
    assert inputs["input_features"].shape == (4, 64, 32) and inputs["pixel_values"].shape[0] == 2
    assert (inputs["attention_mask"][3, -2:] == 1).all() and inputs["attention_mask"][3, 0] == 0  # padded on the left
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        alone = processor(
            text=processor.caption_prompt("audio_image"),
            images=[picture(0)],
            audio=[sound(0)],
            sampling_rate=16_000,
            return_tensors="pt",
        )
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(logits[0, -length:], model(**alone).logits[0], atol=1e-5, rtol=1e-5)
    texts = processor.decode_captions(model.generate(**inputs, max_new_tokens=4), inputs)
    assert len(texts) == 4 and all(isinstance(text, str) for text in texts)


def test_without_sound_it_is_the_captioners_own(hearing):
    _, processor, name = hearing
    text = [f"USER: {PLACEHOLDERS[name]} What is heard ? ASSISTANT:", f"{PLACEHOLDERS[name]} a dog"]
    ours = processor(text=text, images=[picture(0), picture(1)], return_tensors="pt")
    theirs = processor.captioner_processor(
        text=text, images=[[picture(0)], [picture(1)]], return_tensors="pt", padding=True
    )
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_labels_are_the_answer(hearing):
    _, processor, _ = hearing
    inputs = mixed(processor, suffix=["a dog barks", "rain", "the cat", "a bell"])
    for row, answer in zip(inputs["labels"], ["a dog barks", "rain", "the cat", "a bell"], strict=True):
        told = row[row != -100]
        assert processor.tokenizer.decode(told[:-1]) == answer and told[-1] == processor.tokenizer.eos_token_id


def test_trimmed_padding_leaves_tokens_out(hearing):
    model, processor, _ = hearing
    inputs = processor(
        text=processor.caption_prompt("audio"),
        audio=sound(0, 3_000),
        sampling_rate=16_000,
        trim_padding=True,
        return_tensors="pt",
    )
    tokens = int((inputs["input_ids"] == model.config.audio_token_index).sum())
    assert tokens < 32 and tokens == int(model.ear.audio_token_mask(inputs["input_features_mask"]).sum())
    model(**inputs)


def test_save_load(hearing, tmp_path):
    _, processor, _ = hearing
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, DaliCaptionerProcessor)
    assert type(loaded.captioner_processor) is type(processor.captioner_processor)
    ours, theirs = mixed(processor), mixed(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_errors_say_what_is_wrong(hearing):
    _, processor, name = hearing
    with pytest.raises(ValueError, match=f"have 0 {PLACEHOLDERS[name]} placeholders for 1 pictures"):
        processor(text="a dog", images=[picture()], return_tensors="pt")
    with pytest.raises(ValueError, match="audio"):
        processor(text="<audio> a dog", return_tensors="pt")
    with pytest.raises(TypeError, match="audios"):
        processor(text="<audio>", audios=[sound()], return_tensors="pt")
    plain = OWN[name]()
    with pytest.raises(ValueError, match=r"does not know <audio>: call `model.add_media_tokens"):
        DaliCaptionerProcessor(plain, tiny_feature_extractor())
