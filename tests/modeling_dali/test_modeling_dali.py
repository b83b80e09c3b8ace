"""The model: LLaVA's path untouched, sound heard, batches equal to their rows."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
)

from modeling_dali import DaliAudioModel, DaliForConditionalGeneration
from modeling_dali.audio_encoder_dali import sincos_positions
from tests.tiny import tiny_audio_config, tiny_dali, tiny_llava, tiny_tokenizer

TOWERS = ["clip", "siglip"]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def sound(seed=0, samples=8_000):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def prepare(processor, rows, **kwargs):
    """Inputs for rows of (modality, picture seed, sound seed)."""
    return processor(
        text=[processor.caption_prompt(modality) for modality, *_ in rows],
        images=[picture(p) for modality, p, _ in rows if "image" in modality] or None,
        audio=[sound(a) for modality, _, a in rows if "audio" in modality] or None,
        sampling_rate=16_000,
        return_tensors="pt",
        **kwargs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA's path


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layers", [-2, -1, [-2, -1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_image_and_text_logits_are_llavas(tower, layers, strategy):
    if (tower, strategy) == ("siglip", "default"):
        pytest.skip("SigLIP has no class token to leave out")
    llava = tiny_llava(tower, vision_feature_layer=layers, vision_feature_select_strategy=strategy)
    dali = DaliForConditionalGeneration.from_llava(copy.deepcopy(llava), audio_config=tiny_audio_config())
    tokens = 16 + (tower == "clip" and strategy == "full")
    ids = torch.tensor([[1, 7, *[4] * tokens, 9, 10, 11], [1, 8, *[4] * tokens, 12, 13, 14]])
    mask = torch.ones_like(ids)
    mask[0, :1] = 0
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = llava(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        assert torch.equal(dali(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits, expected)
        text = ids.masked_fill(ids == 4, 15)
        assert torch.equal(dali(input_ids=text).logits, llava(input_ids=text).logits)
        generated = dali.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=5)
        assert torch.equal(
            generated, llava.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=5)
        )


@pytest.mark.parametrize("tower", TOWERS)
def test_a_llava_checkpoint_loads_whole(tower, tmp_path):
    llava = tiny_llava(tower)
    llava.save_pretrained(tmp_path)
    dali = DaliForConditionalGeneration.from_llava(tmp_path, audio_config=tiny_audio_config())
    ids = torch.tensor([[1, *[4] * 16, 9, 10, 11]])
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(dali(ids, pixels).logits, llava(ids, pixels).logits)


def test_an_incomplete_llava_checkpoint_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_llava().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("lm_head.weight")]
    del weights[name]
    weights["stray.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing in the checkpoint: lm_head.weight[\s\S]*without a place.*stray.weight"
    ):
        DaliForConditionalGeneration.from_llava(tmp_path, audio_config=tiny_audio_config())


def test_a_llava_checkpoint_is_not_taken_for_a_dali_one(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"audio_tower|do not fit|model type"):
        DaliForConditionalGeneration.from_pretrained(tmp_path)


def test_projectors_are_two_modules():
    model, _ = tiny_dali()
    image, audio = model.model.multi_modal_projector, model.model.audio_projector
    for ours, theirs in zip(audio.parameters(), image.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Sound


def test_audio_features_have_the_stated_shapes():
    model, processor = tiny_dali()
    features = prepare(processor, [("audio", 0, 0), ("audio", 0, 1)])["input_features"]
    output = model.get_audio_features(features)
    assert output.last_hidden_state.shape == (2, 32, 40)
    assert output.pooler_output.shape == (2, 32, 32)
    audio_tokens = model.get_audio_tokens(features)
    assert audio_tokens.shape == (2, 32, 24)
    assert torch.equal(audio_tokens, model.model.audio_projection(output.last_hidden_state))
    assert torch.equal(output.pooler_output, model.model.audio_projector(audio_tokens))


def test_default_sizes_are_the_papers():
    from modeling_dali import DaliConfig

    config = DaliConfig()
    assert config.audio_seq_length == 512 and config.audio_config.grid == (8, 64)
    with torch.device("meta"):
        model = DaliForConditionalGeneration(config)
        features = torch.zeros(2, 1024, 128)
        output = model.get_audio_features(features)
        assert output.last_hidden_state.shape == (2, 512, 768)
        assert model.get_audio_tokens(features).shape == (2, 512, 1024)
        assert output.pooler_output.shape == (2, 512, 4096)
        assert model.get_image_tokens(torch.zeros(1, 3, 336, 336)).shape == (1, 576, 1024)


def test_image_tokens_are_what_the_projector_reads():
    model, _ = tiny_dali()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(model.get_image_tokens(pixels))
        torch.testing.assert_close(projected, torch.stack(model.get_image_features(pixels).pooler_output))


def test_tokens_are_frequency_major():
    """A patch that changes in the spectrogram changes the token `row * columns + column` of the patch embedding."""
    tower = DaliAudioModel(tiny_audio_config())
    features = torch.zeros(1, 64, 32)
    changed = features.clone()
    changed[0, 8 * 5 : 8 * 6, 8 * 2 : 8 * 3] = 1.0  # time patch 5, frequency patch 2
    embed = lambda x: tower.patch_embedding(x.transpose(1, 2)[:, None]).flatten(2)  # noqa: E731
    difference = (embed(changed) - embed(features)).abs().sum(1)[0]
    assert difference.nonzero().flatten().tolist() == [2 * 8 + 5]


def test_positions_are_maes():
    """Against the loop of MAE's paper code: first half columns (time), second half rows, sines then cosines."""
    rows, columns, width = 4, 6, 16
    expected = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for half, position in enumerate((column, row)):
                for i in range(width // 4):
                    angle = position / 10_000 ** (i / (width // 4))
                    expected[row * columns + column, half * width // 2 + i] = np.sin(angle)
                    expected[row * columns + column, half * width // 2 + width // 4 + i] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(rows, columns, width)[0].numpy(), expected, atol=1e-6)


def test_encoder_equals_a_plain_vit():
    """The encoder against torch's own transformer layers with the same weights."""
    torch.manual_seed(0)
    config = tiny_audio_config()
    tower = DaliAudioModel(config).eval()
    features = torch.randn(3, 64, 32)
    x = torch.nn.functional.unfold(features.transpose(1, 2)[:, None], 8, stride=8).transpose(1, 2)
    x = x @ tower.patch_embedding.weight.flatten(1).T + tower.patch_embedding.bias
    x = x + tower.positions + tower.modality
    for layer in tower.layers:
        plain = torch.nn.TransformerEncoderLayer(40, 2, 80, 0.0, "gelu", 1e-5, batch_first=True, norm_first=True)
        plain.load_state_dict(
            {
                "self_attn.in_proj_weight": layer.attn.qkv.weight,
                "self_attn.in_proj_bias": layer.attn.qkv.bias,
                "self_attn.out_proj.weight": layer.attn.proj.weight,
                "self_attn.out_proj.bias": layer.attn.proj.bias,
                "linear1.weight": layer.fc1.weight,
                "linear1.bias": layer.fc1.bias,
                "linear2.weight": layer.fc2.weight,
                "linear2.bias": layer.fc2.bias,
                "norm1.weight": layer.norm1.weight,
                "norm1.bias": layer.norm1.bias,
                "norm2.weight": layer.norm2.weight,
                "norm2.bias": layer.norm2.bias,
            }
        )
        x = plain.eval()(x)
    torch.testing.assert_close(tower(features).last_hidden_state, tower.norm(x), atol=1e-5, rtol=1e-5)


def test_another_sound_gives_another_output():
    model, processor = tiny_dali()
    one, other = prepare(processor, [("audio", 0, 0)]), prepare(processor, [("audio", 0, 1)])
    assert torch.equal(one["input_ids"], other["input_ids"])
    with torch.no_grad():
        difference = (model(**one).logits - model(**other).logits).abs().max()
    assert difference > 1e-2


def test_the_order_of_sounds_matters():
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0), ("audio", 0, 1)])
    swapped = dict(inputs) | {"input_features": inputs["input_features"].flip(0)}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits.flip(0), model(**swapped).logits, atol=1e-5)


MIXED = [("audio", 0, 0), ("image", 1, 0), ("audio_image", 2, 1), ("audio", 0, 2)]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("trim", [False, True])
def test_a_mixed_batch_equals_its_rows(tower, trim):
    model, processor = tiny_dali(tower)
    texts = [processor.caption_prompt(modality) for modality, *_ in MIXED]
    texts[3] = texts[3].replace("Describe", "What can be heard in this scene ? Describe")
    sounds = {0: sound(0, 8_000), 2: sound(1, 3_000), 3: sound(2, 25_000)}  # the last one is three windows
    pictures = {1: picture(1), 2: picture(2)}

    def inputs(rows):
        return processor(
            text=[texts[i] for i in rows],
            images=[pictures[i] for i in rows if i in pictures] or None,
            audio=[sounds[i] for i in rows if i in sounds] or None,
            sampling_rate=16_000,
            trim_padding=trim,
            return_tensors="pt",
        )

    batch = inputs(range(4))
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
        beams = model.generate(**batch, max_new_tokens=8, num_beams=3, do_sample=False)
        for i in range(4):
            alone = inputs([i])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[i, -length:], model(**alone).logits[0], atol=1e-5, rtol=1e-5)
            text = model.generate(**alone, max_new_tokens=8, do_sample=False)
            assert processor.decode_captions(text, alone) == processor.decode_captions(generated, batch)[i : i + 1]
            text = model.generate(**alone, max_new_tokens=8, num_beams=3, do_sample=False)
            assert processor.decode_captions(text, alone) == processor.decode_captions(beams, batch)[i : i + 1]


def test_num_return_sequences_keeps_sounds_with_their_rows():
    model, processor = tiny_dali()
    batch = processor(
        text=[processor.caption_prompt("audio")] * 2,
        audio=[sound(0, 25_000), sound(1)],  # three windows and one
        sampling_rate=16_000,
        return_tensors="pt",
    )
    greedy = model.generate(**batch, max_new_tokens=8, do_sample=False)
    beams = model.generate(**batch, max_new_tokens=8, num_beams=4, num_return_sequences=2, do_sample=False)
    best = model.generate(**batch, max_new_tokens=8, num_beams=4, do_sample=False)
    assert torch.equal(beams[::2][:, : best.shape[1]], best)
    torch.manual_seed(0)
    cold = model.generate(**batch, max_new_tokens=8, do_sample=True, temperature=1e-4, num_return_sequences=3)
    for i in range(3):
        assert torch.equal(cold[i::3], greedy)


@pytest.mark.parametrize("name", ["input_feature", "audio_features", "input_values", "pixel_value"])
def test_an_unknown_keyword_raises(name):
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0)])
    with pytest.raises(TypeError, match=name):
        model(**inputs, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **{name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i.pop("input_features"), "32 <audio> placeholders, but there are 0"),
        (lambda i: i.pop("pixel_values"), "16 <image> placeholders, but there are 0"),
        (lambda i: i.update(input_features=i["input_features"].repeat(2, 1, 1)), "32 <audio>.* there are 64"),
        (lambda i: i.update(pixel_values=i["pixel_values"].repeat(3, 1, 1, 1)), "16 <image>.* there are 48"),
        (lambda i: i.update(input_ids=i["input_ids"].masked_fill(i["input_ids"] == 4, 9)), "0 <image>.* there are 16"),
        (lambda i: i.update(input_features_mask=torch.zeros(1, 64)), "32 <audio>.* there are 0"),
    ],
)
def test_placeholders_and_features_must_be_as_many(edit, message):
    model, processor = tiny_dali()
    inputs = dict(prepare(processor, [("audio_image", 0, 0)]))
    edit(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_placeholders_are_found_by_ids_and_by_embeddings():
    model, processor = tiny_dali()
    ids = prepare(processor, MIXED)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    for given in (ids, None):
        image, audio = model.model.get_placeholder_mask(given, embeddings)
        assert torch.equal(image[..., 0], ids == model.config.image_token_index)
        assert torch.equal(audio[..., 0], ids == model.config.audio_token_index)
    features = torch.zeros(int(audio.sum()), 32)
    model.model.get_placeholder_mask(ids, embeddings, audio_features=features)
    with pytest.raises(ValueError, match="96 <audio> placeholders, but there are 95"):
        model.model.get_placeholder_mask(ids, embeddings, audio_features=features[1:])
    with pytest.raises(ValueError, match="32 <image> placeholders, but there are 96"):
        model.model.get_placeholder_mask(ids, embeddings, image_features=features)


def test_wrong_spectrogram_size_is_named():
    model, processor = tiny_dali()
    inputs = dict(prepare(processor, [("audio", 0, 0)]))
    inputs["input_features"] = inputs["input_features"][:, :32]
    with pytest.raises(ValueError, match=r"64 frames, 32 mel bins\], its shape is \(1, 32, 32\)"):
        model(**inputs)


def test_loss_is_that_of_the_answer_alone():
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0), ("audio_image", 1, 1)], suffix=["a dog barks .", "rain falls"])
    labels = inputs.pop("labels")
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        logits = model(**inputs).logits
    scores = logits[:, :-1].log_softmax(-1)
    terms = [-scores[row, column - 1, labels[row, column]] for row, column in (labels != -100).nonzero().tolist()]
    assert len(terms) == 5 + 3  # words, and the end of the text
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_shift_labels_are_labels_one_position_earlier():
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0)], suffix=["a dog barks ."])
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)
        torch.testing.assert_close(model(**inputs, labels=labels * 0, shift_labels=shifted).loss, expected)


def test_outputs_of_the_encoders():
    model, processor = tiny_dali()
    model.set_attn_implementation("eager")
    inputs = prepare(processor, [("audio_image", 0, 0), ("audio_image", 1, 1)])
    with torch.no_grad():
        plain = model(**inputs)
        full = model(**inputs, output_hidden_states=True, output_attentions=True)
    # Nothing is kept that nobody asked for: of LLaVA's image tower, the layer that the projector reads.
    assert plain.audio_outputs.hidden_states is None and plain.image_outputs.attentions is None
    assert [state is not None for state in plain.image_outputs.hidden_states] == [False, False, True, False]
    assert len(full.audio_outputs.hidden_states) == 3 and len(full.audio_outputs.attentions) == 2
    assert len(full.image_outputs.attentions) == 3 and None not in full.image_outputs.hidden_states
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    torch.testing.assert_close(full.logits, plain.logits)
    torch.testing.assert_close(
        plain.audio_outputs.pooler_output, model.get_audio_features(inputs["input_features"]).pooler_output
    )


def test_tuples_where_the_configuration_asks_for_them():
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0)])
    with torch.no_grad():
        expected = model(**inputs).logits
        features = model.get_audio_features(inputs["input_features"])
        model.config.return_dict = False
        assert torch.equal(model(**inputs)[0], expected)
        assert torch.equal(model.get_audio_features(inputs["input_features"])[1], features.pooler_output)
        assert torch.equal(model(**inputs, return_dict=True).logits, expected)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' common tests


@pytest.mark.parametrize("tower", TOWERS)
def test_eager_matches_sdpa_inference(tower):
    model, processor = tiny_dali(tower)
    inputs = prepare(processor, MIXED)
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.model.audio_tower.config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs["eager"][mask], outputs["sdpa"][mask], atol=1e-5, rtol=1e-5)


def test_training_gradient_checkpointing():
    model, processor = tiny_dali()
    model.train()
    inputs = prepare(processor, [("audio_image", 0, 0)], suffix=["a dog barks"])

    def gradients():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.model.audio_tower.layers[0].gradient_checkpointing
    checkpointed_loss, checkpointed = gradients()
    assert torch.equal(loss, checkpointed_loss) and plain.keys() == checkpointed.keys()
    assert any("audio_tower.layers.0" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_continues_the_text_by_either_name(name):
    """transformers 5.24 says `cache`; before, and in PEFT 0.21, it is `past_key_values`."""
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio", 0, 0)])
    answer = torch.tensor([[9, 10]])
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        expected = model(**whole).logits[:, -2:]
        start = model(**inputs, use_cache=True)
        rest = model(input_ids=answer, attention_mask=whole["attention_mask"], **{name: start.cache})
    assert rest.logits.shape == expected.shape  # what has been heard is not read again
    torch.testing.assert_close(rest.logits, expected)
    assert rest.cache.get_seq_length() == whole["input_ids"].shape[1]


@pytest.mark.parametrize("tower", TOWERS)
def test_save_load(tower, tmp_path):
    model, processor = tiny_dali(tower, prefix=3)
    model.save_pretrained(tmp_path)
    loaded, info = DaliForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    inputs = prepare(processor, MIXED)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), DaliForConditionalGeneration)


def test_missing_weights_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = tiny_dali()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.audio_projection.weight"]
    weights["model.audio_tower.norm.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"missing in the checkpoint: model.audio_projection.weight\n- of another shape: model.audio_tower.norm"
    with pytest.raises(ValueError, match=message):
        DaliForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("tower", TOWERS)
def test_resize_tokens_embeddings(tower):
    model, processor = tiny_dali(tower)
    inputs = prepare(processor, MIXED)
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(120)
        after = model(**inputs).logits
    assert after.shape[-1] == 120 and model.config.text_config.vocab_size == 120
    torch.testing.assert_close(after[..., : before.shape[-1]], before, atol=1e-5, rtol=1e-5)
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


@pytest.mark.parametrize("prefix", [0, 3])
def test_inputs_embeds_matches_input_ids(prefix):
    model, processor = tiny_dali(prefix=prefix)
    inputs = dict(prepare(processor, MIXED))
    with torch.no_grad():
        expected = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), text[:, length:])


def test_placeholders_may_lie_outside_the_vocabulary():
    dali = DaliForConditionalGeneration.from_llava(tiny_llava(), audio_config=tiny_audio_config())
    assert dali.config.audio_token_index == dali.get_input_embeddings().num_embeddings
    ids = torch.tensor([[1, *[dali.config.audio_token_index] * 32, 9]])
    features = torch.randn(1, 64, 32)
    with torch.no_grad():
        logits = dali(input_ids=ids, input_features=features).logits
        assert logits.isfinite().all()
        assert not torch.equal(logits, dali(input_ids=ids, input_features=features + 1).logits)
        dali.generate(input_ids=ids, input_features=features, max_new_tokens=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_in_half_precision(dtype, tmp_path):
    model, processor = tiny_dali(prefix=2)
    model.save_pretrained(tmp_path)
    half = DaliForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    inputs = prepare(processor, MIXED)
    with torch.no_grad():
        logits, expected = half(**inputs).logits, model(**inputs).logits
    assert logits.dtype == dtype
    mask = inputs["attention_mask"].bool()
    cosine = torch.nn.functional.cosine_similarity(logits[mask].float(), expected[mask], dim=-1)
    assert cosine.min() > 0.98
    half.generate(**inputs, max_new_tokens=3)


def test_can_init_all_missing_weights(tmp_path):
    """Every parameter and buffer gets a value from `_init_weights` when it starts from uninitialised memory."""
    model, _ = tiny_dali(prefix=3)
    with torch.device("meta"):
        empty = DaliForConditionalGeneration(model.config)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
            tensor._is_hf_initialized = False
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.initialize_weights()
    bad = [name for name, parameter in empty.named_parameters() if not parameter.isfinite().all()]
    assert not bad
    assert torch.equal(empty.model.audio_tower.positions, model.model.audio_tower.positions)
    assert empty.model.prefix.std() > 5e-5 and empty.model.audio_tower.modality.std() > 1e-3


def test_hidden_states_and_attentions_of_the_encoder():
    tower = DaliAudioModel(tiny_audio_config()).eval()
    tower.set_attn_implementation("eager")
    output = tower(torch.randn(2, 64, 32), output_hidden_states=True, output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 2, 32, 32)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 32, 40)


# ---------------------------------------------------------------------------------------------------------------------
# Building


def test_from_llava_takes_an_audio_model():
    encoder = DaliAudioModel(tiny_audio_config(hidden_size=48))
    model = DaliForConditionalGeneration.from_llava(tiny_llava(), encoder)
    assert model.model.audio_tower is encoder
    assert model.model.audio_projection.in_features == 48


def test_from_llava_copies_dtype_and_mode():
    llava = tiny_llava().to(torch.bfloat16).train()
    model = DaliForConditionalGeneration.from_llava(llava, audio_config=tiny_audio_config())
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tower", TOWERS)
def test_media_tokens_are_told_apart_by_their_embeddings(tower):
    llava = tiny_llava(tower)
    with torch.no_grad():
        llava.get_input_embeddings().weight[60:] = 0.0  # spare rows, as some checkpoints have them
    model = DaliForConditionalGeneration.from_llava(
        llava, audio_config=tiny_audio_config(), tokenizer=tiny_tokenizer()
    )
    weight = model.get_input_embeddings().weight
    for index in (model.config.audio_token_index, model.config.prefix_token_index):
        assert (weight == weight[index]).all(-1).sum() == 1


def test_embeddings_grow_where_the_tokens_need_it():
    llava = tiny_llava(vocabulary=64)
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 64
    model = DaliForConditionalGeneration.from_llava(llava, audio_config=tiny_audio_config(), tokenizer=tokenizer)
    assert model.get_input_embeddings().num_embeddings == 66 == model.config.text_config.vocab_size


def test_a_new_model_builds_each_part_once(monkeypatch):
    from transformers import CLIPVisionModel, LlamaModel

    built = []
    for part in (CLIPVisionModel, LlamaModel, DaliAudioModel):
        start = part.__init__
        monkeypatch.setattr(
            part, "__init__", lambda self, *args, start=start: (built.append(type(self)), start(self, *args))[1]
        )
    config = tiny_dali()[0].config
    built.clear()
    DaliForConditionalGeneration(config)
    assert sorted(part.__name__ for part in built) == ["CLIPVisionModel", "DaliAudioModel", "LlamaModel"]


def test_gradient_checkpointing_by_configuration():
    config = tiny_dali()[0].config
    config.gradient_checkpointing = True
    model = DaliForConditionalGeneration(config)
    for part in (model.model.vision_tower.encoder, model.model.language_model, model.model.audio_tower):
        assert part.layers[0].gradient_checkpointing


def test_from_llava_shares_no_configuration():
    llava = tiny_llava()
    llava.set_attn_implementation({"": "eager", "vision_config": "sdpa", "text_config": "eager"})
    encoder = DaliAudioModel(tiny_audio_config())
    before = llava.config.to_dict()
    model = DaliForConditionalGeneration.from_llava(llava, encoder, tokenizer=tiny_tokenizer())
    config, parts = model.config, ("vision_config", "text_config")
    assert config.vision_config._attn_implementation == "sdpa" and config.text_config._attn_implementation == "eager"
    for name in parts:
        assert getattr(config, name) is not getattr(llava.config, name)
    assert config.audio_config is not encoder.config or encoder.config is model.model.audio_tower.config
    assert model.model.vision_tower.config is config.vision_config
    assert model.model.language_model.layers[0].self_attn.config is config.text_config
    model.set_attn_implementation("sdpa")
    model.resize_token_embeddings(200)
    assert model.model.language_model.config.vocab_size == 200
    assert llava.config.to_dict() == before and llava.config.text_config._attn_implementation == "eager"


def test_options_for_loading_need_something_to_load():
    with pytest.raises(TypeError, match="dtype"):
        DaliForConditionalGeneration.from_llava(tiny_llava(), dtype=torch.float16)


def test_llava_class_is_still_what_it_was():
    assert issubclass(DaliForConditionalGeneration, LlavaForConditionalGeneration)
