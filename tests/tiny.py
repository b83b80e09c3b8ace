"""The smallest models that still do everything: made on the spot, the same for every test."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, DaliProcessor, KaldiFbankFeatureExtractor

WORDS = """
a an the of and in on is are with at dog cat bird bell rain car man woman barks meows sings rings falls passes speaks
loudly softly far near away house street tree sound scene picture describe that can be heard this what shows image
USER ASSISTANT : . , ? ! < > Describe What The A
""".split()
VOCABULARY = 97  # differs from every width below: PEFT guesses the word embedding by its size


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with LLaVA's special tokens."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*specials, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_llava(tower: str = "clip", vocabulary: int = VOCABULARY, **kwargs) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights: CLIP + Llama, or SigLIP + Qwen2."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    if tower == "clip":
        vision_config, text_config = CLIPVisionConfig(**vision), LlamaConfig(**text)
        strategy = "default"
    else:
        vision_config, text_config = SiglipVisionConfig(**vision), Qwen2Config(**text)
        strategy = "full"
    kwargs = {"vision_feature_select_strategy": strategy, "image_seq_length": 16} | kwargs
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config, text_config=text_config, image_token_index=4, pad_token_id=3, **kwargs
        )
    )
    # The usual small start gives nearly the same logits for every input; tests want to see differences.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model.eval()


def tiny_audio_config(**kwargs) -> DaliAudioConfig:
    """The audio encoder: 64 frames x 32 bins, patches of 8: 4 x 8 = 32 tokens."""
    sizes = {
        "num_frames": 64,
        "num_mel_bins": 32,
        "patch_size": 8,
        "hidden_size": 40,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
    }
    return DaliAudioConfig(**(sizes | kwargs))


def tiny_feature_extractor() -> KaldiFbankFeatureExtractor:
    """The front end of `tiny_audio_config`: clips of 0.64 s."""
    return KaldiFbankFeatureExtractor(feature_size=32, num_frames=64)


def tiny_dali(tower: str = "clip", prefix: int = 0, **kwargs) -> tuple[DaliForConditionalGeneration, DaliProcessor]:
    """A DALI of random weights and its processor."""
    tokenizer = tiny_tokenizer()
    model = DaliForConditionalGeneration.from_llava(
        tiny_llava(tower, **kwargs), audio_config=tiny_audio_config(), tokenizer=tokenizer
    )
    torch.manual_seed(1)
    if prefix:
        model.add_prefix(prefix)
    image_processor = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[tower](
        size={"height": 16, "width": 16}, **({"do_center_crop": False} if tower == "clip" else {})
    )
    processor = DaliProcessor.for_model(model.config, image_processor, tokenizer, tiny_feature_extractor())
    return model, processor
