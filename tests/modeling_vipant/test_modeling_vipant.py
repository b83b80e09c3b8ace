import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_vipant import VipAntAudioConfig, VipAntConfig, VipAntForAudioClassification, VipAntModel
from modeling_vipant.modeling_vipant import VipAntClassificationHead, interpolate_positions, slice_positions
from tests.released import seeded
from tests.tiny_vipant import NUM_BINS, NUM_FRAMES, tiny_clip, tiny_vipant


@pytest.fixture(scope="module")
def model():
    return tiny_vipant()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 500, (3, 9), generator=generator)
    input_ids[:, -2:] = 513  # end of text, then one token of padding
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, -1] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(3, 3, 28, 28, generator=generator),
        "input_features": torch.randn(3, NUM_FRAMES, NUM_BINS, generator=generator),
    }


def test_defaults_are_the_papers():
    config = VipAntConfig()
    assert config.audio_config.grid == (61, 5)
    assert config.audio_config.grid_for(1800) == (111, 5)
    assert (config.audio_config.hidden_size, config.projection_dim) == (768, 512)
    assert config.vision_config.patch_size == 32


def test_image_and_text_equal_clip(model, inputs):
    clip = tiny_clip()
    with torch.no_grad():
        ours = model(**inputs)
        theirs = clip(**{name: value for name, value in inputs.items() if name != "input_features"})
    torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logits_per_image, theirs.logits_per_image, atol=2e-6, rtol=0)


def test_a_clip_checkpoint_loads_by_name(tmp_path, inputs):
    clip = tiny_clip(seed=3)
    clip.save_pretrained(tmp_path)
    model = VipAntModel.from_clip(str(tmp_path), num_frames=NUM_FRAMES, num_mel_bins=NUM_BINS).eval()
    with torch.no_grad():
        expected = F.normalize(clip.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
        got = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def bilinear(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear resize of `[rows, columns, width]`, pixel centres at half integers, borders held (float64)."""

    def weights(old: int, new: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for i in range(new):
            position = np.clip((i + 0.5) * old / new - 0.5, 0, old - 1)
            low = int(np.floor(position))
            high = min(low + 1, old - 1)
            matrix[i, low] += 1 - (position - low)
            matrix[i, high] += position - low
        return matrix

    return np.einsum("ai,bj,ijw->abw", weights(grid.shape[0], rows), weights(grid.shape[1], columns), grid)


def test_audio_tower_from_clip_follows_the_formula(inputs):
    clip = tiny_clip(image_size=56)  # 7 x 7 positions, as ViT-B/32 has
    model = VipAntModel.from_clip(clip, num_frames=NUM_FRAMES, num_mel_bins=NUM_BINS)
    config = model.config.audio_config
    assert (config.grid, tuple(config.patch_stride)) == ((15, 5), (4, 6))

    kernel = clip.vision_model.embeddings.patch_embedding.weight.detach().double().numpy().mean(1)  # [width, 8, 8]
    positions = clip.vision_model.embeddings.position_embedding.weight.detach().double().numpy()
    patch_positions = bilinear(positions[1:].reshape(7, 7, -1), 15, 5)
    features = inputs["input_features"].double().numpy()
    expected = np.zeros((3, 1 + 75, 48))
    expected[:, 0] = clip.vision_model.embeddings.class_embedding.detach().double().numpy() + positions[0]
    for time in range(15):
        for band in range(5):
            patch = features[:, 4 * time : 4 * time + 8, 6 * band : 6 * band + 8]
            expected[:, 1 + 5 * time + band] = np.einsum("bij,wij->bw", patch, kernel) + patch_positions[time, band]
    with torch.no_grad():
        tokens = model.audio_model.embeddings(inputs["input_features"])
    np.testing.assert_allclose(tokens.numpy(), expected, atol=1e-5)

    with torch.no_grad():  # from the tokens on, it is CLIP's own image tower
        hidden = clip.vision_model.encoder(inputs_embeds=clip.vision_model.pre_layrnorm(tokens)).last_hidden_state
        pooled = clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 0]))
        embeds = model.get_audio_features(inputs["input_features"]).pooler_output
    torch.testing.assert_close(embeds, F.normalize(pooled, dim=-1), atol=1e-5, rtol=0)


def test_from_clip_shares_no_memory_with_clip(inputs):
    clip = tiny_clip()
    before = clip.get_image_features(inputs["pixel_values"]).pooler_output
    model = VipAntModel.from_clip(clip, num_frames=NUM_FRAMES, num_mel_bins=NUM_BINS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(clip.get_image_features(inputs["pixel_values"]).pooler_output, before)


def test_from_clip_refuses_sizes_the_image_tower_does_not_have():
    with pytest.raises(ValueError, match=r"hidden_size=64 contradicts CLIP's image tower, which has 48"):
        VipAntModel.from_clip(tiny_clip(), hidden_size=64)


@pytest.mark.parametrize("num_frames", [8, 40, 115, 200])
def test_other_lengths_interpolate_positions(model, num_frames):
    time, band = model.config.audio_config.grid_for(num_frames)
    positions = model.audio_model.embeddings.position_embedding.weight.detach()
    stored_time = model.config.audio_config.grid[0]
    expected = bilinear(positions[1:].double().numpy().reshape(stored_time, band, -1), time, band)
    got = interpolate_positions(positions, (stored_time, band), (time, band))
    np.testing.assert_allclose(got[1:].reshape(time, band, -1), expected, atol=1e-5)


@pytest.mark.parametrize("way", ["slice", "interpolate"])
@pytest.mark.parametrize("num_frames", [8, 40, 60, 64, 115])
def test_positions_of_other_lengths(num_frames, way):
    model = VipAntModel.from_clip(
        tiny_clip(), num_frames=NUM_FRAMES, num_mel_bins=NUM_BINS, shorter_positions=way
    ).audio_model.embeddings
    time, band = model.config.grid_for(num_frames)
    with torch.no_grad():
        patches = model.patch_embedding(torch.zeros(1, 1, num_frames, NUM_BINS))
        tokens = model(torch.zeros(1, num_frames, NUM_BINS))[0]
    assert not patches.any() and tokens.shape == (1 + time * band, 48)
    stored = model.position_embedding.weight.detach()
    expected = interpolate_positions(stored, model.config.grid, (time, band))[1:]
    if way == "slice" and num_frames < NUM_FRAMES:
        first = {8: 6, 40: 6, 60: 1}[num_frames]  # from time step 6, or the last steps where fewer follow
        expected = stored[1:].view(15, band, 48)[first : first + time].flatten(0, 1)
    torch.testing.assert_close(tokens[1:], expected)
    torch.testing.assert_close(tokens[0], model.class_embedding.detach() + stored[0])


def test_shorter_spectrograms_have_the_authors_positions():
    """Rows that `load_pos_embedding` (cvap/module/encoder/audio_head.py) gives for 30 and 55 of 61 time steps."""
    rows = torch.arange(306.0)[:, None]
    for steps, last in ((30, 180.0), (55, 305.0)):
        got = slice_positions(rows, (61, 5), (steps, 5))[:, 0]
        assert len(got) == 1 + 5 * steps and got[:3].tolist() == [0.0, 31.0, 32.0] and got[-1] == last


@pytest.mark.parametrize("shape", [(2, 7, NUM_BINS), (2, NUM_FRAMES, 128)])
def test_spectrograms_of_a_wrong_size_are_refused(model, shape):
    with pytest.raises(ValueError, match="at least 8 frames x 32 bins"):
        model.get_audio_features(torch.zeros(shape))


def test_features_have_unit_length_and_differ(model, inputs):
    for embeds in (
        model.get_audio_features(inputs["input_features"]).pooler_output,
        model.get_image_features(inputs["pixel_values"]).pooler_output,
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
    ):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
        assert (embeds[0] - embeds[1]).abs().max() > 1e-3


def test_batch_equals_single(model, inputs):
    batch = model.get_audio_features(inputs["input_features"]).pooler_output
    for i in range(3):
        single = model.get_audio_features(inputs["input_features"][i : i + 1]).pooler_output
        torch.testing.assert_close(single[0], batch[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kinds",
    [
        ("input_features", "input_ids"),
        ("input_features", "pixel_values"),
        ("input_ids", "pixel_values"),
        ("input_features", "input_ids", "pixel_values"),
    ],
)
def test_logits_and_loss_of_any_inputs(inputs, kinds):
    model = tiny_vipant()
    model.audio_text_logit_scale.data.fill_(math.log(11.0))
    model.audio_image_logit_scale.data.fill_(math.log(7.0))
    model.logit_scale.data.fill_(math.log(5.0))
    with torch.no_grad():
        output = model(**{kind: inputs[kind] for kind in kinds}, return_loss=True)
    audio, text, image = output.audio_embeds, output.text_embeds, output.image_embeds
    pairs = {
        "audio text": (audio, text, 11.0),
        "audio image": (audio, image, 7.0),
        "image text": (image, text, 5.0),
    }
    loss, present = 0.0, {}
    for name, (a, b, factor) in pairs.items():
        if a is not None and b is not None:
            similarity = factor * (a.double() @ b.double().T)
            loss -= (similarity.log_softmax(1).diagonal() + similarity.log_softmax(0).diagonal()).mean().item()
            present[name] = similarity.float()
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    for got, *candidates in (
        (output.logits_per_audio, present.get("audio text"), present.get("audio image")),
        (output.logits_per_text, present.get("audio text"), present.get("image text")),
        (output.logits_per_image, present.get("image text"), present.get("audio image")),
    ):
        expected = next((candidate for candidate in candidates if candidate is not None), None)
        if expected is None:
            assert got is None
        elif torch.allclose(got, expected, atol=1e-5):
            pass
        else:
            torch.testing.assert_close(got, expected.T, atol=1e-5, rtol=0)


def test_tuple_output_starts_with_the_loss(model, inputs):
    output = model(**inputs, return_loss=True, return_dict=False)
    assert output[0].ndim == 0 and output[1].shape == (3, 3)


def test_hidden_states_are_recorded(model, inputs):
    output = model(input_features=inputs["input_features"], output_hidden_states=True)
    assert len(output.audio_model_output.hidden_states) == 3


def test_wrong_calls_say_what_is_wrong(model, inputs):
    with pytest.raises(ValueError, match="needs input_features, pixel_values or input_ids"):
        model()
    with pytest.raises(TypeError, match=r"unknown arguments: input_feature$"):
        model(input_ids=inputs["input_ids"], input_feature=inputs["input_features"])
    with pytest.raises(ValueError, match="as many of each"):
        model(input_ids=inputs["input_ids"][:2], input_features=inputs["input_features"], return_loss=True)
    with pytest.raises(ValueError, match="at least two kinds"):
        model(input_ids=inputs["input_ids"], return_loss=True)


def test_impossible_sizes_are_refused():
    with pytest.raises(Exception, match="does not fit"):
        VipAntAudioConfig(num_frames=16)
    with pytest.raises(Exception, match="not a multiple of 12 heads"):
        VipAntAudioConfig(hidden_size=770)


def test_classification_head_takes_over_the_audio_tower(tmp_path, inputs):
    model = tiny_vipant(seed=2)
    model.save_pretrained(tmp_path)
    classifier = VipAntForAudioClassification.from_pretrained(
        tmp_path, num_labels=5, problem_type="multi_label_classification"
    ).eval()
    embeds = model.get_audio_features(inputs["input_features"], normalize=False).pooler_output
    output = classifier(inputs["input_features"], labels=torch.tensor([[1, 0, 0, 1, 0]] * 3))
    torch.testing.assert_close(output.logits, classifier.classifier(embeds))
    logits = output.logits.double()
    expected = -torch.cat([logits[:, [0, 3]].sigmoid().log(), (-logits[:, [1, 2, 4]]).sigmoid().log()], 1).mean()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("problem_type", "loss"),
    [("single_label_classification", 15.976886749267578), ("multi_label_classification", 4.28193998336792)],
)
def test_head_gives_the_authors_loss(problem_type, loss):
    """Of ClassificationHead (loss_head.py) and BCELossHead (loss_more.py) with the same weights and embeddings."""
    config = VipAntConfig(projection_dim=24, num_labels=5, problem_type=problem_type)
    config.logit_scale_init_value = math.log(1 / 0.07)
    head = VipAntClassificationHead(config)
    single = problem_type.startswith("single")
    with torch.no_grad():
        head.norm.bias.copy_(seeded((24,), 50, 0.3))
        head.norm.weight.copy_(seeded((24,), 51, 0.3))
        if single:
            head.linear.bias.copy_(seeded((5,), 52, 0.3))
        head.linear.weight.copy_(seeded((5, 24), 53 if single else 52, 0.3))
    assert single or head.linear.bias is None
    logits = head(seeded((6, 24), 1, 2.0))
    if single:
        got = F.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 0]))
    else:
        got = F.binary_cross_entropy_with_logits(
            logits, torch.tensor([[1.0, 0, 0, 1, 0]] * 3 + [[0.0, 1, 1, 0, 1]] * 3)
        )
    assert got.item() == pytest.approx(loss, rel=1e-5)


def test_single_label_loss_takes_classes_and_mixtures(inputs):
    config = VipAntConfig(**tiny_vipant().config.to_dict() | {"num_labels": 4, "id2label": None, "label2id": None})
    config.problem_type = "single_label_classification"
    model = VipAntForAudioClassification(config).eval()
    labels = torch.tensor([0, 3, 1])
    by_class = model(inputs["input_features"], labels=labels).loss
    by_share = model(inputs["input_features"], labels=F.one_hot(labels, 4)).loss
    torch.testing.assert_close(by_class, by_share)
    logits = model(inputs["input_features"]).logits
    torch.testing.assert_close(by_class, -logits.log_softmax(1)[torch.arange(3), labels].mean())


def test_unknown_problem_type_is_refused():
    config = tiny_vipant().config
    config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type 'regression'"):
        VipAntForAudioClassification(config)


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vipant().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_features=inputs["input_features"], input_ids=inputs["input_ids"], return_loss=True).loss.backward()
        gradients.append(model.audio_model.embeddings.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_towers_give_the_same(model, inputs, place, tmp_path):
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["text_model", "vision_model", "audio_model"], place)
    projections = {"text_projection": "cpu", "visual_projection": "cpu", "audio_projection": "cpu"}
    scales = dict.fromkeys(["logit_scale", "audio_image_logit_scale", "audio_text_logit_scale"], "cpu")
    offloaded = VipAntModel.from_pretrained(
        tmp_path / "model",
        device_map=places | projections | scales,
        offload_folder=tmp_path / "offload",
    )
    longer = inputs | {"input_features": torch.randn(3, NUM_FRAMES + 16, NUM_BINS)}  # interpolates its positions
    with torch.no_grad():
        expected, got = model(**longer), offloaded(**longer)
    assert torch.equal(got.logits_per_audio, expected.logits_per_audio)
    assert torch.equal(got.logits_per_image, expected.logits_per_image)


def test_accelerate_offloads_every_submodule(model, inputs):
    from accelerate import cpu_offload

    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu", offload_buffers=True)
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits_per_audio, model(**inputs).logits_per_audio)
