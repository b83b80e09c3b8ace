"""
From text with `<image>`, `<audio>` and `<prefix>` placeholders, pictures and sounds to the inputs of DALI, and back.

Every placeholder in a prompt stands for one picture, one sound or the soft prefix; the processor repeats it as often
as the model has tokens for it.
"""

from collections.abc import Sequence

from transformers.image_utils import get_image_size, to_numpy_array
from transformers.processing_utils import MultiModalData

from .chat_templates import hearing_template, llava_v1_template
from .processing_audio import AudioCaptionKwargs, AudioCaptionProcessorMixin


class DaliProcessorKwargs(AudioCaptionKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`DaliProcessor`]."""


class DaliProcessor(AudioCaptionProcessorMixin):
    """
    Image processor, tokenizer and audio feature extractor in one.

    Args:
        image_processor, tokenizer: The captioner's.
        feature_extractor: The audio encoder's.
        patch_size: Side of the image tower's patches, in pixels.
        vision_feature_select_strategy: `"default"` leaves out the image tower's class token, `"full"` keeps it.
        num_additional_image_tokens: Class and other tokens of the image tower besides the patches.
        audio_seq_length: Audio tokens per clip.
        audio_grid: Rows (frequency) and columns (time) of the audio tokens, where these are patches; without it
            `trim_padding` is not to be had.
        prefix_length: Soft prefix tokens of the model.
        prefix_position: `"after_media"` or `"front"`: where [`caption_prompt`] puts the prefix.
        chat_template: Renders `image`, `audio`, `prefix` and `text` items; LLaVA's v1 conversation by default.
    """

    valid_processor_kwargs = DaliProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 0,
        audio_seq_length: int = 512,
        audio_grid: Sequence[int] | None = None,
        prefix_length: int = 0,
        prefix_position: str = "after_media",
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.audio_seq_length = audio_seq_length
        self.audio_grid = None if audio_grid is None else list(audio_grid)
        self.prefix_length = prefix_length
        self.prefix_position = prefix_position
        self.image_token = getattr(tokenizer, "image_token", image_token)
        template = chat_template or llava_v1_template(self.image_token)
        super().__init__(image_processor, tokenizer, feature_extractor, chat_template=template)
        self.tokenizer.padding_side = "left"  # the text of every row ends where its caption begins
        self.find_tokens("image", "audio", "prefix")

    @classmethod
    def for_model(cls, config, image_processor, tokenizer, feature_extractor, chat_template: str | None = None):
        """
        The processor that fits a model.

        Args:
            config: The model's `DaliConfig`.
            image_processor, tokenizer: The captioner's; the tokenizer knows `<audio>` and `<prefix>` (see
                [`DaliForConditionalGeneration.add_media_tokens`]).
            feature_extractor: The audio encoder's.
            chat_template: The captioner's own, if it has one; `audio` and `prefix` items are added to it. Without it,
                prompts are in LLaVA's v1 conversation.

        Raises:
            ValueError: if the template cannot be used.
        """
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
        if chat_template is not None:
            chat_template = hearing_template(chat_template, image_token, tokenizer.special_tokens_map)
        audio, vision = config.audio_config, config.vision_config
        has_class_token = vision.model_type.startswith("clip")
        return cls(
            image_processor,
            tokenizer,
            feature_extractor,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int(has_class_token),
            audio_seq_length=config.audio_seq_length,
            audio_grid=audio.grid if audio.model_type == "dali_audio" else None,
            prefix_length=config.prefix_length,
            prefix_position=config.prefix_position,
            image_token=image_token,
            chat_template=chat_template,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The block of placeholders of one picture."""
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self._count_image_tokens(height, width)

    def _count_image_tokens(self, height: int, width: int) -> int:
        tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return tokens - 1 if self.vision_feature_select_strategy == "default" else tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, audio_lengths=None, **kwargs) -> MultiModalData:
        """
        How many placeholders media take, told from their sizes. vLLM asks for it.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Height and width of each picture, in pixels.
            audio_lengths (`list[int]`, *optional*): Samples of each sound, at the feature extractor's rate.
            kwargs: As for a call.

        Returns:
            `MultiModalData`: `num_image_tokens` and `num_image_patches`, `num_audio_tokens`, for what was asked.
        """
        settings = self._merge_kwargs(**kwargs)
        counts = {}
        if image_sizes is not None:
            given, own = settings["images_kwargs"], self.image_processor
            cropped = given.get("do_center_crop", getattr(own, "do_center_crop", False))
            name = "crop_size" if cropped else "size"
            size = given.get(name) or getattr(own, name)
            counts["num_image_tokens"] = [self._count_image_tokens(size["height"], size["width"])] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if audio_lengths is not None:
            trim = settings["audio_kwargs"].get("trim_padding", False)
            counts["num_audio_tokens"] = [self.count_audio_tokens(length, trim) for length in audio_lengths]
        return MultiModalData(**counts)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call with a picture and a sound returns."""
        return ["input_ids", "attention_mask", "pixel_values", "input_features"]


DaliProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["DaliProcessor"]
