"""
DALI with a captioner of any image-text-to-text class.

The captioner stays whole: its weights, its code, its ids and what its own processor gives. While it runs, what its
word embedding gives where `<audio>` and `<prefix>` placeholders stand is replaced by what the ear makes of sound.
Positions, masks, features of pictures and generation are the captioner's own, since it reads the same ids.
"""

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.utils import TransformersKwargs

from .configuration_dali import AlignmentTarget, DaliCaptionerConfig
from .ear_dali import EarMixin, fill_placeholders, misfit
from .modeling_dali_utils import (
    DaliMixin,
    FiniteLogits,
    at_hand,
    ear_fields,
    find_captioner,
    find_ear,
    require_all_weights,
)

# Where captioners whose projector works token by token have it.
TOKENWISE_PROJECTORS = {
    "idefics3": "connector.modality_projection",
    "internvl": "multi_modal_projector",
    "llava": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
    "llava_onevision": "multi_modal_projector",
    "paligemma": "multi_modal_projector",
    "smolvlm": "connector.modality_projection",
    "vipllava": "multi_modal_projector",
}
KNOWN_KWARGS = {"past_key_values", "use_cache", *TransformersKwargs.__annotations__}


class ResidualProjector(nn.Module):
    """A residual MLP within the language model's space, which starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens` [..., width] -> the same shape."""
        return tokens + self.linear_2(nn.functional.gelu(self.linear_1(tokens)))


class DaliEar(EarMixin):
    """The ear beside a captioner of any class."""

    config: DaliCaptionerConfig
    config_class = DaliCaptionerConfig
    input_modalities = ("audio",)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: DaliCaptionerConfig, captioner: PreTrainedModel, audio_encoder=None):
        super().__init__(config)
        width, projector = config.get_text_config().hidden_size, None
        if config.alignment_target == "projector_input":
            projector = copy_projector(captioner)
            width = next(layer.in_features for layer in projector.modules() if isinstance(layer, nn.Linear))
        self.build_ear(width, projector or ResidualProjector(width), audio_encoder)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ResidualProjector):
            init.zeros_(module.linear_2.weight)
            init.zeros_(module.linear_2.bias)


class DaliForImageTextToText(DaliMixin, GenerationMixin):
    """
    A captioner of any image-text-to-text class that takes pictures, sounds or both.

    Example:

    ```python
    model = DaliForImageTextToText.from_captioner("Qwen/Qwen2.5-VL-3B-Instruct", ear="someone/an-ear")
    processor = AutoProcessor.from_pretrained("someone/an-ear", trust_remote_code=True)
    prompt = processor.caption_prompt("audio")
    inputs = processor(text=prompt, audio=waveform, sampling_rate=16_000, return_tensors="pt")
    print(processor.decode_captions(model.generate(**inputs), inputs))
    ```
    """

    config: DaliCaptionerConfig
    config_class = DaliCaptionerConfig
    input_modalities = ("image", "audio", "text")
    ear_key = "ear."
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: DaliCaptionerConfig, captioner: PreTrainedModel | None = None, audio_encoder=None):
        super().__init__(config)
        if captioner is None:
            captioner = AutoModelForImageTextToText.from_config(config.captioner_config)
        else:
            for module in captioner.modules():
                module._is_hf_initialized = True  # `post_init` would draw anew what PEFT has put into it
        config.captioner_config = captioner.config
        self.captioner = captioner
        self.ear = DaliEar(config, captioner, audio_encoder)
        self.post_init()

    @classmethod
    def from_captioner(
        cls,
        captioner: "str | os.PathLike | PreTrainedModel",
        audio_encoder: "str | os.PathLike | PreTrainedModel | None" = None,
        *,
        audio_config=None,
        tokenizer=None,
        audio_token_index: int | None = None,
        prefix_token_index: int | None = None,
        alignment_target: AlignmentTarget | None = None,
        ear: str | os.PathLike | None = None,
        **kwargs,
    ) -> "DaliForImageTextToText":
        """
        Gives a captioner an ear.

        Args:
            captioner: A model of any image-text-to-text class, also quantised, offloaded or wrapped by PEFT, which
                becomes part of the result; or a folder or Hub id of one.
            audio_encoder: Where the ear starts from: a CAV-MAE or DALI checkpoint (`.pth`; of a DALI one the
                projection is taken too), or an audio model, which becomes part of the result. Without it the audio
                encoder starts from random weights.
            audio_config: Configuration of a new audio encoder; `DaliAudioConfig()` by default.
            tokenizer: The captioner's; `<audio>` and `<prefix>` are added to it (see [`add_media_tokens`]).
            audio_token_index, prefix_token_index (`int`): Without a tokenizer: ids of the placeholders, within the
                vocabulary, which mean nothing else to the captioner.
            alignment_target (`str`, *optional*): See [`DaliCaptionerConfig`]. By default before the projector where
                that is known to work token by token and is not quantised, behind it elsewhere.
            ear: Folder or Hub id of a trained ear (see [`save_ear`]), in the place of all arguments but `captioner`.
            kwargs: For `AutoModelForImageTextToText.from_pretrained`, such as `dtype`, `revision` or
                `quantization_config`.

        Raises:
            ValueError: if a checkpoint does not fit, there are no placeholders, or the ear was made for another
                captioner.
        """
        base: Any = captioner
        is_stock = not isinstance(captioner, nn.Module)
        if is_stock:
            base, info = AutoModelForImageTextToText.from_pretrained(captioner, output_loading_info=True, **kwargs)
            require_all_weights(info | {"unexpected_keys": []}, str(captioner))
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} apply where a checkpoint is loaded; a model was given.")
        fields: dict[str, Any] = {"captioner_config": copy.deepcopy(base.config)}
        if ear is not None:
            folder = find_ear(ear)
            ear_config = cls.config_class.from_pretrained(folder)
            fields |= ear_fields(ear_config) | {"alignment_target": ear_config.alignment_target}
        else:
            copied = base.config.model_type in TOKENWISE_PROJECTORS and not is_quantised(base)
            fields["alignment_target"] = alignment_target or ("projector_input" if copied else "projector_output")
            if fields["alignment_target"] == "projector_input" and is_quantised(base):
                raise ValueError("A quantised projector cannot be copied: align behind it (`projector_output`).")
            fields["audio_config"] = getattr(audio_encoder, "config", audio_config)
        if ear is None and tokenizer is None:
            vocabulary = base.get_input_embeddings().num_embeddings
            indices = {"audio_token_index": audio_token_index, "prefix_token_index": prefix_token_index}
            if not all(index is not None and 0 <= index < vocabulary for index in indices.values()):
                raise ValueError(
                    "Give the captioner's `tokenizer`, or as `audio_token_index` and `prefix_token_index` two ids "
                    f"below {vocabulary}, the size of the captioner's vocabulary."
                )
            fields |= indices
        model = cls(cls.config_class(**fields), base, audio_encoder)
        model.ear.to("cpu" if base.device.type == "meta" else base.device, base.dtype)
        model.generation_config = copy.deepcopy(base.generation_config)
        model.generation_config.max_new_tokens = 64
        if ear is not None:
            model.load_ear(folder, ear_config)
        elif tokenizer is not None:
            model.add_media_tokens(tokenizer)
        model.suppress_placeholders()
        model.name_base(base, is_stock)
        return model.train(base.training)

    @classmethod
    def from_base(cls, captioner: "str | os.PathLike | PreTrainedModel", **kwargs) -> "DaliForImageTextToText":
        """[`from_captioner`] by the name that it has in every class."""
        return cls.from_captioner(captioner, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        As [`DaliMixin.save_pretrained`].

        Raises:
            ValueError: for a captioner that would not load again: a quantised one, or one wrapped by PEFT.
        """
        if is_quantised(self.captioner) or find_captioner(self) is not self.captioner:
            raise ValueError(
                "A captioner that is quantised or wrapped by PEFT cannot be saved as a part: save the ear alone "
                "(`save_ear`), and give it to `from_captioner` as `ear`."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    # What is the captioner's ----------------------------------------------------------------------------------------

    @property
    def generation_config(self):
        """The captioner's."""
        return self.captioner.generation_config

    @generation_config.setter
    def generation_config(self, value) -> None:
        if "captioner" in self._modules:  # the base class sets one before there is a captioner
            self.captioner.generation_config = value

    @property
    def image_modules(self) -> dict[str, nn.Module]:
        """The modules that make image tokens, by their names in this model: all but the language model."""
        base = find_captioner(self).base_model
        parts = [child for child in base.children() if child is not base.get_decoder()]
        return {name: module for name, module in self.named_modules() if any(module is part for part in parts)}

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by `num_items_in_batch`; `Trainer` asks."""
        return getattr(self.captioner, "accepts_loss_kwargs", True)

    def get_input_embeddings(self) -> nn.Module:
        """The captioner's."""
        return self.captioner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The captioner's."""
        return self.captioner.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resizes the captioner's."""
        return self.captioner.resize_token_embeddings(*args, **kwargs)

    def tie_weights(self, *args, **kwargs):
        """Ties the captioner's weights; those of one that PEFT has wrapped are tied, but under other names."""
        if find_captioner(self) is self.captioner:
            super().tie_weights(*args, **kwargs)

    # Forward and generation -----------------------------------------------------------------------------------------

    def get_image_tokens(self, **inputs) -> torch.Tensor | list[torch.Tensor]:
        """
        Image tokens that audio tokens are aligned with (see `alignment_target` of [`DaliCaptionerConfig`]).

        Args:
            inputs: What the captioner's image processor gives: `pixel_values`, and as needed `image_grid_thw`,
                `image_sizes`, `pixel_attention_mask`, ...

        Returns:
            [pictures, tokens, width]; a list of [tokens, width] where pictures differ in tokens. Tiles count as
            pictures, unless `pixel_values` [pictures, tiles, ...] holds those of a picture together.
        """
        captioner, seen = find_captioner(self), []
        if self.config.alignment_target == "projector_input":
            projector = captioner.base_model.get_submodule(TOKENWISE_PROJECTORS[captioner.config.model_type])
            handle = projector.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
            try:
                captioner.get_image_features(**inputs, return_dict=True)
            finally:
                handle.remove()
        else:
            seen = list(captioner.get_image_features(**inputs, return_dict=True).pooler_output)
        pixels = inputs["pixel_values"]
        if pixels.ndim == 5 and len(seen) != len(pixels):  # tiles in a row: whose, tells a picture alone
            if len(pixels) == 1:
                return torch.cat(seen)[None]
            alone = ({name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(pixels)))
            seen = [self.get_image_tokens(**picture)[0] for picture in alone]
        return torch.stack(seen) if len({len(tokens) for tokens in seen}) == 1 else seen

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        **inputs,
    ):
        """
        The captioner's forward with two more inputs.

        Args:
            input_features: Log-mel frames [clips, 1024, 128], in the order of the `<audio>` blocks of the batch.
            input_features_mask: [clips, 1024]. Give it to leave out audio tokens that are padding only; the text then
                has as many fewer placeholders (`trim_padding=True` of the processor).
            inputs: The captioner's own.

        Returns:
            The captioner's outputs.

        Raises:
            TypeError: for an argument that the captioner does not know: it would be left out without a word.
            ValueError: if placeholders and features differ in number, or there are no `input_ids`.
        """
        known = {*KNOWN_KWARGS, *inspect.signature(find_captioner(self).forward).parameters}
        unknown = [name for name, value in inputs.items() if name not in known and value is not None]
        if unknown:
            raise TypeError(f"Unknown inputs {unknown}: sound is `input_features`, the others are the captioner's.")
        with self.hearing(input_ids, input_features, input_features_mask):
            return self.captioner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """
        The captioner's `generate` with the inputs of [`forward`]. With the cache of an earlier turn, the ids and
        sounds are those of the whole conversation.

        Raises:
            ValueError: as `forward` does, for logits that are not finite, and for what would be left out without a
                word: PEFT's prompt tuning of this model, and a prompt read in pieces.
        """
        owner: Any = getattr(self.prepare_inputs_for_generation, "__self__", self)  # PEFT puts its own in its place
        if owner is not self and owner.active_peft_config.is_prompt_learning:
            raise ValueError("PEFT's prompt tuning does not reach the captioner: use `add_prefix`.")
        settings = generation_config or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("`prefill_chunk_size` would part placeholders from their sounds: leave it out.")
        processors = LogitsProcessorList([FiniteLogits(), *(logits_processor or [])])
        input_ids = kwargs.pop("input_ids", inputs)
        sound = kwargs.pop("input_features", None), kwargs.pop("input_features_mask", None)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        with self.hearing(input_ids, *sound, read=0 if cache is None else cache.get_seq_length()):
            return self.captioner.generate(input_ids, generation_config, processors, **kwargs)

    @contextmanager
    def hearing(self, input_ids, input_features=None, input_features_mask=None, read: int = 0) -> Iterator[None]:
        """
        Makes the captioner's word embedding give soft tokens where the placeholders of a prompt stand.

        Args:
            input_ids: The prompt [B, length].
            input_features, input_features_mask: See [`forward`].
            read: How many tokens of the prompt the captioner has in its cache already.
        """
        if input_ids is None:
            raise ValueError("Give `input_ids`: the captioner's positions and masks follow from them.")
        config, rows = self.config, []
        if input_features is not None:
            tokens = torch.cat(list(self.get_audio_features(input_features, input_features_mask).pooler_output))
            placeholders = input_ids == config.audio_token_index
            counts, known = placeholders.sum(-1).tolist(), placeholders[:, :read].sum(-1).tolist()
            if sum(counts) != len(tokens):
                raise ValueError(misfit("audio", sum(counts), len(tokens)))
            rows = [row[start:] for row, start in zip(tokens.split(counts), known, strict=True)]
        batch, length = len(input_ids), input_ids.shape[1] - read

        def replace(module, args, embeddings):
            ids = args[0]
            if ids.ndim != 2 or ids.shape[1] < length:  # what the captioner has written since
                return embeddings
            ids = ids[:, :length]  # without a cache it reads all again
            copies = len(ids) // batch  # beams, or several answers
            features = torch.cat([row for row in rows for _ in range(copies)]) if rows else None
            prompt = fill_placeholders("audio", features, ids == config.audio_token_index, embeddings[:, :length])
            prompt = self.ear.fill_prefix(ids == config.prefix_token_index, prompt)
            return torch.cat([prompt, embeddings[:, length:]], dim=1)

        handle = self.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def is_quantised(captioner: PreTrainedModel) -> bool:
    """Whether the weights of a captioner are quantised."""
    return getattr(captioner, "hf_quantizer", None) is not None


def copy_projector(captioner: PreTrainedModel) -> nn.Module:
    """
    A copy of a projector that works token by token; with random weights where that of the captioner is quantised.

    Raises:
        ValueError: if the captioner's class is not known to have one.
    """
    path = TOKENWISE_PROJECTORS.get(captioner.config.model_type)
    if path is None:
        raise ValueError(
            f"The projector of a {captioner.config.model_type} captioner is not known to work token by token: align "
            "behind it (`alignment_target='projector_output'`)."
        )
    captioner = captioner.get_base_model() if hasattr(captioner, "get_base_model") else captioner
    if is_quantised(captioner):
        config = copy.deepcopy(captioner.config)
        del config.quantization_config
        with torch.device("meta"):
            captioner = AutoModelForImageTextToText.from_config(config)
        return captioner.base_model.get_submodule(path).to_empty(device="cpu")
    projector = captioner.base_model.get_submodule(path)
    with at_hand(projector):
        return remove_hook_from_module(copy.deepcopy(projector), recurse=True).requires_grad_(True)


DaliForImageTextToText.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["DaliForImageTextToText"]
