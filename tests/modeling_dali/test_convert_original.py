"""Conversion of the released files, on synthetic ones with the same names and small shapes."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, DaliProcessor
from modeling_dali.checkpoint_dali import audio_encoder_names, read_audio_backbone, read_prefix, read_projector
from modeling_dali.convert_original import convert, main
from modeling_dali.explain import find_scorers, save_scorers
from tests.released import released_scorers, seeded
from tests.tiny import tiny_dali, tiny_llava, tiny_tokenizer
from trainers.losses import TransportScorer

# The front end of the released model, with a small encoder behind it.
CONFIG = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def released_audio_backbone(width=16, depth=3, mlp=32, image_width=24, proj=True):
    """`audio_backbone.pth` as the specification lists it: the audio part, and parts that are not needed."""

    def linear(name, inputs, outputs):
        return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}

    def norm(name):
        return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}

    def block(name):
        tensors = {}
        for part in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            tensors |= norm(f"{name}.{part}")
        tensors |= linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
        return tensors | linear(f"{name}.mlp.fc1", width, mlp) | linear(f"{name}.mlp.fc2", mlp, width)

    tensors = {
        "patch_embed_a.proj.weight": torch.randn(width, 1, 16, 16),
        "patch_embed_a.proj.bias": torch.randn(width),
        "modality_a": torch.randn(1, 1, width),
        "pos_embed_a": torch.randn(1, 512, width),
        "modality_v": torch.randn(1, 1, width),
    }
    for i in range(depth - 1):
        tensors |= block(f"blocks_a.{i}") | block(f"blocks_v.{i}")
    tensors |= block("blocks_u.0") | norm("norm_a") | norm("norm_v") | norm("norm")
    if proj:
        tensors |= linear("proj", width, image_width) | released_scorers(image_width)
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tiny_llava().save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    tiny_dali()[1].image_processor.save_pretrained(tmp_path / "llava")
    torch.save(released_audio_backbone(width=768, depth=12, mlp=3072), tmp_path / "audio_backbone.pth")
    projector = {
        f"model.mm_projector.{i}.{kind}": torch.randn(*shape)
        for i, inputs in (("0", 24), ("2", 32))
        for kind, shape in (("weight", (32, inputs)), ("bias", (32,)))
    }
    torch.save(projector | {"model.audio_tower.prefix": torch.randn(16, 32)}, tmp_path / "prefixMLP.bin")
    torch.save({"model.audio_tower.prefix": torch.randn(16, 32)}, tmp_path / "prefix.bin")
    return tmp_path


def test_conversion_end_to_end(files, capsys):
    arguments = ["--llava", files / "llava", "--audio-backbone", files / "audio_backbone.pth"]
    arguments += ["--projector", files / "prefixMLP.bin", "--prefix", files / "prefix.bin", "--output", files / "dali"]
    assert main([str(argument) for argument in arguments]) == 0
    report = capsys.readouterr().err
    assert "blocks_v (" in report and "norm_v (2)" in report and "scorer" not in report
    assert find_scorers(files / "dali") is not None
    model = DaliForConditionalGeneration.from_pretrained(files / "dali")
    processor = DaliProcessor.from_pretrained(files / "dali")
    source = torch.load(files / "audio_backbone.pth")
    tower = model.model.audio_tower
    assert torch.equal(tower.positions, source["module.pos_embed_a"])
    assert torch.equal(tower.layers[4].attn.qkv.weight, source["module.blocks_a.4.attn.qkv.weight"])
    assert torch.equal(tower.layers[4].norm1.weight, source["module.blocks_a.4.norm1.weight"])
    assert torch.equal(tower.layers[11].norm2.bias, source["module.blocks_u.0.norm2_a.bias"])
    assert torch.equal(tower.norm.weight, source["module.norm_a.weight"])
    assert torch.equal(model.model.audio_projection.weight, source["module.proj.weight"])
    projector = torch.load(files / "prefixMLP.bin")
    assert torch.equal(model.model.audio_projector.linear_2.weight, projector["model.mm_projector.2.weight"])
    assert torch.equal(model.model.prefix, torch.load(files / "prefix.bin")["model.audio_tower.prefix"])
    assert processor.prefix_length == 16
    llava = tiny_llava()
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.weight, llava.model.multi_modal_projector.linear_1.weight
    )
    inputs = processor(
        text=processor.caption_prompt("audio"), audio=torch.randn(16_000), sampling_rate=16_000, return_tensors="pt"
    )
    assert inputs["input_ids"].eq(model.config.audio_token_index).sum() == 512
    model.generate(**inputs, max_new_tokens=2)


def test_every_tensor_of_the_encoder_has_a_name():
    from modeling_dali import DaliAudioModel

    tower = DaliAudioModel(DaliAudioConfig(**CONFIG))
    assert set(audio_encoder_names(3)) == set(tower.state_dict())
    assert len(set(audio_encoder_names(3).values())) == len(tower.state_dict())


def small_modules():
    from modeling_dali import DaliAudioModel

    return DaliAudioModel(DaliAudioConfig(**CONFIG)), torch.nn.Linear(16, 24)


def test_a_public_cav_mae_checkpoint_has_no_projection(tmp_path):
    torch.save(released_audio_backbone(proj=False), tmp_path / "cav.pth")
    encoder, projection, scorers, unneeded = read_audio_backbone(tmp_path / "cav.pth", *small_modules())
    assert projection is None and not scorers and len(encoder) == len(audio_encoder_names(3))
    assert unneeded["modality_v"] == 1 and sum(unneeded.values()) == len(released_audio_backbone(proj=False)) - len(
        encoder
    )


# Of the authors' own forward pass (CAVMAE.forward of cav-mae/src/models/cav_mae.py with method "emd" and x_attn, its
# scorers made for tokens of width 32) on the scorers and tokens below: the first weights of the first clip, the place
# of the centre of mass of both clips (0 to 1), and the sum of squared weights.
ALPHA = [0.002032388234511018, 0.001951260375790298, 0.0015592215349897742, 0.0028639051597565413]
ALPHA_CENTRES, ALPHA_SQUARES = [0.499370276927948, 0.49815648794174194], [0.0020227159839123487, 0.001989861484616995]
BETA = [0.0014601945877075195, 0.0013827340444549918, 0.0013919846387580037, 0.0010678626131266356]
BETA_CENTRES, BETA_SQUARES = [0.5024348497390747, 0.4947485029697418], [0.001860860618762672, 0.0019402533071115613]


def test_converted_scorers_weigh_as_the_authors(tmp_path):
    torch.save(released_audio_backbone(image_width=32), tmp_path / "audio_backbone.pth")
    tower, projection = small_modules()[0], torch.nn.Linear(16, 32)
    scorers = read_audio_backbone(tmp_path / "audio_backbone.pth", tower, projection).scorers
    save_scorers(tmp_path, scorers)
    audio, image = seeded((2, 512, 32), 1, 3.0), seeded((2, 576, 32), 2, 2.0)
    trained = TransportScorer(32)
    trained.load_state_dict(scorers)
    found = find_scorers(tmp_path)
    both = [torch.stack(side) for side in zip(*map(found, audio, image), strict=True)]
    for alpha, beta in (both, [weights.detach() for weights in trained(audio, image)]):
        for weights, first, centres, squares in (
            (alpha, ALPHA, ALPHA_CENTRES, ALPHA_SQUARES),
            (beta, BETA, BETA_CENTRES, BETA_SQUARES),
        ):
            count = weights.shape[1]
            np.testing.assert_allclose(weights[0, :4], first, rtol=0, atol=1e-4 / count)
            np.testing.assert_allclose(weights @ (torch.arange(count) / count), centres, rtol=1e-5)
            np.testing.assert_allclose(weights.square().sum(1), squares, rtol=1e-5)


def test_what_is_missing_or_of_another_shape_is_listed(tmp_path):
    tensors = released_audio_backbone()
    del tensors["module.modality_a"], tensors["module.blocks_u.0.norm1_a.bias"]
    tensors["module.pos_embed_a"] = torch.zeros(1, 100, 16)
    torch.save(tensors, tmp_path / "a.pth")
    message = r"pos_embed_a has the shape \[1, 100, 16\], not \[1, 512, 16\]; modality_a is .*norm1_a.bias is missing"
    with pytest.raises(ValueError, match=message):
        read_audio_backbone(tmp_path / "a.pth", *small_modules())


def test_projector_and_prefix_are_checked(tmp_path):
    torch.save({"model.audio_tower.prefix": torch.zeros(16, 8)}, tmp_path / "prefix.bin")
    with pytest.raises(ValueError, match=r"prefix has the shape \[16, 8\], not \[16, 32\]"):
        read_prefix(tmp_path / "prefix.bin", 32)
    with pytest.raises(ValueError, match=r"a soft prefix \(--prefix\)\): model.mm_projector.0.weight is missing"):
        read_projector(tmp_path / "prefix.bin", tiny_dali()[0].model.audio_projector)


def projector_file(name: str) -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {f"{name}.{part}": torch.randn(*shape) for part, shape in shapes.items()}


def test_the_audio_projector_of_the_side_scripts_converts(tmp_path):
    tensors = projector_file("model.audio_projector") | projector_file("model.mm_projector")
    torch.save(tensors, tmp_path / "audio_projector.bin")
    state, unneeded = read_projector(tmp_path / "audio_projector.bin", tiny_dali()[0].model.audio_projector)
    assert torch.equal(state["linear_2.weight"], tensors["model.audio_projector.2.weight"])
    assert unneeded.total() == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.model.audio_projector", "trained beside a LoRA adapter"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", "a LoRA adapter of LLaVA"),
        ("module.patch_embed_a.proj", r"an audio backbone \(--audio-backbone\)"),
    ],
)
def test_another_file_is_named_as_what_it_is(tmp_path, name, kind):
    torch.save(projector_file(name), tmp_path / "file.bin")
    with pytest.raises(ValueError, match=f"holds .*{kind}.*mm_projector.0.weight is missing"):
        read_projector(tmp_path / "file.bin", tiny_dali()[0].model.audio_projector)


class Hostile:
    def __reduce__(self):
        return (print, ("code from the file was run",))


@pytest.mark.parametrize("kind", ["hostile", "truncated", "text", "missing", "list"])
def test_files_that_are_no_tensors(kind, tmp_path, capsys):
    path = tmp_path / "a.pth"
    if kind == "hostile":
        with path.open("wb") as file:
            pickle.dump({"module.modality_a": Hostile()}, file)
    elif kind == "truncated":
        torch.save(released_audio_backbone(), path)
        path.write_bytes(path.read_bytes()[:5_000])
    elif kind == "text":
        path.write_text("no tensors here")
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_audio_backbone(path, *small_modules())
    assert "was run" not in capsys.readouterr().out


def test_the_command_reports_an_error_and_writes_nothing(files):
    torch.save({"x": torch.zeros(1)}, files / "wrong.pth")
    command = [sys.executable, "-m", "modeling_dali.convert_original", "--llava", files / "llava"]
    command += ["--audio-backbone", files / "wrong.pth", "--output", files / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "patch_embed_a.proj.weight is missing" in done.stderr
    assert "Traceback" not in done.stderr and not (files / "out").exists()


def test_convert_is_a_function_too(files):
    convert(files / "llava", files / "audio_backbone.pth", files / "plain")
    model = DaliForConditionalGeneration.from_pretrained(files / "plain")
    assert model.config.prefix_length == 0 and model.config.base_model == str(files / "llava")
