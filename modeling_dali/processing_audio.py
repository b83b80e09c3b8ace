"""
What processors of captioners that hear have in common: `<audio>` and `<prefix>` placeholders, windows of long sounds,
prompts and labels.

Every placeholder in a prompt stands for one sound or for the soft prefix; the processor repeats it as often as the
model has tokens for it.
"""

import math
import re
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .audio_io import list_sounds, read_batch

logger = logging.get_logger(__name__)

QUESTION = "Describe the sound that can be heard in this scene."  # the released prefix was trained with it
MODALITIES = {"audio": ["audio"], "image": ["image"], "audio_image": ["image", "audio"]}  # in the prompt's order
IGNORED = -100  # labels the loss leaves out


class WindowKwargs(TypedDict, total=False):
    """Keyword arguments about sound."""

    sampling_rate: int | Sequence[int] | None
    trim_padding: bool
    max_windows: int
    truncation: bool
    return_tensors: str | None


class AudioCaptionKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of the processors of captioners that hear."""

    audio_kwargs: WindowKwargs  # type: ignore[misc]
    output_labels: bool


class AudioCaptionProcessorMixin(ProcessorMixin):
    """
    The sound half of a captioner's processor.

    A class that inherits from it has a `tokenizer` that knows `<audio>` and `<prefix>`, a `feature_extractor`, and
    sets:

    Attributes:
        audio_seq_length (`int`): Audio tokens per window.
        audio_grid (`list[int]`, *optional*): Rows (frequency) and columns (time) of the audio tokens, where these are
            patches; `trim_padding` needs it.
        prefix_length (`int`): Soft prefix tokens of the model.
        prefix_position (`str`): `"after_media"` or `"front"`: where [`caption_prompt`] puts the prefix.
    """

    valid_processor_kwargs = AudioCaptionKwargs
    text_kwargs = {"padding": True, "return_token_type_ids": False}
    output_labels = False
    audio_token = "<audio>"
    prefix_token = "<prefix>"

    audio_seq_length: int
    audio_grid: list[int] | None
    prefix_length: int
    prefix_position: str

    def find_tokens(self, *names: str) -> None:
        """
        Looks up the ids of placeholders: `audio_token_id` of `audio_token`, and so on.

        Raises:
            ValueError: if the tokenizer does not know one of them.
        """
        for name in names:
            token = getattr(self, f"{name}_token")
            index = self.tokenizer.convert_tokens_to_ids(token)
            if index is None or index == self.tokenizer.unk_token_id:
                raise ValueError(
                    f"The tokenizer does not know {token}: call `model.add_media_tokens(tokenizer)` first."
                )
            setattr(self, f"{name}_token_id", index)

    def follow(self, config) -> None:
        """
        Takes over from a model's configuration what training changes in it: how long its soft prefix is and where it
        stands. Call it whenever a prefix was added to the model, loaded or taken off.
        """
        self.prefix_length = config.prefix_length
        self.prefix_position = config.prefix_position

    # Prompts --------------------------------------------------------------------------------------------------------

    def caption_prompt(self, modality: str = "audio", question: str = QUESTION, prefix: bool | None = None) -> str:
        """
        The prompt that asks for a caption of what can be heard.

        Args:
            modality (`str`, defaults to `"audio"`): `"audio"`, `"image"` or `"audio_image"`; the image stands first.
            question (`str`): What to ask.
            prefix (`bool`, *optional*): Whether the soft prefix is part of the prompt; by default if the model holds
                one.

        Returns:
            `str`: By the chat template; in LLaVA's v1 conversation its system sentence, then
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
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            prompt = prompt.removeprefix(bos)  # the tokenizer writes it itself
        return self.prefix_token + prompt if prefix and self.prefix_position == "front" else prompt

    # Calling --------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        audio: AudioInput | None = None,
        suffix: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: Pictures, in the order of the `<image>` placeholders.
            text (`str` or `list[str]`): One prompt or several, with placeholders.
            audio: Sounds, in the order of the `<audio>` placeholders: paths, URLs, bytes, arrays [samples] or
                [channels, samples], ..., as [`read_audio`] takes them. An array that stands alone is one sound.
            suffix (`str` or `list[str]`, *optional*): What the model shall answer, one per prompt. Gives `labels`:
                -100 on prompt, media and padding, then the ids of the answer and the end of the text.
            output_labels (`bool`, defaults to `False`): Without `suffix`, gives `labels` too: the ids of the whole
                text, -100 on media, prefix and padding.
            sampling_rate (`int` or `list[int]`, *optional*): Of arrays, in Hz; one for all or one for each. Files
                know their own.
            trim_padding (`bool`, defaults to `False`): Leave out audio tokens that have heard padding only, so that
                a clip of 2 s costs a fifth of one of 10 s.
            max_windows (`int`, defaults to 30): A sound longer than the feature extractor's clip (10.24 s) is split
                into up to so many windows, each with its own block of audio tokens.
            truncation (`bool`, defaults to `False`): Cut what is over `max_windows`, with a warning, in the place of
                raising an error. The text is cut too only where `max_length` is given, which says at how many tokens.
            kwargs: For tokenizer and image processor, such as `return_tensors`, `padding`, `padding_side`, flat or
                as `text_kwargs`, `images_kwargs`, `audio_kwargs`.

        Returns:
            `input_ids`, `attention_mask`, and as needed `pixel_values`, `input_features` [windows, 1024, 128],
            `input_features_mask` [windows, 1024] (with `trim_padding`) and `labels`; lists without `return_tensors`.
            Padded on the left by default.

        Raises:
            TypeError: for a keyword that nothing here knows.
            ValueError: if placeholders and inputs differ in number, a sound is too long, or cannot be used.
        """
        if text is None:
            raise ValueError("`text` is needed: a prompt with placeholders, such as `processor.caption_prompt()`.")
        settings = self._merge_kwargs(**kwargs)
        with_labels = suffix is not None or settings["output_labels"]
        if with_labels:
            self._check_label_settings(settings["text_kwargs"])
        answer_lengths = None
        if suffix is not None:
            text, answer_lengths = self.append_answers(text, suffix)
        inputs = self.read(images, text, audio, **kwargs)
        self.move_prefix_to_front(inputs)
        if with_labels:
            inputs["labels"] = self.make_labels(inputs, answer_lengths)
        return inputs

    def read(self, images, text, audio, **kwargs) -> BatchFeature:
        """Ids and features, without labels."""
        return super().__call__(images=images, text=text, audio=audio, **kwargs)

    def image_inputs(self, pictures: list) -> dict[str, torch.Tensor]:
        """What `get_image_tokens` takes for these pictures."""
        return dict(self.image_processor(pictures, return_tensors="pt"))

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Lists of prompts, pictures and sounds from whatever form they were given in."""
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        return images, text, videos, list_sounds(audio)  # unread: transformers would bring files to another rate

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that placeholders and inputs are as many, the prefix among them."""
        if videos is not None:
            raise TypeError("Videos are not taken: give their sound as `audio` and one of their frames as `images`.")
        super().validate_inputs(images=images, text=text, audio=audio, **kwargs)
        if self.prefix_length == 0 and any(self.prefix_token in prompt for prompt in text):
            raise ValueError(
                f"The text has a {self.prefix_token} placeholder, but the processor's `prefix_length` is 0: call "
                "`processor.follow(model.config)`."
            )

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        """
        Pictures and sounds of conversations. Sounds are unread: the call itself reads them, at their own rates. With
        `load_audio_from_video` a video gives its sound, to an empty `audio` item behind it or in its own place.
        """
        images: list[list] = [[] for _ in conversations]
        sounds = []
        for pictures, conversation in zip(images, conversations, strict=True):
            for message in conversation:
                if isinstance(message.get("content") or "", str):
                    continue
                items: list[dict] = []
                for item in message["content"]:
                    if item["type"] == "image":
                        pictures += media_of(item)
                    elif item["type"] == "audio" or (item["type"] == "video" and load_audio_from_video):
                        if item == {"type": "audio"} and items and items[-1]["type"] == "video":
                            continue  # the video before it is heard here
                        sounds += media_of(item)
                    elif item["type"] == "video":
                        raise ValueError("A video in a chat can be heard only: pass `load_audio_from_video=True`.")
                    items.append(item)
                message["content"] = [{"type": "audio"} if item["type"] == "video" else item for item in items]
        return images, [], sounds, {}

    def _merge_kwargs(self, ModelProcessorKwargs=None, tokenizer_init_kwargs=None, **kwargs) -> dict:
        """The base class's; refuses what it would drop, and settles what `truncation` cuts."""
        self._refuse_unknown(kwargs)
        if "truncation" in kwargs:
            truncation = kwargs.pop("truncation")
            text_kwargs = kwargs.get("text_kwargs", {})
            cut = {"audio_kwargs": truncation not in (None, False, "do_not_truncate")}
            if kwargs.get("max_length", text_kwargs.get("max_length")) is not None:
                cut["text_kwargs"] = truncation
            for group, value in cut.items():
                if "truncation" in kwargs.get(group, {}):
                    raise ValueError(f"`truncation` was passed twice: in `{group}` and as a keyword of its own.")
                kwargs[group] = {**kwargs.get(group, {}), "truncation": value}
        return super()._merge_kwargs(ModelProcessorKwargs, tokenizer_init_kwargs, **kwargs)

    def _refuse_unknown(self, kwargs: dict) -> None:
        groups = self.valid_processor_kwargs.__annotations__
        known = {name: set(group.__annotations__) for name, group in groups.items() if name.endswith("_kwargs")}
        known["images_kwargs"] |= set(self.image_processor.valid_kwargs.__annotations__)
        # Keywords for videos are let through, as transformers does: there is no video for them to act on.
        flat = set(groups) | {"common_kwargs", "videos"} | set().union(*known.values())
        unknown = [name for name in set(kwargs) - flat if kwargs[name] is not None]
        for group in known:
            unknown += [f"{group}[{name!r}]" for name in set(kwargs.get(group, {})) - known[group]]
        if unknown:
            raise TypeError(f"Unknown arguments {sorted(unknown)}: pictures are `images`, sounds are `audio`.")

    @staticmethod
    def _check_label_settings(text_kwargs: dict) -> None:
        if text_kwargs.get("truncation") not in (None, False, "do_not_truncate"):
            raise ValueError("Text cannot be truncated where it gives labels: shorten it instead.")
        if text_kwargs.get("return_attention_mask") is False:
            raise ValueError("Labels are made with the attention mask: leave `return_attention_mask` on.")

    # Sound ----------------------------------------------------------------------------------------------------------

    def _process_audio(
        self,
        audio: list,
        sampling_rate: int | Sequence[int] | None = None,
        trim_padding: bool = False,
        max_windows: int = 30,
        truncation: bool = False,
        return_tensors: str | None = None,
    ) -> tuple[dict, list[str]]:
        """Features of all windows of all sounds, and for each sound its block of placeholders."""
        windows, counts = self.split_windows(audio, sampling_rate, max_windows, truncation)
        extractor = self.feature_extractor
        features = extractor(
            [window.numpy() for window in windows], sampling_rate=extractor.sampling_rate, return_tensors="pt"
        )
        inputs = {"input_features": features[extractor.model_input_names[0]]}
        tokens = torch.full((len(windows),), self.audio_seq_length)
        if trim_padding:
            rows, columns = self._require_grid()
            inputs["input_features_mask"] = features["input_features_mask"]
            tokens = rows * inputs["input_features_mask"].view(len(windows), columns, -1).any(-1).sum(-1)
        if return_tensors is None:
            inputs = {name: list(tensor.numpy()) for name, tensor in inputs.items()}
        return inputs, [self.audio_token * int(block.sum()) for block in tokens.split(counts)]

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
        windows, counts = [], []
        for index, clip in enumerate(read_batch(audio, sampling_rate, rate)):
            samples = torch.from_numpy(clip)
            count = self.count_windows(len(samples))
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

    def count_windows(self, samples: int) -> int:
        """Windows of a sound of so many samples at the feature extractor's rate."""
        shortest = getattr(self.feature_extractor, "frame_samples", 1)
        return max(1, math.ceil((samples - shortest + 1) / window_samples(self.feature_extractor)))

    def count_audio_tokens(self, samples: int, trim_padding: bool = False) -> int:
        """Audio tokens of a sound of so many samples at the feature extractor's rate."""
        windows = self.count_windows(samples)
        if not trim_padding:
            return windows * self.audio_seq_length
        extractor = self.feature_extractor
        rows, columns = self._require_grid()
        rest = samples - (windows - 1) * window_samples(extractor)
        frames = min((rest - extractor.frame_samples) // extractor.hop_samples + 1, extractor.num_frames)
        return rows * ((windows - 1) * columns + math.ceil(frames * columns / extractor.num_frames))

    def _require_grid(self) -> list[int]:
        if self.audio_grid is None:
            raise ValueError("`trim_padding` needs audio tokens that are patches in time; this encoder's are not.")
        return self.audio_grid

    # Text -----------------------------------------------------------------------------------------------------------

    def get_text_with_replacements(
        self, text, images_replacements=(), videos_replacements=(), audio_replacements=()
    ) -> tuple[list[str], list[list[dict]]]:
        """The base class's; `<prefix>` too stands for as many placeholders as there are tokens."""
        token, block = self.prefix_token, self.prefix_token * self.prefix_length
        gain = len(block) - len(token)
        starts = [[match.start() for match in re.finditer(re.escape(token), prompt)] for prompt in text]
        text = [prompt.replace(token, block) for prompt in text]
        text, offsets = super().get_text_with_replacements(
            text, images_replacements, videos_replacements, audio_replacements
        )
        for entries, prefixes in zip(offsets, starts, strict=True):
            expanded = [start + number * gain for number, start in enumerate(prefixes)]
            media_gains = [(entry["span"][0], len(entry["replacement"]) - len(entry["text"])) for entry in entries]
            for entry in entries:  # back to places in the text as it was given
                shift = gain * sum(start < entry["span"][0] for start in expanded)
                entry["span"] = (entry["span"][0] - shift, entry["span"][1] - shift)
            for start, place in zip(prefixes, expanded, strict=True):
                place += sum(gained for media, gained in media_gains if media < place)
                entries.append(
                    {
                        "type": "prefix",
                        "span": (start, start + len(token)),
                        "new_span": (place, place + len(block)),
                        "text": token,
                        "replacement": block,
                    }
                )
            entries.sort(key=lambda entry: entry["span"])
        return text, offsets

    def append_answers(self, text: str | list[str], suffix: str | list[str]) -> tuple[list[str], list[int]]:
        """
        Puts answers behind their prompts, each with the end of the text.

        Returns:
            The texts, and how many tokens each answer has.

        Raises:
            ValueError: if prompts and answers differ in number, or the tokenizer merges the end of a prompt with the
                start of its answer, which then could not be told apart.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        answers = [suffix] if isinstance(suffix, str) else list(suffix)
        if len(answers) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts but {len(answers)} suffixes.")
        wholes, lengths = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            # Tokenised in one piece with the prompt, as the model will meet it when it generates.
            space = "" if prompt[-1:].isspace() else " "
            whole = prompt + space + answer.strip() + self.tokenizer.eos_token
            ids, whole_ids = self.tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
            if whole_ids[: len(ids)] != ids:
                raise ValueError(
                    f"The tokenizer merges the end of the prompt {prompt[-20:]!r} with the suffix {answer!r}."
                )
            wholes.append(whole)
            lengths.append(len(whole_ids) - len(ids))
        return wholes, lengths

    def make_labels(self, inputs: BatchFeature, answer_lengths: list[int] | None = None):
        """
        What the model shall predict.

        Args:
            inputs: With `input_ids` and `attention_mask`, padded on any side.
            answer_lengths: Tokens at the end of each text that are its answer; without it, all but placeholders are.

        Returns:
            `input_ids` with -100 on everything else, in their form: tensor, array or lists.
        """
        ids = inputs["input_ids"]
        rows, masks = ids, inputs["attention_mask"]
        if not isinstance(ids, list):
            rows, masks = rows.tolist(), masks.tolist()
        media = {getattr(self, f"{name}_token_id") for name in ("image", "audio", "prefix")}
        labels = []
        for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            end = len(mask) - mask[::-1].index(1)
            first = end - answer_lengths[index] if answer_lengths else mask.index(1)
            answer = [IGNORED if token in media else token for token in row[first:end]]
            labels.append([IGNORED] * first + answer + [IGNORED] * (len(row) - end))
        if isinstance(ids, torch.Tensor):
            return torch.tensor(labels)
        return np.array(labels) if isinstance(ids, np.ndarray) else labels

    def move_prefix_to_front(self, inputs: BatchFeature) -> None:
        """Where a text begins with the prefix, puts its soft tokens before the tokenizer's begin-of-text token."""
        bos, prefix = self.tokenizer.bos_token_id, self.prefix_token_id
        for index, ids in enumerate(inputs["input_ids"] if self.prefix_length else []):
            row = ids if isinstance(ids, list) else ids.tolist()
            starts = [place for place in range(len(row)) if row[place : place + 2] == [bos, prefix]]
            for start in starts[:1]:
                end = start + 1 + self.prefix_length
                order = [*range(start + 1, end), start]
                for name in ("input_ids", "offset_mapping"):
                    if name in inputs:
                        values = inputs[name][index]
                        values[start:end] = (
                            [values[place] for place in order] if isinstance(values, list) else values[order]
                        )

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


def media_of(item: dict) -> list:
    """The media that an item of a chat message holds, under whichever of the usual names."""
    return [item[name] for name in (item["type"], "url", "path", "base64") if name in item]


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
