"""Converts a checkpoint of VIP-ANT's authors into a folder that `from_pretrained` loads.

    python -m modeling_vipant.convert_original --clip DIR --checkpoint FILE.pth --output DIR

Checkpoints of all their kinds convert: of sound with pictures, with texts, or with both (a logit scale for each pair),
with tuned text or image towers, of Barlow Twins, and with a classification head (ESC-50, AudioSet), which gives a
`VipAntForAudioClassification`.

The checkpoints are pickles with an OmegaConf object inside. They are opened by torch's restricted unpickler, which
runs no code of the file; the few OmegaConf names are read as inert data, and any other name is refused.
"""

import argparse
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from datasets_scripts.commands import run_command
from modeling_vipant import (
    VipAntConfig,
    VipAntForAudioClassification,
    VipAntModel,
    VipAntProcessor,
    vipant_feature_extractor,
)
from modeling_vipant.modeling_vipant import interpolate_positions


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
BOTH_OF_SOUND = ("audio_image_logit_scale", "audio_text_logit_scale")
SCALE_NAMES = {
    "logit_scale": BOTH_OF_SOUND,  # of the one pair that the run had
    "loss_ce.logit_scale": BOTH_OF_SOUND,
    "loss_head_va.logit_scale": ("audio_image_logit_scale",),
    "loss_head_al.logit_scale": ("audio_text_logit_scale",),
    "loss_head_lv.logit_scale": ("logit_scale",),
}
# Parts of losses that nothing but their training uses.
TRAINING_ALONE = {
    "linear.": "the projector of Barlow Twins",
    "bn.": "the projector of Barlow Twins",
    "loss_barlow.": "the projector of Barlow Twins",
    "a2v.": "the map from sounds to pictures of joint tagging",
    "loss_head_vp.": "the scale of two views of pictures",
    "loss_head_vv.": "the scale of two views of pictures",
    "loss_head_ap.": "the scale of sounds and given embeddings of pictures",
    "loss_head_aa.": "the scale of two views of sounds",
}
HEAD_NAMES = {
    "linear.0.weight": "norm.weight",
    "linear.0.bias": "norm.bias",
    "linear.1.weight": "linear.weight",
    "linear.1.bias": "linear.bias",
    "logit_scale": "logit_scale",
}
# Towers that are no ViT of CLIP's, told by a part of one of their names.
OTHER_TOWERS = {
    "pre_encoder.bn1.": "a ResNet",
    "encoder.patch_embed.": "a DeiT",
    "encoder.transformer.": "a ViT of the authors' first code (NaiveCLIPAudioHead)",
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
    for part, kind in OTHER_TOWERS.items():
        if any(name.startswith(part) for name in state):
            raise ValueError(f"it is {kind}; only towers in the shape of CLIP's ViT (CLIPAudioHead) convert")
    state, converted, left_over = dict(state), {}, []
    if names is TEXT_NAMES:
        state.pop("misc.class_embedding", None)  # made by the authors for every tower, and used by no text tower
        if "misc.positional_embedding" in state:  # one more than there are tokens, the last never used
            state["misc.positional_embedding"] = state["misc.positional_embedding"][:-1]
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


def convert_audio_positions(state: dict[str, torch.Tensor], model: VipAntModel) -> None:
    """Brings positions that the audio tower shared with the image tower to the spectrogram's grid, in place."""
    name = "embeddings.position_embedding.weight"
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if name in state and len(state[name]) == 1 + side**2:
        state[name] = interpolate_positions(state[name], (side, side), model.config.audio_config.grid)


def convert_scales(loss: dict[str, torch.Tensor], model: VipAntModel) -> list[str]:
    """Puts the logit scales of a loss in their places.

    Where sound has a scale with pictures only, or with texts only, the other takes it too.

    Returns:
        What was left out, since training alone uses it.

    Raises:
        ValueError: If a tensor of the loss is of no known kind.
    """
    scales: dict[str, torch.Tensor] = {}
    left_out = set()
    for name, tensor in loss.items():
        part = next((kind for start, kind in TRAINING_ALONE.items() if name.startswith(start)), None)
        if name in SCALE_NAMES:
            scales |= dict.fromkeys(SCALE_NAMES[name], tensor)
        elif part is not None:
            left_out.add(part)
        else:
            raise ValueError(f"the loss tensor {name} is of no known kind (logit scales, Barlow Twins, a label head)")
    of_sound = [scales[place] for place in BOTH_OF_SOUND if place in scales]
    if len(of_sound) == 1:
        scales |= dict.fromkeys(BOTH_OF_SOUND, of_sound[0])
    for place, tensor in scales.items():
        model.get_parameter(place).data.copy_(tensor)
    return sorted(left_out)


def take_head(loss: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes a classification head out of a loss; empty if it has none."""
    for prefix in ("", "loss_bce."):
        if loss.get(f"{prefix}linear.0.weight", torch.empty(0, 0)).ndim == 1:  # a LayerNorm's
            return {ours: loss.pop(prefix + name) for name, ours in HEAD_NAMES.items() if prefix + name in loss}
    return {}


def classifier(model: VipAntModel, head: dict[str, torch.Tensor], labels: Sequence[str] | None):
    """The audio side of a model with a head.

    Args:
        model: Has the audio tower and projection.
        head: From `take_head`; with a bias it is of one label a clip, without of several.
        labels: Names of the labels in the head's order; `LABEL_0` and so on if None.

    Raises:
        ValueError: If names and labels differ in number, or the head does not fit.
    """
    count = len(head["linear.weight"])
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} label names were given, the head has {count} labels")
    names = labels or [f"LABEL_{i}" for i in range(count)]
    config = VipAntConfig(
        **model.config.to_dict()
        | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        | {"problem_type": "single_label_classification" if "linear.bias" in head else "multi_label_classification"}
    )
    result = VipAntForAudioClassification(config)
    result.audio_model.load_state_dict(model.audio_model.state_dict())
    result.audio_projection.load_state_dict(model.audio_projection.state_dict())
    try:
        result.classifier.load_state_dict(head)
    except RuntimeError as error:
        raise ValueError(f"the classification head does not fit: {error}") from error
    return result


def convert(
    clip: CLIPModel,
    checkpoint: dict[str, dict[str, torch.Tensor]],
    num_frames: int = 1000,
    labels: Sequence[str] | None = None,
) -> tuple[VipAntModel | VipAntForAudioClassification, list[str]]:
    """Puts a released checkpoint's tensors into a model.

    Args:
        clip: The CLIP model it was trained beside (ViT-B/32 for the released ones); gives the frozen towers.
        checkpoint: From `load_checkpoint`.
        num_frames: Spectrogram frames the audio tower was trained with; 1000 is 10 s.
        labels: Names of the labels of a classification head.

    Returns:
        The model, with a classification head if the checkpoint has one; and what was left out, since training alone
        uses it.

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
            if name == "audio":
                convert_audio_positions(state, model)
                kernel = state.get("embeddings.patch_embedding.weight")
                if kernel is not None and kernel.shape[1] == 1:  # its mean over channels is the same
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
    loss = dict(checkpoint["loss"])
    head = take_head(loss)
    left_out = convert_scales(loss, model)
    if head:
        return classifier(model, head, labels), left_out
    if labels is not None:
        raise ValueError("label names were given, but the checkpoint has no classification head")
    return model, left_out


def main(arguments: list[str] | None = None) -> int:
    """The command line (see the module's docstring); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder (or Hub name) of the CLIP model, ViT-B/32 for releases")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the authors' .pth file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write model and processor to")
    parser.add_argument("--num-frames", type=int, default=1000, help="frames of the audio tower; 1000 is 10 s")
    parser.add_argument("--labels", type=Path, help="label names of a classification head, one a line, in its order")
    return run_command(parser, _convert, arguments)


def _convert(options: argparse.Namespace) -> int:
    checkpoint = load_checkpoint(options.checkpoint)
    labels = options.labels and options.labels.read_text(encoding="utf-8").splitlines()
    model, left_out = convert(CLIPModel.from_pretrained(options.clip), checkpoint, options.num_frames, labels)
    processor = VipAntProcessor(
        vipant_feature_extractor(num_frames=options.num_frames),
        CLIPImageProcessorPil.from_pretrained(options.clip),
        AutoTokenizer.from_pretrained(options.clip),
    )
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"wrote {options.output} ({type(model).__name__}): every tensor of the checkpoint's towers is in its place")
    for part in left_out:
        print(f"left out: {part}, which training alone uses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
