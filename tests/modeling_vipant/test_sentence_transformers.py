"""A VIP-ANT folder as a model of sentence-transformers."""

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.tiny_vipant import tiny_processor, tiny_vipant

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vipant")
    tiny_vipant().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def sound(seed, seconds=0.5, rate=16_000):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def expected(kind, **given):
    with torch.no_grad():
        inputs = tiny_processor()(**given, return_tensors="pt")
        return getattr(tiny_vipant(), f"get_{kind}_features")(**inputs).pooler_output.numpy()


def test_every_kind_of_input(encoder, folder):
    texts, images = ["rain", "a dog barks"], [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    np.testing.assert_allclose(encoder.encode(texts), expected("text", text=texts), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(images), expected("image", images=images), atol=1e-5)
    soundfile.write(folder / "a.wav", sound(0), 16_000, subtype="FLOAT")
    wanted = expected("audio", audio=[sound(0)], sampling_rate=16_000)
    for form in (str(folder / "a.wav"), {"array": sound(0), "sampling_rate": 16_000}):
        np.testing.assert_allclose(encoder.encode([form]), wanted, atol=1e-5)
    fast = {"array": sound(1, rate=44_100), "sampling_rate": 44_100}
    wanted = expected("audio", audio=[sound(1, rate=44_100)], sampling_rate=44_100)
    np.testing.assert_allclose(encoder.encode([fast]), wanted, atol=1e-5)


def test_long_sounds_are_heard_whole(encoder):
    """Windows count by their duration, whatever shares the batch."""
    processor = tiny_processor()
    window = processor.feature_extractor.window_samples
    long = sound(0, seconds=2.0)[: 2 * window + window // 4]
    sounds = [{"array": array, "sampling_rate": 16_000} for array in (long, sound(1))]
    embeds = encoder.encode(sounds)
    pieces, seconds = processor.feature_extractor.split(long)
    parts = expected("audio", audio=pieces, crop="start", sampling_rate=16_000)
    mean = (np.array(seconds)[:, None] * parts).sum(0)
    np.testing.assert_allclose(embeds[0], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(embeds[1], encoder.encode([sounds[1]])[0], atol=1e-5)
