import io
import sys
import types
import typing
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil

from modeling_vipant import VipAntModel, VipAntProcessor
from modeling_vipant.convert_original import convert, load_checkpoint, main
from modeling_vipant.modeling_vipant import interpolate_positions
from tests.tiny_vipant import tiny_clip, tiny_tokenizer

# The tiny CLIP's patches of 8 with strides (4, 6) on 128 bins and 64 frames.
GRID = (15, 21)


def released_tower(seed: int, positions: int, width: int = 48, hidden: int = 56, blocks: int = 2, channels: int = 3):
    """A tower with the released names and random values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {
        "pre_encoder.conv1.weight": random(width, channels, 8, 8),
        "pre_encoder.ln.weight": 1 + random(width),
        "pre_encoder.ln.bias": random(width),
        "misc.positional_embedding": random(positions, width),
        "misc.class_embedding": random(width),
        "post_encoder.ln.weight": 1 + random(width),
        "post_encoder.ln.bias": random(width),
        "post_encoder.proj": random(width, 24),
    }
    for block in range(blocks):
        shapes = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (hidden, width),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (width, hidden),
            "mlp.c_proj.bias": (width,),
        }
        state |= {f"encoder.resblocks.{block}.{name}": random(*shape) for name, shape in shapes.items()}
    return state


def reference_forward(state, features, stride, heads=4):
    """The tower as the paper's code computes it, in plain torch from the released tensors."""
    x = F.conv2d(features[:, None], state["pre_encoder.conv1.weight"].mean(1, keepdim=True), stride=stride)
    x = x.flatten(2).transpose(1, 2)
    width = x.shape[-1]
    x = torch.cat([state["misc.class_embedding"].expand(len(x), 1, -1), x], 1) + state["misc.positional_embedding"]
    x = F.layer_norm(x, (width,), state["pre_encoder.ln.weight"], state["pre_encoder.ln.bias"])
    for block in range(2):
        part = {
            name.removeprefix(f"encoder.resblocks.{block}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"encoder.resblocks.{block}.")
        }
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): t for n, t in part.items() if n.startswith("attn.")})
        y = F.layer_norm(x, (width,), part["ln_1.weight"], part["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, (width,), part["ln_2.weight"], part["ln_2.bias"])
        y = F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    x = F.layer_norm(x[:, 0], (width,), state["post_encoder.ln.weight"], state["post_encoder.ln.bias"])
    return F.normalize(x @ state["post_encoder.proj"], dim=-1)


def fake_omegaconf(monkeypatch):
    """Modules with OmegaConf's class names and the shape of its pickles, as the released files were written with."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.base", "omegaconf.dictconfig")}
    modules["omegaconf.nodes"] = types.ModuleType("omegaconf.nodes")

    def define(module, name):
        cls = type(name, (), {"__module__": module})
        setattr(modules[module], name, cls)
        return cls

    metadata = define("omegaconf.base", "ContainerMetadata")
    dict_config, any_node = define("omegaconf.dictconfig", "DictConfig"), define("omegaconf.nodes", "AnyNode")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    config, node, data = dict_config(), any_node(), metadata()
    data.__dict__ |= {
        "ref_type": typing.Any,
        "object_type": dict,
        "resolver_cache": defaultdict(dict),
        "key_type": str,
    }
    node.__dict__ |= {"_metadata": data, "_val": 3}
    config.__dict__ |= {"_metadata": data, "_content": {"rank": node}, "_parent": None}
    return config


@pytest.fixture
def released(tmp_path, monkeypatch):
    audio = released_tower(1, positions=1 + GRID[0] * GRID[1])
    checkpoint = {"cfg": fake_omegaconf(monkeypatch), "model": ({}, audio, {}, {"logit_scale": torch.tensor(3.5)})}
    torch.save(checkpoint, tmp_path / "released.pth")
    for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "released.pth", audio


def test_command_converts_every_tensor(released, tmp_path, capsys):
    path, audio = released
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "clip")
    output = tmp_path / "converted"
    arguments = ["--clip", tmp_path / "clip", "--checkpoint", path, "--output", output, "--num-frames", 64]
    assert main([str(argument) for argument in arguments]) == 0
    assert "every tensor" in capsys.readouterr().out

    model = VipAntModel.from_pretrained(output).eval()
    features = torch.randn(2, 64, 128)
    with torch.no_grad():
        got = model.get_audio_features(features).pooler_output
    torch.testing.assert_close(got, reference_forward(audio, features, (4, 6)), atol=1e-5, rtol=0)
    assert model.audio_image_logit_scale.item() == model.audio_text_logit_scale.item() == 3.5
    assert torch.equal(model.state_dict()["visual_projection.weight"], clip.visual_projection.weight)
    processor = VipAntProcessor.from_pretrained(output)
    assert processor.feature_extractor.num_frames == 64


def test_older_layout_and_one_channel_kernel():
    audio = released_tower(2, positions=1 + GRID[0] * GRID[1], channels=1)
    file = io.BytesIO()
    torch.save({"cfg": None, "model": (audio, {"logit_scale": torch.tensor(1.0)})}, file)
    file.seek(0)
    model = convert(tiny_clip(), load_checkpoint(file), num_frames=64)[0].eval()
    features = torch.randn(2, 64, 128)
    got = model.get_audio_features(features).pooler_output
    torch.testing.assert_close(got, reference_forward(audio, features, (4, 6)), atol=1e-5, rtol=0)


def test_tuned_image_tower_replaces_clips():
    checkpoint = {
        "image": released_tower(3, positions=10),
        "audio": released_tower(4, 1 + 315),
        "text": {},
        "loss": {},
    }
    model, left_out = convert(tiny_clip(), checkpoint, num_frames=64)
    assert not left_out
    assert torch.equal(model.visual_projection.weight, checkpoint["image"]["post_encoder.proj"].T)
    query = model.vision_model.encoder.layers[1].self_attn.q_proj.weight
    assert torch.equal(query, checkpoint["image"]["encoder.resblocks.1.attn.in_proj_weight"][:48])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda audio: audio.update({"encoder.resblocks.0.attn.bias_k": torch.zeros(1)}), "without a place: .*bias_k"),
        (lambda audio: audio.pop("misc.class_embedding"), "Missing key.*class_embedding"),
        (lambda audio: audio.update({"misc.positional_embedding": torch.zeros(9, 48)}), "num-frames than 64"),
        (lambda audio: audio.pop("post_encoder.proj"), "no post_encoder.proj"),
    ],
)
def test_misfits_are_errors(change, message):
    audio = released_tower(5, positions=316)
    change(audio)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(tiny_clip(), {"image": {}, "audio": audio, "text": {}, "loss": {}}, num_frames=64)


def with_loss(loss: dict, **towers) -> dict:
    return {"image": {}, "audio": released_tower(6, 316), "text": {}, "loss": loss} | towers


def scale(value: float) -> torch.Tensor:
    return torch.tensor(value)


# State dicts as the authors' loss heads give them (cvap/module/decoder/loss_head.py, loss_more.py), small.
BARLOW = {
    "linear.0.weight": torch.ones(6, 24),
    "linear.1.weight": torch.ones(6),
    "linear.1.running_mean": torch.ones(6),
    "linear.3.weight": torch.ones(4, 6),
    "bn.running_mean": torch.ones(4),
}
HEAD = {
    "logit_scale": scale(2.0),
    "linear.0.weight": torch.linspace(0.5, 1.5, 24),
    "linear.0.bias": torch.linspace(-1, 1, 24),
    "linear.1.weight": torch.linspace(-1, 1, 120).view(5, 24),
}


@pytest.mark.parametrize(
    ("loss", "scales", "left_out"),
    [
        ({}, (2.6592, 2.6592), []),
        ({"logit_scale": scale(3.5)}, (3.5, 3.5), []),
        # their default joint run
        ({"loss_head_va.logit_scale": scale(3.0), "loss_head_al.logit_scale": scale(4.0)}, (3.0, 4.0), []),
        ({"loss_head_al.logit_scale": scale(4.0)}, (4.0, 4.0), []),  # AT fine-tuning
        (BARLOW, (2.6592, 2.6592), ["the projector of Barlow Twins"]),
        (
            {"loss_ce.logit_scale": scale(3.0)} | {f"loss_barlow.{name}": tensor for name, tensor in BARLOW.items()},
            (3.0, 3.0),
            ["the projector of Barlow Twins"],
        ),
        (
            {f"loss_head_{pair}.logit_scale": scale(i) for i, pair in enumerate(("vp", "va", "vv"), start=2)},
            (3.0, 3.0),
            ["the scale of two views of pictures"],
        ),
    ],
)
def test_losses_of_every_kind_convert(loss, scales, left_out):
    model, found = convert(tiny_clip(), with_loss(loss), num_frames=64)
    assert isinstance(model, VipAntModel) and found == left_out
    got = (model.audio_image_logit_scale.item(), model.audio_text_logit_scale.item())
    assert got == pytest.approx(scales)


@pytest.mark.parametrize(
    ("loss", "kind", "left_out"),
    [
        (HEAD | {"linear.1.bias": torch.linspace(0, 1, 5)}, "single_label_classification", []),
        (HEAD, "multi_label_classification", []),
        (
            {f"loss_bce.{name}": tensor for name, tensor in HEAD.items()}
            | {"loss_ce.logit_scale": scale(3.0), "a2v.1.weight": torch.ones(24, 24)},
            "multi_label_classification",
            ["the map from sounds to pictures of joint tagging"],
        ),
    ],
)
def test_classification_heads_convert(loss, kind, left_out):
    checkpoint = with_loss(loss)
    names = ["dog", "rain", "bell", "car", "cat"]
    model, found = convert(tiny_clip(), checkpoint, num_frames=64, labels=names)
    assert model.config.problem_type == kind and found == left_out
    assert [model.config.id2label[i] for i in range(5)] == names
    features = torch.randn(2, 64, 128)
    with torch.no_grad():
        got = model.eval()(features).logits
        embeds = convert(tiny_clip(), with_loss({}), num_frames=64)[0].eval()
        embeds = embeds.get_audio_features(features, normalize=False).pooler_output
    expected = F.layer_norm(embeds, (24,), HEAD["linear.0.weight"], HEAD["linear.0.bias"]) @ HEAD["linear.1.weight"].T
    expected = (expected + loss.get("linear.1.bias", 0)) * HEAD["logit_scale"].exp()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_label_names_must_fit_the_head():
    with pytest.raises(ValueError, match="2 label names were given, the head has 5 labels"):
        convert(tiny_clip(), with_loss(HEAD), num_frames=64, labels=["a", "b"])
    with pytest.raises(ValueError, match="no classification head"):
        convert(tiny_clip(), with_loss({}), num_frames=64, labels=["a", "b"])


def test_a_tuned_text_tower_replaces_clips():
    """It has a class embedding, and one position more than tokens, as the authors make for every tower."""
    text = released_tower(7, positions=41, width=32, hidden=40)
    kernel = [name for name in text if name.startswith("pre_encoder.")]
    text = {name: tensor for name, tensor in text.items() if name not in kernel}
    text["pre_encoder.token_embedding.weight"] = torch.randn(len(tiny_tokenizer()), 32)
    model, _ = convert(tiny_clip(), with_loss({}, text=text), num_frames=64)
    embeddings = model.text_model.embeddings
    assert torch.equal(embeddings.position_embedding.weight, text["misc.positional_embedding"][:40])
    assert torch.equal(model.text_projection.weight, text["post_encoder.proj"].T)


def test_positions_shared_with_the_image_tower_are_interpolated():
    audio = released_tower(8, positions=10)  # the tiny CLIP's 3 x 3 and the class token's
    model, _ = convert(tiny_clip(), with_loss({}, audio=audio), num_frames=64)
    expected = interpolate_positions(audio["misc.positional_embedding"], (3, 3), GRID)
    assert torch.equal(model.audio_model.embeddings.position_embedding.weight, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pre_encoder.bn1.weight", "a ResNet"),
        ("encoder.patch_embed.proj.weight", "a DeiT"),
        ("encoder.transformer.resblocks.0.ln_1.weight", "the authors' first code"),
    ],
)
def test_other_towers_are_refused_by_name(name, kind):
    with pytest.raises(ValueError, match=f"audio tower does not fit .*{kind}"):
        convert(tiny_clip(), with_loss({}, audio={name: torch.ones(3)}), num_frames=64)


def test_unknown_loss_tensors_are_errors():
    with pytest.raises(ValueError, match=r"decoder\.weight is of no known kind"):
        convert(tiny_clip(), with_loss({"decoder.weight": torch.ones(1)}), num_frames=64)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class HostileEval:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("attack", [Hostile, HostileEval])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, attack, legacy, capsys):
    trace = tmp_path / "code-was-run"
    path = tmp_path / "hostile.pth"
    checkpoint = {"cfg": attack(trace), "model": ({}, released_tower(1, 316), {}, {})}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"hostile\.pth was refused"):
        load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the attack itself works
    assert trace.exists()
    assert main(["--clip", "x", "--checkpoint", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, [1, 2], {"model": (1,)}])
def test_other_files_are_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no VIP-ANT checkpoint"):
        load_checkpoint(tmp_path / "other.pth")


def test_garbage_is_refused(tmp_path):
    (tmp_path / "garbage.pth").write_bytes(b"this is no pickle")
    with pytest.raises(ValueError, match="damaged or no pickle"):
        load_checkpoint(tmp_path / "garbage.pth")
