"""Configurations: the paper's sizes, and values that no model can have."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_dali import DaliAudioConfig, DaliConfig

SIZES = [
    "num_frames",
    "num_mel_bins",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -16, 1.5, "16", None])
def test_sizes_are_whole_numbers_of_at_least_one(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        DaliAudioConfig(**{name: value})


@pytest.mark.parametrize("name", ["layer_norm_eps", "attention_dropout", "initializer_range"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_rates_lie_between_zero_and_one(name, value):
    with pytest.raises(
        StrictDataclassError, match=rf"{name}'[\s\S]*greater or equal to 0.0 and smaller or equal to 1.0"
    ):
        DaliAudioConfig(**{name: value})
    config = DaliAudioConfig()
    with pytest.raises(StrictDataclassError, match=name):  # also later
        setattr(config, name, value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 5}, r"`hidden_size` \(768\) must be a multiple of 4 .* and of twice .* \(5\)"),
        ({"num_frames": 1000}, r"`num_frames` \(1000\) must be a multiple of `patch_size` \(16\)"),
        ({"num_mel_bins": 100}, r"`num_mel_bins` \(100\) must be a multiple of `patch_size` \(16\)"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        DaliAudioConfig(**sizes)


def test_an_activation_that_is_none():
    with pytest.raises(StrictDataclassError, match=r"hidden_act[\s\S]*one of \['gelu'.*got loud"):
        DaliAudioConfig(hidden_act="loud")


@pytest.mark.parametrize("name", ["audio_token_index", "prefix_token_index", "prefix_length"])
def test_indices_and_lengths_are_not_negative(name):
    with pytest.raises(StrictDataclassError, match=rf"{name}'[\s\S]*greater or equal to 0, got -1"):
        DaliConfig(**{name: -1})


def test_a_clip_has_tokens():
    with pytest.raises(ValueError, match="`audio_seq_length` must be at least 1, it is 0"):
        DaliConfig(audio_seq_length=0)


def test_placeholders_are_told_apart():
    with pytest.raises(ValueError, match=r"a vocabulary index each, they have .*'audio': 32000"):
        DaliConfig(image_token_index=32000, audio_token_index=32000)


def test_a_place_that_the_prefix_cannot_have():
    with pytest.raises(StrictDataclassError, match=r"prefix_position[\s\S]*'after_media', 'front'"):
        DaliConfig(prefix_position="behind")
