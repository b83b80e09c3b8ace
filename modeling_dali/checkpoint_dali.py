"""
Reads the files that the authors of DALI and CAV-MAE released.

Every tensor that the model needs must be in a file, with its shape; what is left over is counted. Files are opened
with `weights_only=True`: no code in them is run.
"""

import os
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

PROJECTOR_KEYS = {"0": "linear_1", "2": "linear_2"}

# Our name for a part of the scorers: the authors' one. They name a scorer by the tokens that it reads keys and values
# from, this project by the tokens that it weighs.
SCORER_PARTS = {name: name for name in ("a_q", "a_k", "a_v", "i_q", "i_k", "i_v")}
SCORER_PARTS |= {"audio_scorer": "image_scorer", "image_scorer": "audio_scorer"}

# What a file is, told by a part of one of its names; the first that fits.
KINDS = {
    "lora_": "a LoRA adapter of LLaVA (from the side scripts): merge it into LLaVA and give the result as --llava",
    "base_model.": "what was trained beside a LoRA adapter (from the side scripts): useless without it",
    "patch_embed_a.": "an audio backbone (--audio-backbone)",
    "projector.": "a projector (--projector)",
    "audio_tower.prefix": "a soft prefix (--prefix)",
    "audio_encoder.": "CLAP's audio encoder, with which the side scripts began, not CAV-MAE's",
}


class AudioBackbone(NamedTuple):
    """
    What `audio_backbone.pth` holds.

    Attributes:
        encoder: State of the audio encoder.
        projection: State of the projection; None where the file has none (CAV-MAE).
        scorers: Tensors of the scorers of attentive transport, by the names of this project; empty where there are
            none.
        unneeded: What else the file holds, counted by group.
    """

    encoder: dict[str, torch.Tensor]
    projection: dict[str, torch.Tensor] | None
    scorers: dict[str, torch.Tensor]
    unneeded: Counter[str]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """
    The tensors of a PyTorch file, without `module.` in front of their names.

    Raises:
        ValueError: if the file is none, or holds anything but tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except Exception as error:  # torch raises many kinds, for truncated files and for pickled code alike
        raise ValueError(f"{path} is not a file of tensors that can be opened safely: {error}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def audio_encoder_names(num_layers: int) -> dict[str, str]:
    """The names of CAV-MAE's audio branch for the names of `DaliAudioModel`."""
    names = {
        "patch_embedding.weight": "patch_embed_a.proj.weight",
        "patch_embedding.bias": "patch_embed_a.proj.bias",
        "positions": "pos_embed_a",
        "modality": "modality_a",
        "norm.weight": "norm_a.weight",
        "norm.bias": "norm_a.bias",
    }
    for layer in range(num_layers):
        # The last block is shared between modalities and has norms of its own for each.
        shared = layer == num_layers - 1
        block, suffix = ("blocks_u.0", "_a") if shared else (f"blocks_a.{layer}", "")
        parts = {
            "norm1": f"norm1{suffix}",
            "norm2": f"norm2{suffix}",
            "attn.qkv": "attn.qkv",
            "attn.proj": "attn.proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        }
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{kind}"] = f"{block}.{theirs}.{kind}"
    return names


def pick(
    tensors: dict[str, torch.Tensor],
    names: dict[str, str],
    shapes: dict[str, torch.Size],
    path: str | os.PathLike[str],
) -> dict[str, torch.Tensor]:
    """
    Takes tensors out of `tensors`, renamed.

    Args:
        tensors: What a file holds; what is taken is removed from it.
        names: The file's name for each of ours.
        shapes: The shape for each of our names.
        path: The file, for messages.

    Raises:
        ValueError: lists every tensor that is missing or has another shape.
    """
    problems = []
    for ours, theirs in names.items():
        if theirs not in tensors:
            problems.append(f"{theirs} is missing")
        elif tensors[theirs].shape != shapes[ours]:
            problems.append(f"{theirs} has the shape {list(tensors[theirs].shape)}, not {list(shapes[ours])}")
    if problems:
        kind = next((kind for part, kind in KINDS.items() if any(part in name for name in tensors)), None)
        held = f"{path} does not fit" + (f" (it holds {kind})" if kind else "")
        raise ValueError(f"{held}: " + "; ".join(problems) + ".")
    return {ours: tensors.pop(theirs) for ours, theirs in names.items()}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a module's state."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def read_audio_backbone(
    path: str | os.PathLike[str], audio_tower: PreTrainedModel, audio_projection: nn.Linear
) -> AudioBackbone:
    """
    Reads a DALI or CAV-MAE checkpoint.

    Args:
        path: `audio_backbone.pth` or a public CAV-MAE checkpoint.
        audio_tower, audio_projection: Modules that the tensors must fit.

    Raises:
        ValueError: if a tensor is missing or has another shape.
    """
    tensors = read_tensors(path)
    names = audio_encoder_names(audio_tower.config.num_hidden_layers)
    encoder = pick(tensors, names, shapes_of(audio_tower), path)
    projection = None
    if "proj.weight" in tensors or "proj.bias" in tensors:
        names = {"weight": "proj.weight", "bias": "proj.bias"}
        projection = pick(tensors, names, shapes_of(audio_projection), path)
    scorers = read_scorers(tensors, audio_projection.out_features, path)
    return AudioBackbone(encoder, projection, scorers, group(tensors))


def read_scorers(
    tensors: dict[str, torch.Tensor], width: int, path: str | os.PathLike[str]
) -> dict[str, torch.Tensor]:
    """Takes the scorers of tokens of one width out of `tensors`, by our names; none if there are none."""
    if not any(name.split(".")[0] in SCORER_PARTS for name in tensors):
        return {}
    names, shapes = {}, {}
    for ours, theirs in SCORER_PARTS.items():
        sizes = {"weight": (width, width), "bias": (width,)}
        if ours.endswith("scorer"):
            sizes = {f"out_proj.{kind}": size for kind, size in sizes.items()}
            sizes |= {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
        for kind, size in sizes.items():
            names[f"{ours}.{kind}"] = f"{theirs}.{kind}"
            shapes[f"{ours}.{kind}"] = torch.Size(size)
    return pick(tensors, names, shapes, path)


def read_projector(path: str | os.PathLike[str], projector: nn.Module) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """
    Reads the audio copy of the projector.

    `prefixMLP.bin` has LLaVA's name for it, `audio_projector.bin` of the side scripts its own. Raises ValueError as
    `read_audio_backbone` does.
    """
    tensors = read_tensors(path)
    own = any(name.startswith("model.audio_projector.") for name in tensors)
    names = {
        f"{ours}.{kind}": f"model.{'audio' if own else 'mm'}_projector.{index}.{kind}"
        for index, ours in PROJECTOR_KEYS.items()
        for kind in ("weight", "bias")
    }
    return pick(tensors, names, shapes_of(projector), path), group(tensors)


def read_prefix(path: str | os.PathLike[str], width: int) -> tuple[torch.Tensor, Counter[str]]:
    """Reads the soft prefix [tokens, width] (`prefix.bin`); raises ValueError as `read_audio_backbone` does."""
    tensors = read_tensors(path)
    name = "model.audio_tower.prefix"
    length = len(tensors.get(name, torch.empty(16, 0)))
    prefix = pick(tensors, {"prefix": name}, {"prefix": torch.Size((length, width))}, path)["prefix"]
    return prefix, group(tensors)


def group(tensors: dict[str, torch.Tensor]) -> Counter[str]:
    """Tensors counted by the first part of their names: `blocks_v`, `decoder_embed`, ..."""
    return Counter(name.split(".")[0] for name in tensors)
