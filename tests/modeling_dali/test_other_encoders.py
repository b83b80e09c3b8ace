"""Audio encoders that transformers has already: their tokens in the place of CAV-MAE's."""

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapAudioConfig,
    ClapFeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_dali import DaliForConditionalGeneration, DaliProcessor
from tests.tiny import tiny_dali, tiny_llava, tiny_tokenizer

small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32}


def ast():
    return ASTConfig(**small, max_length=102, num_mel_bins=32), ASTFeatureExtractor(max_length=102, num_mel_bins=32)


def whisper():
    sizes = {"d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **decoder, **tokens, num_mel_bins=16, max_source_positions=100)
    return config, WhisperFeatureExtractor(feature_size=16, chunk_length=2)


def clap():
    config = ClapAudioConfig(
        spec_size=64,
        num_mel_bins=16,
        patch_size=4,
        patch_stride=[4, 4],
        window_size=4,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=16,
        hidden_size=32,
        num_hidden_layers=2,
    )
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16_000,
        max_length_s=1,
        fft_window_size=400,
        hop_length=160,
        truncation="rand_trunc",
    )
    return config, extractor


@pytest.mark.parametrize("encoder", [ast, whisper, clap])
def test_another_encoder(encoder, tmp_path):
    audio_config, extractor = encoder()
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = DaliForConditionalGeneration.from_llava(tiny_llava(), audio_config=audio_config, tokenizer=tokenizer)
    processor = DaliProcessor.for_model(model.config, tiny_dali()[1].image_processor, tokenizer, extractor)
    rng = np.random.default_rng(0)
    seconds = 3.5
    sounds = [
        rng.standard_normal(int(seconds * 8_000)).astype(np.float32),
        rng.standard_normal(4_000).astype(np.float32),
    ]
    inputs = processor(
        text=[processor.caption_prompt("audio")] * 2, audio=sounds, sampling_rate=8_000, return_tensors="pt"
    )
    windows, counts = processor.split_windows(sounds, 8_000)
    assert counts[0] > 1 and sum(len(window) for window in windows) == pytest.approx(16_000 * (seconds + 0.5), abs=2)
    tokens = (inputs["input_ids"] == model.config.audio_token_index).sum()
    assert tokens == model.config.audio_seq_length * sum(counts)
    output = model.get_audio_features(inputs["input_features"])
    assert output.pooler_output.shape == (sum(counts), model.config.audio_seq_length, 32)
    with torch.no_grad():
        logits = model(**inputs).logits
        other = dict(inputs) | {"input_features": inputs["input_features"] * 0.5}
        assert not torch.equal(model(**other).logits, logits)
        model.generate(**inputs, max_new_tokens=3)
        model.save_pretrained(tmp_path)
        loaded = DaliForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, logits)
    processor.save_pretrained(tmp_path)
    assert type(DaliProcessor.from_pretrained(tmp_path).feature_extractor) is type(extractor)
    if encoder is not whisper:
        with pytest.raises(ValueError, match="trim_padding"):
            processor(text="<audio>", audio=sounds[1:], sampling_rate=8_000, trim_padding=True)


def test_a_model_instance_serves_too():
    config, _ = ast()
    encoder = ASTModel(config)
    model = DaliForConditionalGeneration.from_llava(tiny_llava(), encoder)
    assert model.model.audio_tower is encoder


def test_an_unknown_encoder_needs_its_number_of_tokens():
    from transformers import Wav2Vec2Config

    with pytest.raises(ValueError, match="audio_seq_length"):
        DaliForConditionalGeneration.from_llava(tiny_llava(), audio_config=Wav2Vec2Config())
