"""The processor: placeholders, windows, trimming, labels, templates."""

import logging

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from modeling_dali import DaliProcessor
from modeling_dali.chat_templates import SYSTEM
from tests.tiny import tiny_dali

RATE = 16_000
WINDOW = 64 * 160  # samples in one clip of the tiny front end


@pytest.fixture(scope="module")
def dali():
    return tiny_dali(prefix=3)


def sound(samples=8_000, seed=0):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_placeholders_in_any_mix(dali):
    model, processor = dali
    inputs = processor(
        text=["<audio> and <image> and <audio>", "<image>", "a dog"],
        audio=[sound(), sound(seed=1)],
        images=[picture(), picture(1)],
        sampling_rate=RATE,
        return_tensors="pt",
    )
    audio = (inputs["input_ids"] == model.config.audio_token_index).sum(1)
    image = (inputs["input_ids"] == model.config.image_token_index).sum(1)
    assert audio.tolist() == [64, 0, 0] and image.tolist() == [16, 16, 0]
    assert inputs["input_features"].shape == (2, 64, 32) and inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert "input_features_mask" not in inputs
    assert inputs["attention_mask"].sum(1).tolist() == [1 + 64 + 16 + 2, 17, 3]
    assert (inputs["input_ids"][1, :-17] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "<audio>"}, "Found 1 <audio> tokens"),
        ({"text": "<image>"}, "Found 1 <image> tokens"),
        ({"text": "a dog", "audio": [sound()]}, "0 <audio> tokens and 1 audio"),
        ({"text": "<audio><audio>", "audio": [sound()]}, "2 <audio> tokens and 1 audio"),
        ({"audio": [sound()]}, "`text` is needed"),
        ({"text": "<audio>", "audio": np.zeros((2, 3, 800), np.float32)}, "shape"),
        ({"text": "<audio>", "audio": [sound(300)]}, "less than one frame"),
        ({"text": "<audio>", "audio": [np.full(800, np.nan, np.float32)]}, "NaN"),
        ({"text": ["a", "b"], "suffix": ["c"]}, "2 prompts but 1 suffixes"),
    ],
)
def test_errors_name_what_is_wrong(dali, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dali[1](**kwargs, sampling_rate=RATE, return_tensors="pt")


@pytest.mark.parametrize("name", ["audios", "sample_rate", "trim", "image"])
def test_unknown_keywords_raise(dali, name):
    with pytest.raises(TypeError, match=name):
        dali[1](text="a dog", **{name: 1})


@pytest.mark.parametrize(
    ("samples", "windows"),
    [(400, 1), (WINDOW, 1), (WINDOW + 399, 1), (WINDOW + 400, 2), (2 * WINDOW, 2), (5 * WINDOW + 4_000, 6)],
)
def test_long_sounds_are_split_into_windows(dali, samples, windows):
    model, processor = dali
    waveform = sound(samples)
    inputs = processor(text="<audio>", audio=[waveform], sampling_rate=RATE, return_tensors="pt")
    assert inputs["input_features"].shape == (windows, 64, 32)
    assert (inputs["input_ids"] == model.config.audio_token_index).sum() == 32 * windows
    pieces, counts = processor.split_windows([waveform], RATE)
    assert counts == [windows] and torch.equal(torch.cat(pieces), torch.from_numpy(waveform))
    expected = processor.feature_extractor(pieces, sampling_rate=RATE).input_features
    assert torch.equal(inputs["input_features"], expected)


def test_too_long_is_an_error_or_cut_with_a_warning(dali, caplog):
    processor = dali[1]
    kwargs = {"text": "<audio>", "audio": [sound(4 * WINDOW)], "sampling_rate": RATE, "return_tensors": "pt"}
    with pytest.raises(ValueError, match=r"2.6 s long, over the 1.3 s of 2 windows: raise `max_windows`"):
        processor(**kwargs, max_windows=2)
    logger = logging.getLogger("modeling_dali.processing_audio")
    logger.addHandler(caplog.handler)
    try:
        inputs = processor(**kwargs, max_windows=2, truncation=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "what is over is cut" in caplog.text
    assert inputs["input_features"].shape[0] == 2


def test_trimming_leaves_out_padding_only(dali):
    """A fifth of the clip costs a fifth of the tokens, and what is kept is what stood there before."""
    model, processor = dali
    waveform = sound(160 * 12)  # 10 frames: 2 of the 8 columns of 8 frames
    full = processor(text="<audio>", audio=[waveform], sampling_rate=RATE, return_tensors="pt")
    trimmed = processor(text="<audio>", audio=[waveform], sampling_rate=RATE, trim_padding=True, return_tensors="pt")
    audio = model.config.audio_token_index
    assert (full["input_ids"] == audio).sum() == 32 and (trimmed["input_ids"] == audio).sum() == 4 * 2
    with torch.no_grad():
        everything = model.get_audio_features(full["input_features"]).pooler_output[0].view(4, 8, -1)
        kept = torch.cat(model(**trimmed).audio_outputs.pooler_output)
    assert torch.equal(kept, everything[:, :2].flatten(0, 1))


def test_labels(dali):
    processor = dali[1]
    inputs = processor(
        text=[processor.caption_prompt("audio"), "a dog"],
        audio=[sound()],
        suffix=["a dog barks .", " rain "],
        sampling_rate=RATE,
        return_tensors="pt",
    )
    tokenizer = processor.tokenizer
    for row, answer in zip(range(2), ["a dog barks .", "rain"], strict=True):
        kept = inputs["labels"][row] != -100
        assert tokenizer.decode(inputs["labels"][row][kept]) == f"{answer} </s>"
        assert torch.equal(inputs["labels"][row][kept], inputs["input_ids"][row][kept])
        assert kept[-int(kept.sum()) :].all()  # the answer stands at the end, padding on the left
    prompt = processor(
        text=processor.caption_prompt("audio"), audio=[sound()], sampling_rate=RATE, return_tensors="pt"
    )["input_ids"][0]
    answer = int((inputs["labels"][0] != -100).sum())
    assert torch.equal(inputs["input_ids"][0][-len(prompt) - answer : -answer], prompt)


def test_lists_without_tensors(dali):
    inputs = dali[1](text=["a dog", "a"], suffix=["barks", "rain"])
    assert [len(row) for row in inputs["labels"]] == [len(row) for row in inputs["input_ids"]] == [5, 5]


def test_chat_template(dali, tmp_path):
    model, processor = dali
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    picture().save(tmp_path / "a.png")
    conversation = [
        {"role": "system", "content": "A chat."},
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(tmp_path / "a.png")},
                {"type": "audio", "path": str(tmp_path / "a.wav")},
                {"type": "text", "text": "What can be heard ?"},
            ],
        },
    ]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == "A chat. USER: <image><audio>\nWhat can be heard ? ASSISTANT:"
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_features"].shape == (1, 64, 32) and inputs["pixel_values"].shape == (1, 3, 16, 16)
    direct = processor(text=prompt, audio=[sound()], images=[picture()], sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], direct["input_ids"])
    model.generate(**inputs, max_new_tokens=2)
    assert processor.apply_chat_template(conversation[1:]).startswith(f"{SYSTEM} USER: <image><audio>\n")
    answered = [*conversation, {"role": "assistant", "content": "rain"}]
    assert processor.apply_chat_template(answered).endswith("What can be heard ? ASSISTANT: rain</s>")


def test_sounds_in_every_form(dali, tmp_path):
    processor = dali[1]
    waveform = sound()
    soundfile.write(tmp_path / "a.wav", waveform, RATE, subtype="FLOAT")

    def features(audio):
        return processor(text="<audio>", audio=audio, sampling_rate=RATE, return_tensors="pt")["input_features"]

    expected = features([waveform])
    stereo = np.stack([waveform, -waveform])
    for form in (waveform, torch.from_numpy(waveform), waveform.tolist(), str(tmp_path / "a.wav"), stereo, [stereo.T]):
        torch.testing.assert_close(features(form), expected, atol=1e-5, rtol=0)


def test_save_and_load(dali, tmp_path):
    processor = dali[1]
    processor.save_pretrained(tmp_path)
    loaded = DaliProcessor.from_pretrained(tmp_path)
    kwargs = {"audio": [sound()], "images": [picture()], "sampling_rate": RATE, "return_tensors": "pt"}
    text = processor.caption_prompt("audio_image")
    assert loaded.caption_prompt("audio_image") == text
    for name, tensor in processor(text=text, **kwargs).items():
        assert torch.equal(loaded(text=text, **kwargs)[name], tensor), name


def test_a_tokenizer_without_the_tokens_is_refused():
    from tests.tiny import tiny_feature_extractor, tiny_tokenizer

    _, processor = tiny_dali()
    with pytest.raises(ValueError, match="does not know <audio>"):
        DaliProcessor(processor.image_processor, tiny_tokenizer(), tiny_feature_extractor(), patch_size=4)


def test_unknown_modality(dali):
    with pytest.raises(ValueError, match="audio, image, audio_image, not 'video'"):
        dali[1].caption_prompt("video")
