"""The smallest captioners of every image-text-to-text class that hears, and what their image processors would give."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.tiny import tiny_tokenizer

VOCABULARY = 99
IMAGE, AUDIO, PREFIX = 4, 90, 91  # ids of placeholders
VIDEO, START, END = 92, 93, 94

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


class TinyCaptioner(NamedTuple):
    """
    A captioner of random weights.

    Attributes:
        model: The model.
        block: Ids that stand for one picture in a prompt.
        pixels: Inputs for one picture, given a seed; those of several are joined along their first dimension.
        has_token_types: Whether the model reads which tokens are a picture's from `mm_token_type_ids`.
    """

    model: PreTrainedModel
    block: list[int]
    pixels: Callable[[int], dict[str, torch.Tensor]]
    has_token_types: bool = False


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(*extra: int, side: int = 16) -> Callable[[int], dict[str, torch.Tensor]]:
    """Pictures [1, *extra, 3, side, side]."""
    return lambda seed: {"pixel_values": noise(seed, 1, *extra, 3, side, side)}


def patches(count: int, width: int, grid: list[int]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Pictures as patches [count, width], as Qwen reads them."""
    return lambda seed: {"pixel_values": noise(seed, count, width), "image_grid_thw": torch.tensor([grid])}


def llava_like(name: str) -> tuple[dict, list[int], Callable]:
    vision = VISION | {"model_type": "clip_vision_model"}
    config = {"text_config": TEXT | {"model_type": "llama"}, "vision_config": vision, "image_token_index": IMAGE}
    if name == "vipllava":
        config |= {"vision_feature_layers": [-2, -1], "vision_feature_layer": [-2, -1]}
        return config, [IMAGE] * 16, squares()
    if name == "llava":
        return config | {"vision_feature_layer": -1}, [IMAGE] * 16, squares()
    config |= {"image_grid_pinpoints": [[16, 32]], "vision_feature_layer": -1}
    if name == "llava_onevision":
        config |= {"vision_config": VISION | {"model_type": "siglip_vision_model"}}
        config |= {"text_config": TEXT | {"model_type": "qwen2"}, "video_token_index": VIDEO}
    sizes = {"image_sizes": torch.tensor([[16, 32]])}
    # The whole picture, two tiles, and a token at each line's end.
    return config, [IMAGE] * (16 + 4 * 9), lambda seed: {"pixel_values": noise(seed, 1, 3, 3, 16, 16), **sizes}


def qwen_like(name: str) -> tuple[dict, list[int], Callable]:
    text, vision = TEXT | {"rope_parameters": dict(MROPE)}, dict(QWEN_VISION)
    if name == "qwen2_vl":
        vision = {**vision, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    if name == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if name in ("qwen3_vl", "qwen3_vl_moe"):
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        text["rope_parameters"]["mrope_interleaved"] = True
    if name == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    if name == "qwen3_5":
        vision |= {"num_position_embeddings": 16}
        text |= {
            "head_dim": 16,
            "initializer_range": 0.1,  # with more, the stock model's own padded batches differ by 2e-4
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    if name == "glm4v":
        vision |= {"image_size": 16}
    ids = dict(QWEN_IDS)
    if name == "glm4v":
        ids = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
        }
        ids |= {"video_start_token_id": 95, "video_end_token_id": 96}
    config = {"text_config": text, "vision_config": vision, **ids}
    return config, [START, *[IMAGE] * 6, END], patches(24, 48, [1, 4, 6])


def idefics_like(name: str) -> tuple[dict, list[int], Callable]:
    config = {"text_config": TEXT | {"model_type": "llama"}, "vision_config": dict(VISION), "image_token_id": IMAGE}
    if name == "idefics2":
        config["perceiver_config"] = {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 8,
        }
        config["text_config"] = TEXT | {"model_type": "mistral"}
        return config, [IMAGE] * 4, squares(1)
    return config | {"scale_factor": 2, "pad_token_id": 3}, [IMAGE] * 4, squares(1)


def gemma_like(name: str) -> tuple[dict, list[int], Callable]:
    vision = VISION | {"model_type": "siglip_vision_model"}
    if name == "gemma3":
        text = TEXT | {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 8}
        config = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": IMAGE}
        return config | {"boi_token_index": START, "eoi_token_index": END}, [START, *[IMAGE] * 4, END], squares()
    config = {"text_config": TEXT | {"model_type": "gemma"}, "vision_config": vision | {"projection_dim": 32}}
    config |= {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32, "vocab_size": VOCABULARY}
    return config, [IMAGE] * 16, squares()


def other(name: str) -> tuple[dict, list[int], Callable]:
    siglip = VISION | {"model_type": "siglip_vision_model"}
    match name:
        case "internvl":
            vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
            config = {"vision_config": vision, "text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE}
            return config | {"image_seq_length": 4}, [IMAGE] * 4, squares()
        case "mistral3":
            vision = VISION | {"model_type": "pixtral", "head_dim": 12}
            config = {"vision_config": vision, "text_config": TEXT | {"model_type": "mistral"}}
            sizes = {"image_sizes": torch.tensor([[16, 16]])}
            pixels = lambda seed: {"pixel_values": noise(seed, 1, 3, 16, 16), **sizes}  # noqa: E731
            return config | {"image_token_index": IMAGE, "spatial_merge_size": 2}, [IMAGE] * 4, pixels
        case "lfm2_vl":
            vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16}
            text = TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
            config = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE}
            extra = {
                "spatial_shapes": torch.tensor([[4, 4]]),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            }
            pixels = lambda seed: {"pixel_values": noise(seed, 1, 16, 48), **extra}  # noqa: E731
            return config | {"projector_hidden_size": 32, "downsample_factor": 2}, [IMAGE] * 4, pixels
        case "aya_vision":
            config = {"vision_config": siglip, "text_config": TEXT | {"model_type": "cohere2", "sliding_window": 64}}
            return config | {"image_token_index": IMAGE, "downsample_factor": 2}, [IMAGE] * 4, squares()
        case "cohere2_vision":
            config = {"vision_config": siglip, "text_config": TEXT | {"model_type": "cohere2", "sliding_window": 64}}
            config |= {"image_token_id": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 64}
            return config, [IMAGE] * 4, squares()
        case "got_ocr2":
            vision = VISION | {"output_channels": 8, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [1]}
            vision |= {"image_size": 64}
            config = {"vision_config": vision, "text_config": TEXT | {"model_type": "qwen2"}}
            return config | {"image_token_index": IMAGE}, [IMAGE] * 16, squares(side=64)
        case "molmo2":
            return molmo2()
    raise KeyError(name)


def molmo2() -> tuple[dict, list[int], Callable]:
    vision = {
        **VISION,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "image_size": [16, 16],
        "num_position_embeddings": 16,
    }
    adapter = {
        "vision_feature_layer": [-1, -2],
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 32,
        "text_hidden_size": 32,
    }
    text = TEXT | {"additional_vocab_size": 8}
    ids = {"image_start_token_id": START, "image_end_token_id": END, "image_patch_id": IMAGE}
    ids |= {"low_res_image_start_token_id": 95, "frame_start_token_id": 96, "frame_end_token_id": 97}
    # Four patches go into one token.
    grid = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    extra = {
        "image_token_pooling": grid,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }
    pixels = lambda seed: {"pixel_values": noise(seed, 1, 16, 48), **extra}  # noqa: E731
    return {"vision_config": vision, "adapter_config": adapter, "text_config": text, **ids}, [IMAGE] * 4, pixels


FAMILIES = {
    llava_like: ("llava", "llava_next", "llava_onevision", "vipllava"),
    qwen_like: ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"),
    idefics_like: ("smolvlm", "idefics2", "idefics3"),
    gemma_like: ("gemma3", "paligemma"),
    other: ("internvl", "mistral3", "lfm2_vl", "aya_vision", "cohere2_vision", "got_ocr2", "molmo2"),
}
CLASSES = [name for names in FAMILIES.values() for name in names]


def tiny_captioner(name: str) -> TinyCaptioner:
    """A captioner of the model type `name`, eager attention, random weights."""
    family = next(family for family, names in FAMILIES.items() if name in names)
    config, block, pixels = family(name)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **config), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # projectors that start at zero would hide pictures
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.2)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3, max_new_tokens=6)
    model.generation_config.suppress_tokens = [IMAGE, AUDIO, PREFIX, VIDEO, START, END]
    return TinyCaptioner(model.eval(), block, pixels, family is qwen_like or name == "molmo2")


# The words of `tests.tiny`, in the order of a conversation; what stands for a picture takes the place of IMAGE.
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_gemma3_processor() -> Gemma3Processor:
    """The processor of the tiny Gemma 3, whose placeholder in prompts is another than the one for its tokens."""
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    plain = tiny_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": list(names.values())}, replace_extra_special_tokens=False)
    tokens = {f"{name}_token": getattr(plain, f"{name}_token") for name in ("unk", "bos", "eos", "pad")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **tokens, extra_special_tokens=names)
    image_processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = CHAT_TEMPLATE.replace("IMAGE", "<boi>")
    return Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template)


def save_gemma3(folder: Path) -> str:
    """A Gemma 3 checkpoint on disk with its processor."""
    tiny_captioner("gemma3").model.save_pretrained(folder)
    tiny_gemma3_processor().save_pretrained(folder)
    return str(folder)
