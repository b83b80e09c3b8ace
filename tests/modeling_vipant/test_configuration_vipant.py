"""Configurations: values that no model can have."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_vipant import VipAntAudioConfig, VipAntConfig

SIZES = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "num_mel_bins",
    "num_frames",
]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_sizes_are_whole_numbers_of_at_least_one(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        VipAntAudioConfig(**{name: value})


@pytest.mark.parametrize("name", ["patch_size", "patch_stride"])
@pytest.mark.parametrize("value", [(0, 16), (16, -1), (16,), (16, 16, 16)])
def test_patches_are_two_numbers_of_at_least_one(name, value):
    with pytest.raises(StrictDataclassError, match=f"{name} must be two numbers of at least 1"):
        VipAntAudioConfig(**{name: value})


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (VipAntAudioConfig, {"num_attention_heads": 5}, "768 is not a multiple of 5 heads"),
        (VipAntAudioConfig, {"num_mel_bins": 16}, "does not fit in 1000 frames x 16 mel bins"),
        (VipAntAudioConfig, {"layer_norm_eps": math.nan}, "layer_norm_eps"),
        (VipAntAudioConfig, {"hidden_act": "loud"}, "hidden_act"),
        (VipAntConfig, {"projection_dim": 0}, "projection_dim"),
        (VipAntConfig, {"logit_scale_init_value": math.inf}, "logit_scale_init_value"),
        (VipAntConfig, {"initializer_factor": math.nan}, "initializer_factor"),
        (VipAntConfig, {"text_config": {"num_attention_heads": 5}}, "512.*not a multiple.*5"),
    ],
)
def test_other_values(config, values, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**values)
