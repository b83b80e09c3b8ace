"""The processor of a captioner of any class: sounds are DALI's, everything else is left to the captioner's own."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoProcessor
from transformers.feature_extraction_utils import BatchFeature

from .chat_templates import hearing_template
from .processing_audio import AudioCaptionProcessorMixin

SUBFOLDER = "captioner"  # where the captioner's own processor is saved
NESTED = ("Idefics", "SmolVLM")  # image processors that take a list of pictures for those of one text


class DaliCaptionerProcessor(AudioCaptionProcessorMixin):
    """
    Repeats `<audio>` and `<prefix>` in prompts, and hands the rest to the captioner's own processor.

    Args:
        captioner_processor: The captioner's; its tokenizer knows `<audio>` and `<prefix>` (see
            [`DaliForImageTextToText.add_media_tokens`]).
        feature_extractor: The audio encoder's.
        audio_seq_length: Audio tokens per clip.
        audio_grid: Rows (frequency) and columns (time) of the audio tokens, where these are patches; without it
            `trim_padding` is not to be had.
        prefix_length: Soft prefix tokens of the model.
        prefix_position: `"after_media"` or `"front"`: where [`caption_prompt`] puts the prefix.
        chat_template: Renders `image`, `audio`, `prefix` and `text` items; the captioner's own, with sound added, by
            default.
    """

    def __init__(
        self,
        captioner_processor=None,
        feature_extractor=None,
        audio_seq_length: int = 512,
        audio_grid: Sequence[int] | None = None,
        prefix_length: int = 0,
        prefix_position: str = "after_media",
        chat_template: str | None = None,
    ):
        own = captioner_processor.chat_template
        placeholder = image_placeholder(captioner_processor)
        if chat_template is None and own is not None:
            chat_template = hearing_template(own, placeholder, captioner_processor.tokenizer.special_tokens_map)
        super().__init__(feature_extractor, chat_template=chat_template)
        self.captioner_processor = captioner_processor
        self.audio_seq_length = audio_seq_length
        self.audio_grid = None if audio_grid is None else list(audio_grid)
        self.prefix_length = prefix_length
        self.prefix_position = prefix_position
        self.tokenizer.padding_side = "left"  # the text of every row ends where its caption begins
        self.find_tokens("audio", "prefix")
        # Of its tokens in the ids; Gemma 3's processor tells that of its placeholder in the text.
        self.image_token_id = getattr(self.tokenizer, "image_token_id", captioner_processor.image_token_id)

    @classmethod
    def for_model(cls, config, captioner_processor, feature_extractor):
        """
        The processor that fits a model.

        Args:
            config: The model's `DaliCaptionerConfig`.
            captioner_processor: The captioner's own.
            feature_extractor: The audio encoder's.
        """
        grid = config.audio_config.grid if config.audio_config.model_type == "dali_audio" else None
        position = config.prefix_position
        return cls(
            captioner_processor, feature_extractor, config.audio_seq_length, grid, config.prefix_length, position
        )

    @property
    def tokenizer(self):
        """The captioner's."""
        return self.captioner_processor.tokenizer

    @property
    def image_processor(self):
        """The captioner's."""
        return self.captioner_processor.image_processor

    def read(self, images, text, audio, **kwargs) -> BatchFeature:
        """The captioner's inputs, with placeholders for sounds, and what the audio encoder reads."""
        settings = self._merge_kwargs(**kwargs)
        images, text, _, audio = self.prepare_inputs_layout(images=images, text=text, audio=audio)
        self.validate_inputs(text=text, audio=audio)
        sounds, blocks = self._process_audio(audio, **settings["audio_kwargs"]) if audio is not None else ({}, [])
        text, _ = self.get_text_with_replacements(text, [], [], blocks)
        if images is not None:  # row by row: a row may have none
            placeholder, pictures = image_placeholder(self.captioner_processor), iter(images)
            counts = [prompt.count(placeholder) for prompt in text]
            if sum(counts) != len(images):
                raise ValueError(
                    f"The texts have {sum(counts)} {placeholder} placeholders for {len(images)} pictures."
                )
            images = [list(islice(pictures, count)) for count in counts]
        groups = {name: settings[name] for name in ("text_kwargs", "images_kwargs")}
        return BatchFeature({**self.captioner_processor(images=images, text=text, **groups), **sounds})

    def image_inputs(self, pictures: list) -> dict[str, torch.Tensor]:
        """What `get_image_tokens` takes for these pictures."""
        processor = self.image_processor
        nested = type(processor).__name__.startswith(NESTED)
        inputs = processor([[picture] for picture in pictures] if nested else pictures, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name != "num_crops"}

    # Loading and saving ---------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As the base class does; the captioner's own processor goes into a folder of its own."""
        self.captioner_processor.save_pretrained(Path(save_directory) / SUBFOLDER)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self, *args, **kwargs) -> dict:
        """The base class's, without the captioner's own processor."""
        captioner_processor = self.__dict__.pop("captioner_processor")
        try:
            return super().to_dict(*args, **kwargs)
        finally:
            self.captioner_processor = captioner_processor

    @classmethod
    def _get_arguments_from_pretrained(cls, path, processor_dict=None, **kwargs):
        arguments = super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)
        hub = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        return [AutoProcessor.from_pretrained(path, **hub | {"subfolder": SUBFOLDER}), *arguments]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call with a picture and a sound returns."""
        return [*self.captioner_processor.model_input_names, "input_features"]


def image_placeholder(captioner_processor) -> str:
    """What stands in a captioner's prompt for one picture."""
    return getattr(captioner_processor, "boi_token", None) or str(captioner_processor.image_token)


DaliCaptionerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["DaliCaptionerProcessor"]
