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
    main([str(argument) for argument in arguments])
    assert f"{len(audio) + 1} tensors" in capsys.readouterr().out

    model = VipAntModel.from_pretrained(output).eval()
    features = torch.randn(2, 64, 128)
    with torch.no_grad():
        got = model.get_audio_features(features).pooler_output
    torch.testing.assert_close(got, reference_forward(audio, features, (4, 6)), atol=1e-5, rtol=0)
    assert model.audio_logit_scale.item() == 3.5
    assert torch.equal(model.state_dict()["visual_projection.weight"], clip.visual_projection.weight)
    processor = VipAntProcessor.from_pretrained(output)
    assert processor.feature_extractor.num_frames == 64


def test_older_layout_and_one_channel_kernel():
    audio = released_tower(2, positions=1 + GRID[0] * GRID[1], channels=1)
    file = io.BytesIO()
    torch.save({"cfg": None, "model": (audio, {"logit_scale": torch.tensor(1.0)})}, file)
    file.seek(0)
    model = convert(tiny_clip(), load_checkpoint(file), num_frames=64).eval()
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
    model = convert(tiny_clip(), checkpoint, num_frames=64)
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


def test_unknown_loss_tensors_are_errors():
    checkpoint = {"image": {}, "audio": released_tower(6, 316), "text": {}, "loss": {"bn.running_mean": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"bn\.running_mean has no place"):
        convert(tiny_clip(), checkpoint, num_frames=64)


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
    with pytest.raises(SystemExit):
        main(["--clip", "x", "--checkpoint", str(path), "--output", str(tmp_path / "out")])
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
