"""A DALI model out of a small captioner: an audio encoder of random weights that listens for it."""

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, DaliProcessor, KaldiFbankFeatureExtractor


def new_listener(config, source: Path, seed: int) -> tuple[DaliForConditionalGeneration, DaliProcessor]:
    """
    A captioner with an untrained ear.

    Args:
        config (`DemoConfig`): Sizes of the audio encoder and length of the sounds.
        source (`Path`): Folder of the captioner.
        seed (`int`): Of the weights.
    """
    torch.manual_seed(seed)
    num_frames = round(100 * config.duration)
    extractor = KaldiFbankFeatureExtractor(feature_size=config.num_mel_bins, num_frames=num_frames)
    audio = DaliAudioConfig(
        num_frames=extractor.num_frames,
        num_mel_bins=config.num_mel_bins,
        patch_size=config.audio_patch_size,
        hidden_size=config.audio_width,
        intermediate_size=4 * config.audio_width,
        num_hidden_layers=config.audio_layers,
        num_attention_heads=config.audio_heads,
        initializer_range=config.audio_width**-0.5,
    )
    llava = LlavaForConditionalGeneration.from_pretrained(source)
    llava_processor = AutoProcessor.from_pretrained(source)
    model = DaliForConditionalGeneration.from_llava(llava, audio_config=audio, tokenizer=llava_processor.tokenizer)
    model.config.base_model = None  # a folder of this machine
    model.generation_config.max_new_tokens = 32
    processor = DaliProcessor.for_model(
        model.config,
        llava_processor.image_processor,
        llava_processor.tokenizer,
        extractor,
        llava_processor.chat_template,
    )
    return model, processor
