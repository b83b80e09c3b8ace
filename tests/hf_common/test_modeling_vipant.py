"""VIP-ANT under transformers' common model tests."""

import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_vipant import (
    VipAntAudioConfig,
    VipAntAudioModel,
    VipAntConfig,
    VipAntForAudioClassification,
    VipAntModel,
)
from tests.hf_common.upstream import common_tests, without

common = common_tests("test_modeling_common")
# The common tests look up by these tables what a class returns and which labels it takes.
MODEL_MAPPING_NAMES |= {"vipant": "VipAntModel", "vipant_audio_model": "VipAntAudioModel"}
MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES["vipant"] = "VipAntForAudioClassification"

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 99, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 98}
VISION = SIZES | {"image_size": 8, "patch_size": 2}
AUDIO = SIZES | {"num_frames": 32, "num_mel_bins": 16, "patch_size": (8, 8), "patch_stride": (4, 4)}


class ModelTester:
    """Configurations and inputs, as the common tests ask for them."""

    batch_size = 12
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    text_config, vision_config, audio_config = TEXT, VISION, AUDIO

    def __init__(self, inputs: tuple[str, ...], seq_length: int):
        self.inputs = inputs
        self.seq_length = self.encoder_seq_length = self.key_length = seq_length

    def get_config(self):
        return VipAntConfig(
            text_config=dict(TEXT), vision_config=dict(VISION), audio_config=dict(AUDIO), projection_dim=32
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(2, 97, (self.batch_size, 7))
        input_ids[:, -1] = 98
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(self.batch_size, 3, 8, 8),
            "input_features": torch.randn(self.batch_size, 32, 16),
        }
        return self.get_config(), {name: inputs[name] for name in self.inputs}


class AudioModelTester(ModelTester):
    """The audio tower alone: its configuration is that of the tower."""

    def get_config(self):
        return VipAntAudioConfig(**AUDIO)


NO_WORD_EMBEDDING = "the input embedding of the audio tower is a convolution, as that of CLIP's image tower"
SEVERAL_TOWERS = "hidden states and attentions stand in the outputs of the towers, as CLIPModel's do"


@without(
    test_attention_outputs=SEVERAL_TOWERS,
    test_hidden_states_output=SEVERAL_TOWERS,
    test_retain_grad_hidden_states_attentions=SEVERAL_TOWERS,
    test_model_get_set_embeddings="three towers have no one input embedding, as CLIPModel has none",
)
class VipAntModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VipAntModel,)
    additional_model_inputs = ["pixel_values", "input_features"]
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester(("input_ids", "attention_mask", "pixel_values", "input_features"), 7)


@without(test_model_get_set_embeddings=NO_WORD_EMBEDDING)
class VipAntAudioModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VipAntAudioModel,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = AudioModelTester(("input_features",), 1 + 7 * 3)


@without(
    test_model_get_set_embeddings=NO_WORD_EMBEDDING,
    test_can_load_ignoring_mismatched_shapes="it takes the audio projection, a linear layer, for the head",
)
class VipAntForAudioClassificationTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VipAntForAudioClassification,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = ModelTester(("input_features",), 1 + 7 * 3)
