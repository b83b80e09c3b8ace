"""Converts a checkpoint of VIP-ANT's authors into a folder that `from_pretrained` loads.

    python -m modeling_vipant.convert_original --clip DIR --checkpoint FILE.pth --output DIR

The checkpoints are pickles with an OmegaConf object inside. They are opened by torch's restricted unpickler, which
runs no code of the file; the few OmegaConf names are read as inert data, and any other name is refused.
"""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from modeling_vipant import VipAntFeatureExtractor, VipAntModel, VipAntProcessor


class Inert:
    """Stands for a class named in a pickle: takes any arguments and state, and does nothing with them."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def plain_dict(*factory) -> dict:
    """Stands for `collections.defaultdict`, which would call what it is given."""
    return {}


BUILTIN_NAMES = ("bool", "dict", "float", "int", "list", "long", "str")
OMEGACONF_NAMES = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "typing.Any",
)
SAFE_GLOBALS: list[Callable | tuple[Callable, str]] = [
    (plain_dict, "collections.defaultdict"),
    *((Inert, name) for name in OMEGACONF_NAMES),
    *((Inert, f"{module}.{name}") for module in ("builtins", "__builtin__") for name in BUILTIN_NAMES),
]

# Names in the checkpoint's towers and in transformers' CLIP; blocks and projections are renamed in `convert_tower`.
BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VISION_NAMES = {
    "pre_encoder.conv1.weight": "embeddings.patch_embedding.weight",
    "pre_encoder.ln.weight": "pre_layrnorm.weight",
    "pre_encoder.ln.bias": "pre_layrnorm.bias",
    "misc.positional_embedding": "embeddings.position_embedding.weight",
    "misc.class_embedding": "embeddings.class_embedding",
    "post_encoder.ln.weight": "post_layernorm.weight",
    "post_encoder.ln.bias": "post_layernorm.bias",
}
TEXT_NAMES = {
    "pre_encoder.token_embedding.weight": "embeddings.token_embedding.weight",
    "misc.positional_embedding": "embeddings.position_embedding.weight",
    "post_encoder.ln.weight": "final_layer_norm.weight",
    "post_encoder.ln.bias": "final_layer_norm.bias",
}
SCALE_NAMES = {
    "logit_scale": "audio_logit_scale",
    "loss_head_va.logit_scale": "audio_logit_scale",
    "loss_head_al.logit_scale": "audio_logit_scale",
    "loss_head_lv.logit_scale": "logit_scale",
}


def load_checkpoint(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Opens a released pickle without running any code of it.

    Args:
        path: The `.pth` file: `{"cfg": ..., "model": (image, audio, text, loss)}`, or `(image, audio, loss)` or
            `(audio, loss)` in older ones.

    Returns:
        The state dicts by name: "image", "audio", "text", "loss"; empty where the checkpoint holds none.

    Raises:
        ValueError: If the file names anything beyond tensors and OmegaConf's containers, or has another layout.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it asks for more than tensors and OmegaConf's containers, so opening it could run "
            f"code. Nothing of it was run. ({str(error).splitlines()[0]})"
        ) from error
    except (EOFError, IndexError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no pickle of torch: {error!r}") from error
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    layouts = {4: ("image", "audio", "text", "loss"), 3: ("image", "audio", "loss"), 2: ("audio", "loss")}
    if not isinstance(model, (tuple, list)) or len(model) not in layouts:
        raise ValueError(f'{path} is no VIP-ANT checkpoint: a dict whose "model" is 2 to 4 state dicts was expected')
    return {"image": {}, "audio": {}, "text": {}, "loss": {}} | dict(zip(layouts[len(model)], model, strict=True))


def convert_tower(
    state: dict[str, torch.Tensor], names: dict[str, str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Renames one tower's tensors to transformers' CLIP.

    Args:
        state: The tower's state dict as released.
        names: `VISION_NAMES` or `TEXT_NAMES`.

    Returns:
        The tower's state dict for transformers, and the weight of its projection, `[projection_dim, width]`.

    Raises:
        ValueError: Naming every tensor that has no place, or that the projection is missing.
    """
    state, converted, left_over = dict(state), {}, []
    projection = state.pop("post_encoder.proj", None)
    if projection is None:
        raise ValueError("the tower has no post_encoder.proj")
    for name, tensor in state.items():
        if name in names:
            converted[names[name]] = tensor
        elif name.startswith("encoder.resblocks."):
            block, _, rest = name.removeprefix("encoder.resblocks.").partition(".")
            part, _, kind = rest.rpartition(".")
            if part == "attn" and kind in ("in_proj_weight", "in_proj_bias"):
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    kind_name = kind.removeprefix("in_proj_")
                    converted[f"encoder.layers.{block}.self_attn.{letter}_proj.{kind_name}"] = piece.clone()
            elif part in BLOCK_NAMES:
                converted[f"encoder.layers.{block}.{BLOCK_NAMES[part]}.{kind}"] = tensor
            else:
                left_over.append(name)
        else:
            left_over.append(name)
    if left_over:
        raise ValueError(f"tensors without a place: {', '.join(left_over)}")
    return converted, projection.T.contiguous()


def convert(clip: CLIPModel, checkpoint: dict[str, dict[str, torch.Tensor]], num_frames: int = 1000) -> VipAntModel:
    """Puts a released checkpoint's tensors into a `VipAntModel`.

    Args:
        clip: The CLIP model it was trained beside (ViT-B/32 for the released ones); gives the frozen towers.
        checkpoint: From `load_checkpoint`.
        num_frames: Spectrogram frames the audio tower was trained with; 1000 is 10 s.

    Returns:
        The model, every tensor of the checkpoint in its place.

    Raises:
        ValueError: If a tensor has no place, a place stays empty, or shapes differ.
    """
    model = VipAntModel.from_clip(clip, num_frames=num_frames)
    towers = {
        "audio": (model.audio_model, model.audio_projection, VISION_NAMES),
        "image": (model.vision_model, model.visual_projection, VISION_NAMES),
        "text": (model.text_model, model.text_projection, TEXT_NAMES),
    }
    if not checkpoint["audio"]:
        raise ValueError("the checkpoint holds no audio tower")
    for name, (tower, projection, names) in towers.items():
        if not checkpoint[name]:  # frozen in training: CLIP's own
            continue
        try:
            state, weight = convert_tower(checkpoint[name], names)
            kernel = state.get("embeddings.patch_embedding.weight")
            if name == "audio" and kernel is not None and kernel.shape[1] == 1:  # its mean over channels is the same
                state["embeddings.patch_embedding.weight"] = kernel.repeat(
                    1, clip.config.vision_config.num_channels, 1, 1
                )
            tower.load_state_dict(state)
            projection.load_state_dict({"weight": weight})
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the {name} tower does not fit (another --clip model, or other --num-frames than {num_frames}?): "
                f"{error}"
            ) from error

    scales: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint["loss"].items():
        place = SCALE_NAMES.get(name)
        if place is None or place in scales:
            raise ValueError(f"the loss tensor {name} has no place (known: {', '.join(SCALE_NAMES)}, one of a kind)")
        scales[place] = tensor
    for place, tensor in scales.items():
        model.get_parameter(place).data.copy_(tensor)
    return model


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder (or Hub name) of the CLIP model, ViT-B/32 for releases")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the authors' .pth file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write model and processor to")
    parser.add_argument("--num-frames", type=int, default=1000, help="frames of the audio tower; 1000 is 10 s")
    args = parser.parse_args(arguments)
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        model = convert(CLIPModel.from_pretrained(args.clip), checkpoint, args.num_frames)
        processor = VipAntProcessor(
            VipAntFeatureExtractor(num_frames=args.num_frames),
            CLIPImageProcessorPil.from_pretrained(args.clip),
            AutoTokenizer.from_pretrained(args.clip),
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    placed = sum(len(state) for state in checkpoint.values())
    print(f"wrote {args.output}: {placed} tensors of the checkpoint, all in place")


if __name__ == "__main__":
    main()
