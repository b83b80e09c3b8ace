"""KaldiFbankFeatureExtractor under transformers' common tests of feature extractors."""

import unittest

import numpy as np

from modeling_dali import KaldiFbankFeatureExtractor
from tests.hf_common.upstream import common_tests

common = common_tests("test_sequence_feature_extraction_common")


class Settings:
    """Settings and sounds, as the common tests ask for them."""

    batch_size, min_seq_length, max_seq_length = 7, 400, 2000
    seq_length_diff = (2000 - 400) // 6
    feature_size, padding_value, sampling_rate, num_frames = 32, 0.0, 16_000, 64

    def __init__(self, parent):
        self.parent = parent

    def prepare_feat_extract_dict(self):
        return {
            "feature_size": self.feature_size,
            "padding_value": self.padding_value,
            "sampling_rate": self.sampling_rate,
            "num_frames": self.num_frames,
        }

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        rng = np.random.default_rng(0)
        lengths = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        sounds = [rng.random((self.max_seq_length if equal_length else n, self.feature_size)) for n in lengths]
        return sounds if numpify else [sound.tolist() for sound in sounds]


class KaldiFbankFeatureExtractorTest(common.SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = KaldiFbankFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = Settings(self)
