"""VipAntProcessor under transformers' common processor tests."""

import unittest

import pytest

from modeling_vipant import VipAntProcessor
from tests.hf_common.upstream import common_processor_tests
from tests.tiny_vipant import tiny_processor

common = common_processor_tests()


class VipAntProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VipAntProcessor

    @pytest.fixture(autouse=True)
    def without_code(self, monkeypatch):
        """Saves as a class of transformers does; that the code goes to the Hub, test_hub.py tests."""
        monkeypatch.setattr(VipAntProcessor, "_auto_class", None)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @classmethod
    def _setup_feature_extractor(cls):
        return tiny_processor().feature_extractor
