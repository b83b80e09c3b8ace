"""The wrappers for evaluation harnesses, on fakes that call them as the harnesses do."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from examples.evaluation.models import AVAILABLE_MODELS
from examples.evaluation.mteb_vipant import VipAntEncoder
from tests.tiny import tiny_dali
from tests.tiny_vipant import tiny_processor, tiny_vipant


def sound(seed, seconds=0.5, rate=16_000):
    array = (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)
    return {"array": array, "sampling_rate": rate}


# MTEB ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vipant")
    tiny_vipant().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return VipAntEncoder(str(folder), None, device="cpu")


def batches(rows, size=2):
    """As MTEB's data loaders give them."""
    return DataLoader(rows, batch_size=size, collate_fn=lambda items: {k: [i[k] for i in items] for k in items[0]})


def test_mteb_encodes_each_kind(encoder):
    about = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None}
    texts = encoder.encode(batches([{"text": text} for text in ("rain", "a dog", "bells")]), **about)
    images = encoder.encode(batches([{"image": Image.new("RGB", (40, 30), color)} for color in ("red", "green")]))
    sounds = encoder.encode(batches([{"audio": sound(0)}, {"audio": sound(1, 2.0)}, {"audio": sound(2, 0.5, 44_100)}]))
    assert (texts.shape, images.shape, sounds.shape) == ((3, 24), (2, 24), (3, 24))
    for embeds in (texts, images, sounds):
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
    alone = encoder.encode(batches([{"audio": sound(1, 2.0)}]))
    np.testing.assert_allclose(sounds[1], alone[0], atol=1e-5)
    both = encoder.encode(batches([{"text": "rain", "audio": sound(0)}]))[0]
    expected = texts[0] + sounds[0]
    np.testing.assert_allclose(both, expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_allclose(encoder.similarity(texts, sounds), texts @ sounds.T, atol=1e-5)
    np.testing.assert_allclose(encoder.similarity_pairwise(texts, sounds), (texts * sounds).sum(1), atol=1e-5)
    with pytest.raises(ValueError, match="no text, image or audio"):
        encoder.encode([{"video": [1]}])


# lmms-eval -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """lmms-eval's base class, registry and task dictionary, and the plugin as it finds it."""
    registry = {}

    class FakeBase:
        def __init__(self):
            self.task_dict, self.rank = {}, 0

    def register(name):
        return lambda model: registry.setdefault(name, model)

    for name, content in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": SimpleNamespace},
        "lmms_eval.api.model": {"lmms": FakeBase},
        "lmms_eval.api.registry": {"register_model": register},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name, class_name in AVAILABLE_MODELS.items():
        module = importlib.import_module(f"examples.evaluation.models.{name}")
        assert registry[name] is getattr(module, class_name)
    model, processor = tiny_dali()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wrapped = registry["dali"](pretrained=str(tmp_path), device="cpu", batch_size="2")
    rows = [
        {"media": [sound(0)]},
        {"media": [sound(1, 1.5, 44_100), Image.new("RGB", (30, 20), "red")]},
        {"media": [sound(2)]},
    ]
    wrapped.task_dict = {"hearing": {"test": rows}}
    yield wrapped
    sys.modules.pop("examples.evaluation.models.dali")


def requests(settings, questions=("what ?", "what can be heard ?", "a dog ?")):
    return [
        SimpleNamespace(args=(question, setting, lambda row: row["media"], index, "hearing", "test"))
        for index, (question, setting) in enumerate(zip(questions, settings, strict=True))
    ]


def test_lmms_eval_asks_and_cuts(harness):
    plain = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"], "image_aspect_ratio": "original"}
    answers = harness.generate_until(requests([plain] * 3))
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    harness.batch_size = 1
    assert harness.generate_until(requests([plain] * 3)) == answers
    letter = max(answers, key=len)[-1]
    stopped = harness.generate_until(requests([{**plain, "until": letter}] * 3))
    assert stopped == [answer.partition(letter)[0].strip() for answer in answers] != answers


def test_lmms_eval_scores_answers(harness):
    settings = {"max_new_tokens": 4, "temperature": 0}
    greedy = harness.generate_until(requests([settings] * 3))[0]
    (likelihood, _), (other, is_greedy) = harness.loglikelihood(
        [requests([answer] * 3)[0] for answer in (greedy, "rain falls")]
    )
    assert likelihood < 0 and other < 0 and not is_greedy
    inputs = harness.prepare([harness.conversation(*requests([""] * 3)[0].args)], suffix=["rain falls"])
    with torch.no_grad():
        loss = harness.model(**inputs).loss
    assert other == pytest.approx(-loss.item() * (inputs["labels"] != -100).sum().item(), rel=1e-4)
    by_row = harness.loglikelihood(requests([lambda row: "rain falls"] * 3))[0]
    assert by_row == (pytest.approx(other, rel=1e-5), False)
