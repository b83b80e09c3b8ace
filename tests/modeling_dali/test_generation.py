"""Generation: the same text by every road, and no text from broken weights."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from modeling_dali import DaliForConditionalGeneration
from tests.modeling_dali.test_modeling_dali import MIXED, prepare
from tests.tiny import tiny_audio_config, tiny_dali, tiny_llava, tiny_tokenizer


def dali(tower="clip", **kwargs):
    """A model that writes no `<image>`, as random weights may."""
    model, processor = tiny_dali(tower, **kwargs)
    model.generation_config.suppress_tokens += [model.config.image_token_index]
    return model, processor


def write(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, **kwargs)


def test_static_cache_and_none():
    model, processor = dali()
    inputs = prepare(processor, MIXED)
    dynamic = write(model, inputs)
    assert torch.equal(write(model, inputs, cache_implementation="static"), dynamic)
    assert torch.equal(write(model, inputs, use_cache=False), dynamic)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("modality", ["audio", "image", "audio_image"])
def test_a_model_assists_itself(modality, prefix):
    model, processor = dali(prefix=prefix)
    inputs = prepare(processor, [(modality, 0, 0)])
    expected = write(model, inputs)
    assert torch.equal(write(model, inputs, assistant_model=model), expected)
    assert torch.equal(write(model, inputs, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(write(model, inputs, prefill_chunk_size=7), expected)


def test_other_assistants():
    model, processor = dali()
    inputs = prepare(processor, [("audio_image", 0, 0)])
    expected = write(model, inputs)
    text_only = LlamaForCausalLM(model.config.text_config).eval()
    for assistant in (dali("siglip")[0], tiny_llava(), text_only):
        assert torch.equal(write(model, inputs, assistant_model=assistant), expected)
    llava = tiny_llava()
    picture = prepare(processor, [("image", 0, 0)])
    assert torch.equal(write(llava, picture, assistant_model=model), write(llava, picture))


def test_an_assistant_sees_and_hears():
    model, processor = dali(prefix=3)
    inputs = prepare(processor, [("audio_image", 0, 0)])
    assistant = copy.deepcopy(model)
    read = {model: [], assistant: []}
    for listener, embeddings in read.items():
        listener.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, embeddings=embeddings: embeddings.append(kwargs["inputs_embeds"]),
            with_kwargs=True,
        )
    write(model, inputs, assistant_model=assistant)
    length = inputs["input_ids"].shape[1]
    assert read[assistant][0].shape[1] == length
    assert torch.equal(read[assistant][0], read[model][0][:, :length])


def test_an_assistant_of_another_width_is_an_error():
    model, processor = dali()
    llava = tiny_llava()
    config = copy.deepcopy(llava.config)
    config.text_config.hidden_size = 64
    wide = DaliForConditionalGeneration.from_llava(
        type(llava)(config), audio_config=tiny_audio_config(), tokenizer=tiny_tokenizer()
    ).eval()
    with pytest.raises(ValueError, match="features are 32 wide, the language model 64"):
        write(model, prepare(processor, [("audio", 0, 0)]), assistant_model=wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("beams", [1, 3])
def test_weights_that_are_not_finite_write_nothing(value, beams):
    model, processor = dali()
    with torch.no_grad():
        model.model.audio_projection.bias[0] = value
    inputs = prepare(processor, [("audio", 0, 0)])
    with pytest.raises(ValueError, match="logits are not finite"):
        write(model, inputs, num_beams=beams)
    write(model, prepare(processor, [("image", 0, 0)]), num_beams=beams)  # what does not hear them is whole
