"""DALI under transformers' common model tests, sound and picture in every row."""

import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_dali import DaliAudioConfig, DaliAudioModel, DaliConfig, DaliForConditionalGeneration, DaliModel
from tests.hf_common.upstream import common_tests, without

common = common_tests("test_modeling_common")
# The common tests look up by these tables what a class returns and which labels it takes.
MODEL_MAPPING_NAMES |= {"dali": "DaliModel", "dali_audio": "DaliAudioModel"}
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dali"] = "DaliForConditionalGeneration"

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"model_type": "llama", "vocab_size": 99, "num_key_value_heads": 4, "max_position_embeddings": 512}
VISION = SIZES | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 2}
AUDIO = SIZES | {"model_type": "dali_audio", "num_frames": 32, "num_mel_bins": 16, "patch_size": 8}


class ModelTester:
    """Configurations and inputs, as the common tests ask for them."""

    batch_size = 7  # the common tests fill smaller batches up with rows of their own, without pictures
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99
    image_tokens, audio_tokens = 16, 8
    seq_length = encoder_seq_length = key_length = image_tokens + audio_tokens + 7
    text_config, vision_config, audio_config = TEXT, VISION, AUDIO

    def get_config(self):
        return DaliConfig(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            audio_config=dict(AUDIO),
            image_token_index=5,
            audio_token_index=6,
            prefix_token_index=7,
            vision_feature_layer=-1,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(8, self.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, 1 : 1 + self.image_tokens] = config.image_token_index
        input_ids[:, 1 + self.image_tokens :][:, : self.audio_tokens] = config.audio_token_index
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(self.batch_size, 3, 8, 8),
            "input_features": torch.randn(self.batch_size, 32, 16),
        }


class AudioModelTester(ModelTester):
    """The audio encoder alone."""

    seq_length = encoder_seq_length = key_length = ModelTester.audio_tokens

    def get_config(self):
        return DaliAudioConfig(**AUDIO)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_features": torch.randn(self.batch_size, 32, 16)}


@without(
    test_generation_tester_mixin_inheritance="the mixin is not part of the source distribution",
    test_model_rope_scaling_from_config="its random ids hold placeholders without pictures, which DALI refuses",
)
class DaliModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DaliModel, DaliForConditionalGeneration)
    additional_model_inputs = ["pixel_values", "input_features"]
    test_all_params_have_gradient = False  # CLIP's last norm is behind the layer that is read, as in LLaVA
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester()


@without(test_model_get_set_embeddings="the input embedding is a convolution, as that of CLIP's image tower")
class DaliAudioModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DaliAudioModel,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = AudioModelTester()
