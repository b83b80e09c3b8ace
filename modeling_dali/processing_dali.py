"""
From text with `<image>`, `<audio>` and `<prefix>` placeholders, pictures and sounds to the inputs of DALI, and back.

Every placeholder in a prompt stands for one picture, one sound or the soft prefix; the processor repeats it as often
as the model has tokens for it.
"""

import math
from collections.abc import Sequence

import torch
from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import get_image_size, to_numpy_array
from transformers.processing_utils import AudioKwargs, ProcessingKwargs
from transformers.utils import logging

from .feature_extraction_dali import prepare_clips

logger = logging.get_logger(__name__)

QUESTION = "Describe the sound that can be heard in this scene."  # the released prefix was trained with it
MODALITIES = {"audio": ["audio"], "image": ["image"], "audio_image": ["image", "audio"]}  # in the prompt's order
IGNORED = -100  # labels the loss leaves out

# LLaVA's v1 conversation; a text that follows media stands on a line of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% else %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}"
    "{% if not loop.first and loop.previtem['type'] != 'text' %}{{ '\n' }}{% endif %}{{ item['text'] }}"
    "{% else %}<{{ item['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class DaliAudioKwargs(AudioKwargs, total=False):  # type: ignore[call-arg]
    """What calls may say about sound."""

    trim_padding: bool
    max_windows: int
    truncation: bool


class DaliProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """What calls may say."""

    audio_kwargs: DaliAudioKwargs
    suffix: str | list[str] | None


class DaliProcessor(ProcessorMixin):
    """
    Image processor, tokenizer and audio feature extractor in one.

    Args:
        image_processor, tokenizer: The captioner's.
        feature_extractor: The audio encoder's.
        patch_size: Of the image tower, in pixels.
        vision_feature_select_strategy: `"default"` leaves out the image tower's class token, `"full"` keeps it.
        num_additional_image_tokens: Class and other tokens of the image tower besides the patches.
        audio_seq_length: Audio tokens per clip.
        audio_grid: Rows (frequency) and columns (time) of the audio tokens, where these are patches; without it
            `trim_padding` is not to be had.
        prefix_length: Soft prefix tokens of the model.
        prefix_position: `"after_media"` or `"front"`: where [`caption_prompt`] puts the prefix.
        chat_template: LLaVA's v1 conversation by default.
    """

    valid_processor_kwargs = DaliProcessorKwargs
    text_kwargs = {"padding": True}
    audio_kwargs = {"trim_padding": False, "max_windows": 30, "truncation": False}
    audio_token = "<audio>"
    prefix_token = "<prefix>"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        patch_size: int | None = None,
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
        super().__init__(image_processor, tokenizer, feature_extractor, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokenizer.padding_side = "left"  # the text of every row ends where its caption begins
        for name in ("image", "audio", "prefix"):
            token = getattr(self, f"{name}_token")
            index = tokenizer.convert_tokens_to_ids(token)
            if index is None or index == tokenizer.unk_token_id:
                raise ValueError(
                    f"The tokenizer does not know {token}: call `model.add_media_tokens(tokenizer)` first."
                )
            setattr(self, f"{name}_token_id", index)

    @classmethod
    def for_model(cls, config, image_processor, tokenizer, feature_extractor, chat_template: str | None = None):
        """
        The processor that fits a model.

        Args:
            config: The model's `DaliConfig`.
            image_processor, tokenizer: The captioner's; the tokenizer knows `<audio>` and `<prefix>` (see
                [`DaliForConditionalGeneration.add_media_tokens`]).
            feature_extractor: The audio encoder's.
            chat_template: The captioner's, if it is not LLaVA's v1 conversation; must render `image`, `audio`,
                `prefix` and `text` items.
        """
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
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_index),
            chat_template=chat_template,
        )

    # Prompts --------------------------------------------------------------------------------------------------------

    def caption_prompt(self, modality: str = "audio", question: str = QUESTION, prefix: bool | None = None) -> str:
        """
        The prompt that asks for a caption of what can be heard.

        Args:
            modality: `"audio"`, `"image"` or `"audio_image"`; the image stands first.
            question: What to ask.
            prefix: Whether the soft prefix is part of the prompt; by default if the model holds one.

        Returns:
            `USER: <image><audio><prefix>\\nDescribe the sound ... ASSISTANT:`, less what is not asked for. A prefix at
            `"front"` stands before everything else.
        """
        if modality not in MODALITIES:
            raise ValueError(f"`modality` is one of {', '.join(MODALITIES)}, not {modality!r}.")
        if prefix is None:
            prefix = self.prefix_length > 0
        content = [{"type": name} for name in MODALITIES[modality]]
        if prefix and self.prefix_position == "after_media":
            content.append({"type": "prefix"})
        content.append({"type": "text", "text": question})
        prompt = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.prefix_token + prompt if prefix and self.prefix_position == "front" else prompt

    # Calling --------------------------------------------------------------------------------------------------------

    def __call__(self, images=None, text=None, audio=None, suffix=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: Pictures, in the order of the `<image>` placeholders.
            text: One prompt or several, with placeholders.
            audio: Sounds, in the order of the `<audio>` placeholders: numpy or torch arrays [samples] or [channels,
                samples], lists of samples, paths or URLs.
            suffix: What the model shall answer, one per prompt. Gives `labels`: -100 on prompt, media and padding,
                then the ids of the answer and the end of the text.
            sampling_rate: Of the sounds, in Hz; one for all or one for each.
            trim_padding: Leave out audio tokens that have heard padding only, so that a clip of 2 s costs a fifth of
                one of 10 s. Default off.
            max_windows: A sound longer than the feature extractor's clip (10.24 s) is split into up to so many
                windows, each with its own block of audio tokens. Default 30.
            truncation: Cut what is over `max_windows`, with a warning, in the place of raising an error. Default off.
            kwargs: For tokenizer, image processor and feature extractor, such as `return_tensors`, `padding`.

        Returns:
            `input_ids`, `attention_mask`, and as needed `pixel_values`, `input_features` [windows, 1024, 128],
            `input_features_mask` [windows, 1024] (with `trim_padding`) and `labels`. Padded on the left.

        Raises:
            TypeError: for a keyword that nothing here knows.
            ValueError: if placeholders and inputs differ in number, a sound is too long, or cannot be used.
        """
        if text is None:
            raise ValueError("`text` is needed: a prompt with placeholders, such as `processor.caption_prompt()`.")
        self._refuse_unknown(kwargs)
        kwargs.pop("videos", None)  # chat templates pass None
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        images, text, _, audio = self.prepare_inputs_layout(images=images, text=text, audio=audio)
        self.validate_inputs(images=images, text=text, audio=audio)

        image_inputs, image_blocks = self._process_images(images, **kwargs["images_kwargs"]) if images else ({}, [])
        audio_inputs, audio_blocks = self._process_audio(audio, **kwargs["audio_kwargs"]) if audio else ({}, [])
        text, _ = self.get_text_with_replacements(text, image_blocks, [], audio_blocks)
        text = [prompt.replace(self.prefix_token, self.prefix_token * self.prefix_length) for prompt in text]
        text_inputs = self._tokenize(text, suffix, **kwargs["text_kwargs"])
        return BatchFeature(
            {**text_inputs, **image_inputs, **audio_inputs}, kwargs["text_kwargs"].get("return_tensors")
        )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Lists of prompts, pictures and sounds from whatever form they were given in."""
        if (
            audio is not None
            and isinstance(audio, (list, tuple))
            and len(audio)
            and isinstance(audio[0], (int, float))
        ):
            audio = [audio]  # one clip as a list of samples
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that placeholders and inputs are as many, the prefix among them."""
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if self.prefix_length == 0 and any(self.prefix_token in prompt for prompt in text):
            raise ValueError(
                f"The text has a {self.prefix_token} placeholder, but the processor's `prefix_length` is 0: set it to "
                "that of the model."
            )

    def _refuse_unknown(self, kwargs: dict) -> None:
        groups = self.valid_processor_kwargs.__annotations__
        known = set(groups) | {"common_kwargs"} | set(self.image_processor.valid_kwargs.__annotations__)
        for name in ("text_kwargs", "images_kwargs", "audio_kwargs"):
            known |= set(groups[name].__annotations__)
        unknown = sorted(name for name in set(kwargs) - known if kwargs[name] is not None)
        if unknown:
            raise TypeError(f"Unknown arguments {unknown}: pictures are `images`, sounds are `audio`.")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The block of placeholders of one picture."""
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        if self.vision_feature_select_strategy == "default":
            tokens -= 1
        return self.image_token * tokens

    def _process_audio(self, audio: list, **kwargs) -> tuple[dict, list[str]]:
        """Features of all windows of all sounds, and for each sound its block of placeholders."""
        trim = kwargs.pop("trim_padding")
        max_windows = kwargs.pop("max_windows")
        truncation = kwargs.pop("truncation")
        windows, counts = self.split_windows(audio, kwargs.get("sampling_rate"), max_windows, truncation)
        extractor = self.feature_extractor
        features = extractor(
            [window.numpy() for window in windows], sampling_rate=extractor.sampling_rate, return_tensors="pt"
        )
        inputs = {"input_features": features[extractor.model_input_names[0]]}
        tokens = torch.full((len(windows),), self.audio_seq_length)
        if trim:
            if self.audio_grid is None:
                raise ValueError("`trim_padding` needs audio tokens that are patches in time; this encoder's are not.")
            rows, columns = self.audio_grid
            inputs["input_features_mask"] = features["input_features_mask"]
            tokens = rows * inputs["input_features_mask"].view(len(windows), columns, -1).any(-1).sum(-1)
        blocks = [self.audio_token * int(block.sum()) for block in tokens.split(counts)]
        return inputs, blocks

    def split_windows(
        self,
        audio: list,
        sampling_rate: int | Sequence[int] | None = None,
        max_windows: int = 30,
        truncation: bool = False,
    ) -> tuple[list[torch.Tensor], list[int]]:
        """
        Splits sounds into clips of the feature extractor's length.

        Returns:
            All windows [samples], mono at the extractor's rate, and the number of windows of each sound. A rest
            shorter than one frame stays with the window before it.

        Raises:
            ValueError: if a sound cannot be used, or has more than `max_windows` windows and `truncation` is off.
        """
        rate, length = self.feature_extractor.sampling_rate, window_samples(self.feature_extractor)
        shortest = getattr(self.feature_extractor, "frame_samples", 1)
        windows, counts = [], []
        for index, samples in enumerate(prepare_clips(audio, sampling_rate, rate)):
            count = max(1, math.ceil((len(samples) - shortest + 1) / length))
            if count > max_windows:
                message = (
                    f"Sound {index} is {len(samples) / rate:.1f} s long, over the {max_windows * length / rate:.1f} s "
                    f"of {max_windows} windows"
                )
                if not truncation:
                    raise ValueError(f"{message}: raise `max_windows`, or pass `truncation=True` to cut it.")
                logger.warning(f"{message}: what is over is cut.")
                count = max_windows
                samples = samples[: count * length]
            starts = [i * length for i in range(count)]
            windows += [samples[a:b] for a, b in zip(starts, [*starts[1:], len(samples)], strict=True)]
            counts.append(count)
        return windows, counts

    def _tokenize(self, text: list[str], suffix, return_tensors=None, padding=True, **kwargs) -> dict:
        """Ids, attention mask and, with a suffix, labels; padded on the left."""
        suffix = [suffix] if isinstance(suffix, str) else suffix
        if suffix is not None and len(suffix) != len(text):
            raise ValueError(f"There are {len(text)} prompts but {len(suffix)} suffixes.")
        kwargs.pop("return_token_type_ids", None)
        prompts = self.tokenizer(text, return_token_type_ids=False, **kwargs)["input_ids"]
        prompts = [self._prefix_to_front(ids) for ids in prompts]
        if suffix is None:
            return dict(self.tokenizer.pad({"input_ids": prompts}, padding=padding, return_tensors=return_tensors))
        answers = []
        for prompt, ids, answer in zip(text, prompts, suffix, strict=True):
            # Tokenised in one piece with the prompt, as the model will meet it when it generates.
            space = "" if prompt[-1:].isspace() else " "
            whole = self.tokenizer(prompt + space + answer.strip(), return_token_type_ids=False, **kwargs)["input_ids"]
            whole = self._prefix_to_front(whole)
            if whole[: len(ids)] != ids:
                raise ValueError(
                    f"The tokenizer merges the end of the prompt {prompt[-20:]!r} with the suffix {answer!r}."
                )
            answers.append([*whole[len(ids) :], self.tokenizer.eos_token_id])
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = dict(self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=None))
        inputs["labels"] = [
            [IGNORED] * (len(row) - len(answer)) + answer
            for row, answer in zip(inputs["input_ids"], answers, strict=True)
        ]
        return inputs

    def _prefix_to_front(self, ids: list[int]) -> list[int]:
        """A prompt that begins with the prefix: its soft tokens go before the tokenizer's begin-of-text token."""
        start = 1 if ids and ids[0] == self.tokenizer.bos_token_id else 0
        end = start
        while end < len(ids) and ids[end] == self.prefix_token_id:
            end += 1
        return ids[start:end] + ids[:start] + ids[end:]

    # Back to text ---------------------------------------------------------------------------------------------------

    def decode_captions(self, generated: torch.Tensor, inputs: dict) -> list[str]:
        """
        The captions in what `generate` returned.

        Args:
            generated: [B, length], prompts included.
            inputs: What went into `generate`.
        """
        answers = generated[:, inputs["input_ids"].shape[1] :]
        return [caption.strip() for caption in self.batch_decode(answers, skip_special_tokens=True)]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the processor can return."""
        return ["input_ids", "attention_mask", "pixel_values", "input_features", "input_features_mask"]


def window_samples(extractor) -> int:
    """
    Samples that one clip of a feature extractor holds.

    Raises:
        ValueError: for a feature extractor that is not known here.
    """
    for name in ("window_samples", "n_samples", "nb_max_samples"):  # DALI's, Whisper's, CLAP's
        if hasattr(extractor, name):
            return getattr(extractor, name)
    if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):  # AST's: frames of 10 ms
        return extractor.max_length * extractor.sampling_rate // 100
    raise ValueError(f"The length of a clip of {type(extractor).__name__} is not known.")


DaliProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["DaliProcessor"]
