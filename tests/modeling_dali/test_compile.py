"""The whole model traced: one graph for `torch.compile`, and `torch.export`."""

import pytest
import torch
from transformers import StaticCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from tests.modeling_dali.test_modeling_dali import prepare
from tests.tiny import tiny_dali

MODALITIES = ["audio", "image", "audio_image"]


def traced(modality, **kwargs):
    """A model with a prefix, inputs of two rows, and what the model makes of them untraced."""
    model, processor = tiny_dali(prefix=3)
    inputs = dict(prepare(processor, [(modality, 0, 0), (modality, 1, 1)], **kwargs))
    assert (inputs["input_ids"] == model.config.prefix_token_index).sum() == 6
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


@pytest.fixture(autouse=True)
def _compiler():
    """Nothing of another test's graphs; a mask of padding makes audio tokens whose number is known to data only."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("modality", MODALITIES)
def test_one_graph(modality):
    model, inputs, expected = traced(modality)
    with torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_one_graph_without_padding_and_with_a_static_cache():
    model, inputs, expected = traced("audio_image", trim_padding=True)
    assert "input_features_mask" in inputs
    cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    with torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs, cache=cache).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("trim", [False, True])
def test_export(modality, trim):
    model, inputs, expected = traced(modality, trim_padding=trim)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs | {"use_cache": False})
        logits = program.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_transformers_exporter():
    """With every axis left open, and in the parts that generation needs."""
    model, inputs, expected = traced("audio_image")
    exporter = DynamoExporter()
    with torch.no_grad():
        exported = exporter.export(model, inputs, config=DynamoConfig(dynamic=True))
        torch.testing.assert_close(exported(**inputs).logits, expected, atol=1e-5, rtol=0)
        parts = exporter.export_for_generation(model, inputs, config=DynamoConfig(dynamic=False))
    assert {"language_model", "lm_head", "decode"} <= set(parts.components)
