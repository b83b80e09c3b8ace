"""A DALI model out of a small captioner: an audio encoder of random weights that listens for it."""

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from modeling_dali import (
    DaliAudioConfig,
    DaliCaptionerProcessor,
    DaliForConditionalGeneration,
    DaliForImageTextToText,
    DaliProcessor,
    KaldiFbankFeatureExtractor,
)
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import AudioCaptionProcessorMixin


def new_listener(config, source: Path, seed: int) -> tuple[DaliMixin, AudioCaptionProcessorMixin]:
    """
    A captioner with an untrained ear.

    Args:
        config (`DemoConfig`): Class of the captioner, sizes of the audio encoder and length of the sounds.
        source (`Path`): Folder of the captioner.
        seed (`int`): Seed of the weights.
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
    own = AutoProcessor.from_pretrained(source)
    if config.captioner == "llava":
        llava = LlavaForConditionalGeneration.from_pretrained(source)
        model = DaliForConditionalGeneration.from_llava(llava, audio_config=audio, tokenizer=own.tokenizer)
        model.config.base_model = None  # a folder of this machine
        parts = own.image_processor, own.tokenizer, extractor, own.chat_template
        processor = DaliProcessor.for_model(model.config, *parts)
    else:  # what is written from now on is the ear alone, which finds the captioner in its folder
        model = DaliForImageTextToText.from_captioner(str(source), audio_config=audio, tokenizer=own.tokenizer)
        processor = DaliCaptionerProcessor.for_model(model.config, own, extractor)
    model.generation_config.max_new_tokens = 32
    return model, processor
