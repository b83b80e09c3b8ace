"""The tiny CLIP, tokenizer and processor that VIP-ANT's tests share. Sizes differ from each other on purpose."""

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_vipant import VipAntModel, VipAntProcessor, vipant_feature_extractor

NUM_FRAMES, NUM_BINS = 64, 32


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single bytes as its vocabulary."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=40)


def tiny_clip(seed: int = 0, **vision) -> CLIPModel:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 8,
        }
        | vision,
        projection_dim=24,
    )
    return CLIPModel(config).eval()


def tiny_vipant(seed: int = 0) -> VipAntModel:
    model = VipAntModel.from_clip(tiny_clip(seed), num_frames=NUM_FRAMES, num_mel_bins=NUM_BINS)
    return model.eval()


def tiny_processor() -> VipAntProcessor:
    return VipAntProcessor(
        vipant_feature_extractor(sampling_rate=16_000, feature_size=NUM_BINS, num_frames=NUM_FRAMES),
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tiny_tokenizer(),
    )
