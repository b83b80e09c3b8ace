import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor

from modeling_dali.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from modeling_vipant import VipAntForAudioClassification, VipAntModel, VipAntProcessor, vipant_feature_extractor
from tests.tiny_vipant import NUM_BINS, NUM_FRAMES, tiny_processor, tiny_vipant


def sound(seed: int, seconds: float = 0.6, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def test_front_end_has_vipants_numbers():
    waveform = sound(0, seconds=9.0, rate=44_100)
    plain = KaldiFbankFeatureExtractor(num_frames=1000, mean=0.0, std=1.0, sampling_rate=44_100)
    raw = plain(waveform, 44_100)["input_features"]
    ours = vipant_feature_extractor()(waveform, 44_100)["input_features"]
    assert ours.shape == (1, 1000, 128)
    torch.testing.assert_close(ours, (raw + 4.93839311) / 5.75751113)
    torch.testing.assert_close(
        ours[0, -1], torch.full((128,), 4.93839311 / 5.75751113)
    )  # padding: 0 in the log domain


def test_processor_feeds_the_model():
    processor, model = tiny_processor(), tiny_vipant()
    images = [Image.new("RGB", (50, 40), color) for color in ("red", "green")]
    inputs = processor(
        audio=[sound(1), sound(2)], images=images, text=["rain", "a dog"], sampling_rate=16_000, return_tensors="pt"
    )
    assert inputs["input_features"].shape == (2, NUM_FRAMES, NUM_BINS)
    assert inputs["pixel_values"].shape == (2, 3, 28, 28)
    output = model(**inputs)
    assert output.logits_per_audio.shape == (2, 2)
    # Padding texts to one length does not change them.
    alone = processor(text=["rain"], return_tensors="pt")
    torch.testing.assert_close(
        model.get_text_features(**alone).pooler_output[0], output.text_embeds[0], atol=1e-6, rtol=0
    )


def test_long_texts_are_cut_to_the_towers_length():
    inputs = tiny_processor()(text=["x" * 300], return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 40)
    tiny_vipant().get_text_features(**inputs)


def test_other_clip_lengths_by_one_number():
    processor = tiny_processor()
    processor.feature_extractor.num_frames = 115
    inputs = processor(audio=[sound(1, seconds=3.0)], sampling_rate=16_000, crop="center", return_tensors="pt")
    assert inputs["input_features"].shape == (1, 115, NUM_BINS)
    assert tiny_vipant()(**inputs).audio_embeds.shape == (1, 24)


def test_unknown_arguments_are_refused():
    with pytest.raises((TypeError, ValueError)):
        tiny_processor()(audios=[sound(0)], sampling_rate=16_000)


def test_processor_round_trip(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path)
    again = VipAntProcessor.from_pretrained(tmp_path)
    assert again.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    for name, value in processor(text="rain", audio=[sound(3)], sampling_rate=16_000, return_tensors="pt").items():
        torch.testing.assert_close(
            again(text="rain", audio=[sound(3)], sampling_rate=16_000, return_tensors="pt")[name], value
        )


def test_auto_classes_know_vipant_where_it_is_installed(tmp_path):
    tiny_vipant().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is VipAntModel
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VipAntProcessor
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is KaldiFbankFeatureExtractor


@pytest.mark.parametrize("kwargs", [{"padding": "max_length"}, {"padding": True, "pad_to_multiple_of": 8}])
def test_padding_is_of_text(kwargs):
    processor = tiny_processor()
    inputs = processor(text=["rain"], audio=[sound(0)], sampling_rate=16_000, return_tensors="pt", **kwargs)
    assert inputs["input_ids"].shape == (1, 40 if kwargs["padding"] == "max_length" else 8)
    assert inputs["input_features"].shape == (1, NUM_FRAMES, NUM_BINS)


def test_keywords_act_or_raise():
    processor = tiny_processor()
    assert processor(text=["rain falls"], max_length=4, return_tensors="pt")["input_ids"].shape == (1, 4)
    long = {"audio": [sound(0, seconds=2.0)], "sampling_rate": 16_000}
    with pytest.raises(ValueError, match="`truncation` is off"):
        processor(**long, audio_kwargs={"truncation": False})
    crops = [processor(**long, crop=crop, return_tensors="pt")["input_features"] for crop in ("start", "center")]
    assert crops[0].shape == crops[1].shape == (1, NUM_FRAMES, NUM_BINS) and not torch.equal(*crops)
    for unknown in ({"windows": 3}, {"audio_kwargs": {"windows": 3}}):
        with pytest.raises(TypeError, match="windows"):
            processor(**long, **unknown)


def test_long_sounds_are_heard_whole_and_windows_count_by_their_duration():
    processor, model = tiny_processor(), tiny_vipant()
    window = processor.feature_extractor.window_samples
    sounds = [sound(0, seconds=0.64), sound(1, seconds=2.0)[: 2 * window + window // 2], sound(2)]
    inputs = processor(audio=sounds, text=["rain"], sampling_rate=16_000, return_tensors="pt")
    assert inputs["input_features"].shape == (3, 3, NUM_FRAMES, NUM_BINS)
    seconds = window / 16_000
    expected = [[seconds, 0, 0], [seconds, seconds, seconds / 2], [len(sounds[2]) / 16_000, 0, 0]]
    torch.testing.assert_close(inputs["window_seconds"], torch.tensor(expected))
    outputs = model(**inputs)
    for index in (0, 2):
        alone = processor(audio=[sounds[index]], sampling_rate=16_000, return_tensors="pt")
        assert alone["input_features"].ndim == 3
        embeds = model.get_audio_features(**alone).pooler_output[0]
        torch.testing.assert_close(outputs.audio_embeds[index], embeds, atol=1e-5, rtol=0)
    pieces = [sounds[1][start : start + processor.feature_extractor.crop_samples] for start in (0, window, 2 * window)]
    parts = processor.feature_extractor(pieces, sampling_rate=16_000, return_tensors="pt")["input_features"]
    embeds = model.get_audio_features(parts).pooler_output
    mean = torch.nn.functional.normalize(2 * embeds[0] + 2 * embeds[1] + embeds[2], dim=0)
    torch.testing.assert_close(outputs.audio_embeds[1], mean, atol=1e-5, rtol=0)
    lists = processor(audio=sounds, sampling_rate=16_000)
    assert all(isinstance(value, list) for value in lists.values())


def test_a_classifier_averages_the_scores_of_windows(tmp_path):
    processor = tiny_processor()
    tiny_vipant().save_pretrained(tmp_path)
    model = VipAntForAudioClassification.from_pretrained(tmp_path, num_labels=3).eval()
    window = processor.feature_extractor.window_samples
    long = sound(0, seconds=2.0)[: window + window // 2]
    scores = model(**processor(audio=[long, sound(1)], sampling_rate=16_000, return_tensors="pt")).logits
    pieces, _ = processor.feature_extractor.split(long)
    parts, alone = (
        model(**processor.feature_extractor(clips, sampling_rate=16_000)).logits for clips in (pieces, [sound(1)])
    )
    torch.testing.assert_close(scores[0], (2 * parts[0] + parts[1]) / 3, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[1], alone[0], atol=1e-5, rtol=0)
