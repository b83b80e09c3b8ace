"""The processor: placeholders, windows, trimming, labels, templates."""

import copy
import logging

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from modeling_dali import DaliProcessor
from modeling_dali.chat_templates import SYSTEM
from tests.modeling_dali.test_audio_io import write_video
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
    media = {"audio": [sound()], "images": [picture()], "sampling_rate": RATE}
    inputs = dali[1](text="<audio><image>", **media, trim_padding=True)
    tensors = dali[1](text="<audio><image>", **media, trim_padding=True, return_tensors="pt")
    assert set(inputs) == set(tensors)
    for name, values in inputs.items():
        assert isinstance(values, list) and np.array_equal(np.asarray(values), tensors[name].numpy()), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_labels_stand_on_the_answer_however_rows_are_padded(dali, side, tensors):
    processor = dali[1]
    inputs = processor(
        text=["<audio> what", "a dog", "a"],
        audio=[sound()],
        suffix=["rain falls", "barks loudly", "a"],
        sampling_rate=RATE,
        padding="max_length",
        max_length=80,
        padding_side=side,
        return_tensors=tensors,
    )
    ids, labels = np.asarray(inputs["input_ids"]), np.asarray(inputs["labels"])
    assert ids.shape == labels.shape == (3, 80) and isinstance(inputs["labels"], type(inputs["input_ids"]))
    assert ((ids == processor.tokenizer.pad_token_id).argmax(1) > 0).all() == (side == "right")
    answers = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert answers == ["rain falls </s>", "barks loudly </s>", "a </s>"]
    assert np.array_equal(labels[labels != -100], ids[labels != -100])


def test_labels_of_a_whole_text(dali):
    processor = dali[1]
    inputs = processor(
        text=["<audio><prefix> a dog", "a"],
        audio=[sound()],
        sampling_rate=RATE,
        output_labels=True,
        return_tensors="pt",
    )
    kept = inputs["labels"] != -100
    assert kept.sum(1).tolist() == [3, 2]  # `<s> a dog` and `<s> a`
    assert torch.equal(inputs["labels"][kept], inputs["input_ids"][kept])


@pytest.mark.parametrize(
    ("kwargs", "check"),
    [
        ({"padding_side": "right"}, lambda inputs: inputs["attention_mask"][1].tolist() == [1, 1, 0, 0]),
        ({"pad_to_multiple_of": 16}, lambda inputs: inputs["input_ids"].shape == (2, 16)),
        ({"return_attention_mask": False}, lambda inputs: "attention_mask" not in inputs),
        ({"return_mm_token_type_ids": True}, lambda inputs: not inputs["mm_token_type_ids"].any()),
        ({"return_offsets_mapping": True}, lambda inputs: inputs["offset_mapping"][0, -1].tolist() == [6, 11]),
        ({"return_length": True}, lambda inputs: "length" in inputs),
        ({"return_special_tokens_mask": True}, lambda inputs: inputs["special_tokens_mask"][0, 0] == 1),
        ({"return_token_type_ids": True}, lambda inputs: "token_type_ids" in inputs),
        ({"add_special_tokens": False}, lambda inputs: inputs["input_ids"].shape == (2, 3)),
        ({"padding": "max_length", "max_length": 9}, lambda inputs: inputs["input_ids"].shape == (2, 9)),
        ({"truncation": True, "max_length": 2}, lambda inputs: inputs["input_ids"].shape == (2, 2)),
        ({"text_kwargs": {"truncation": True, "max_length": 3}}, lambda inputs: inputs["input_ids"].shape == (2, 3)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keywords_of_the_tokenizer_act(dali, kwargs, check):
    assert check(dali[1](text=["a dog barks", "a"], **kwargs, return_tensors="pt"))


def test_keywords_of_the_image_processor_act(dali):
    pixels = [
        dali[1](text="<image>", images=[picture()], return_tensors="pt", **kwargs)["pixel_values"]
        for kwargs in ({"do_normalize": False}, {"images_kwargs": {"do_normalize": False, "do_rescale": False}})
    ]
    torch.testing.assert_close(pixels[0] * 255, pixels[1].float())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"audio_kwargs": {"padding": True}}, TypeError, "audio_kwargs\\['padding'\\]"),
        ({"audio_kwargs": {"max_length": 3}}, TypeError, "audio_kwargs\\['max_length'\\]"),
        ({"text_kwargs": {"max_windows": 3}}, TypeError, "text_kwargs\\['max_windows'\\]"),
        ({"images_kwargs": {"truncation": True}}, TypeError, "images_kwargs\\['truncation'\\]"),
        ({"videos": ["a.mp4"]}, TypeError, "give their sound as `audio`"),
        ({"truncation": True, "audio_kwargs": {"truncation": False}}, ValueError, "passed twice"),
        ({"suffix": "rain", "truncation": True, "max_length": 3}, ValueError, "cannot be truncated"),
        ({"suffix": "rain", "return_attention_mask": False}, ValueError, "attention mask"),
    ],
)
def test_what_cannot_act_raises(dali, kwargs, error, message):
    with pytest.raises(error, match=message):
        dali[1](text="a dog", **kwargs)


def test_truncation_is_of_sound_unless_a_length_is_given(dali):
    """A tokenizer of 20 tokens at most does not cost the question where sound is cut."""
    processor = copy.deepcopy(dali[1])
    processor.tokenizer.model_max_length = 20
    kwargs = {"audio": [sound(4 * WINDOW)], "sampling_rate": RATE, "max_windows": 2, "truncation": True}
    inputs = processor(text="<audio> what can be heard", **kwargs)
    assert len(inputs["input_ids"][0]) == 1 + 64 + 4 and len(inputs["input_features"]) == 2
    with pytest.raises(ValueError, match="`audio` token count"):
        processor(text="<audio> what can be heard", **kwargs, max_length=20)


def test_counts_that_are_told_from_sizes_alone(dali):
    processor = dali[1]
    lengths = [400, 160 * 12, WINDOW, WINDOW + 399, WINDOW + 400, WINDOW + 160 * 30, 3 * WINDOW - 1]
    for trim in (False, True):
        told = processor._get_num_multimodal_tokens(
            image_sizes=[(20, 30), (9, 9)], audio_lengths=lengths, trim_padding=trim
        )
        inputs = processor(
            text=["<audio>"] * len(lengths) + ["<image>"] * 2,
            audio=[sound(length) for length in lengths],
            images=[picture(), picture(1)],
            sampling_rate=RATE,
            trim_padding=trim,
            return_mm_token_type_ids=True,
        )
        kinds = np.asarray(inputs["mm_token_type_ids"])
        assert (kinds == 3).sum(1).tolist() == [*told["num_audio_tokens"], 0, 0]
        assert (kinds == 1).sum(1)[-2:].tolist() == told["num_image_tokens"] and told["num_image_patches"] == [1, 1]


def test_assistant_mask_behind_media_and_prefix(dali):
    """Trainers that learn from answers only (trl's `assistant_only_loss`) ask for this mask."""
    processor = dali[1]
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "prefix"},
                {"type": "image", "image": picture()},
                {"type": "audio", "audio": sound()},
                {"type": "prefix"},
                {"type": "text", "text": "what can be heard"},
            ],
        },
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": [{"type": "audio", "audio": sound(seed=1)}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "rain falls"},
    ]
    inputs = processor.apply_chat_template(
        [conversation, conversation[2:]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"sampling_rate": RATE},
    )
    said = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert said == ["a dog </s> rain falls </s>", "rain falls </s>"]


def test_replacement_offsets_name_every_placeholder(dali):
    processor = dali[1]
    text = ["<prefix>a<audio><prefix><image>b<audio>", "<audio>"]
    inputs = processor(
        text=text,
        audio=[sound(seed=seed) for seed in range(3)],
        images=[picture()],
        sampling_rate=RATE,
        return_text_replacement_offsets=True,
    )
    for given, entries in zip(text, inputs["text_replacement_offsets"], strict=True):
        expanded = given
        for entry in reversed(entries):
            start, end = entry["span"]
            assert given[start:end] == entry["text"]
            expanded = expanded[:start] + entry["replacement"] + expanded[end:]
        assert all(expanded[slice(*entry["new_span"])] == entry["replacement"] for entry in entries)
    kinds = [[entry["type"] for entry in entries] for entries in inputs["text_replacement_offsets"]]
    assert kinds == [["prefix", "audio", "prefix", "image", "audio"], ["audio"]]


def test_a_prefix_in_front_takes_its_offsets_along(dali):
    processor = dali[1]
    inputs = processor(text=["<prefix>a dog", "a"], return_offsets_mapping=True)
    assert inputs["input_ids"][0][:4] == [processor.prefix_token_id] * 3 + [processor.tokenizer.bos_token_id]
    token = len("<prefix>")
    assert inputs["offset_mapping"][0][:4] == [(0, token), (token, 2 * token), (2 * token, 3 * token), (0, 0)]


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


def test_videos_in_a_chat_are_heard(dali, tmp_path):
    processor = dali[1]
    video = str(write_video(tmp_path / "v.mp4"))

    def ask(*items, **kwargs):
        conversation = [{"role": "user", "content": [*items, {"type": "text", "text": "what"}]}]
        return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)

    expected = ask({"type": "audio", "path": video}, return_tensors="pt")
    for behind in ([], [{"type": "audio"}]):
        inputs = ask({"type": "video", "path": video}, *behind, return_tensors="pt", load_audio_from_video=True)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    items = [{"type": "video", "path": video}, {"type": "audio", "audio": sound()}]
    both = ask(*items, load_audio_from_video=True, processor_kwargs={"sampling_rate": RATE})
    assert len(both["input_features"]) == len(expected["input_features"]) + 1
    with pytest.raises(ValueError, match="load_audio_from_video=True"):
        ask({"type": "video", "path": video})


def test_a_chat_reads_files_as_the_processor_does(dali, tmp_path):
    """At their own rates, to the last bit."""
    processor = dali[1]
    soundfile.write(tmp_path / "a.wav", np.stack([sound(20_000), sound(20_000, seed=1)], axis=1), 44_100)
    path = str(tmp_path / "a.wav")
    conversation = [{"role": "user", "content": [{"type": "audio", "path": path}]}]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor(text="<audio>", audio=path, return_tensors="pt")["input_features"]
    assert torch.equal(inputs["input_features"], expected)


def test_sounds_in_every_form(dali, tmp_path):
    processor = dali[1]
    waveform = sound()
    soundfile.write(tmp_path / "a.wav", waveform, RATE, subtype="FLOAT")

    def features(audio):
        return processor(text="<audio>", audio=audio, sampling_rate=RATE, return_tensors="pt")["input_features"]

    expected = features([waveform])
    stereo = np.stack([2 * waveform, 0 * waveform])
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
