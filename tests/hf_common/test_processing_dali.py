"""DaliProcessor under transformers' common processor tests."""

import unittest

import pytest

from modeling_dali import DaliProcessor
from tests.hf_common.upstream import common_processor_tests
from tests.tiny import tiny_dali

common = common_processor_tests()


class Components:
    """The parts of a tiny processor, as the common tests ask for them."""

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_dali()[1].tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_dali()[1].image_processor

    @classmethod
    def _setup_feature_extractor(cls):
        return tiny_dali()[1].feature_extractor

    @staticmethod
    def prepare_processor_dict():
        return {
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "audio_seq_length": 32,
            "audio_grid": [4, 8],
        }


class DaliProcessorTest(Components, common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = DaliProcessor

    @pytest.fixture(autouse=True)
    def without_code(self, monkeypatch):
        """Saves as a class of transformers does; that the code goes to the Hub, test_hub.py tests."""
        monkeypatch.setattr(DaliProcessor, "_auto_class", None)
