"""Configurations of DALI: the CAV-MAE audio encoder, and captioners with an ear, LLaVA or any other."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.type_validators import activation_fn_key, interval

PrefixPosition = Literal["after_media", "front"]
AlignmentTarget = Literal["projector_input", "projector_output"]


@strict
class DaliAudioConfig(PreTrainedConfig):
    """
    The audio branch of CAV-MAE: a ViT on log-mel patches.

    Args:
        num_frames: Frames of the log-mel input (time).
        num_mel_bins: Mel bins of the log-mel input (frequency).
        patch_size: Side of the square patches, which do not overlap; divides both sizes above.
        hidden_size: Width of the tokens. This and what follows is as in any ViT.
        num_hidden_layers: Transformer blocks.
        num_attention_heads: Heads of each block; divide the width.
        intermediate_size: Width of the MLP.
        hidden_act: Its activation.
        layer_norm_eps: Of every LayerNorm.
        attention_dropout: Share of attention weights that are dropped in training.
        initializer_range: Standard deviation of new weights.

    Source: CAV-MAE's audio branch as used by DALI (8 x 64 = 512 tokens of width 768).
    """

    model_type = "dali_audio"
    base_config_key = "audio_config"

    num_frames: int = interval(min=1)(default=1024)
    num_mel_bins: int = interval(min=1)(default=128)
    patch_size: int = interval(min=1)(default=16)
    hidden_size: int = interval(min=1)(default=768)
    num_hidden_layers: int = interval(min=1)(default=12)
    num_attention_heads: int = interval(min=1)(default=12)
    intermediate_size: int = interval(min=1)(default=3072)
    hidden_act: str = activation_fn_key(default="gelu")
    layer_norm_eps: float = interval(min=0.0, max=1.0)(default=1e-5)
    attention_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_frames", "num_mel_bins"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be a multiple of `patch_size` ({self.patch_size})."
                )
        if self.hidden_size % (2 * self.num_attention_heads) or self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of 4 (for sin-cos positions) and of twice "
                f"`num_attention_heads` ({self.num_attention_heads})."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches over frequency and over time; tokens run over frequency first, so (8, 64) is 8 rows of 64 tokens."""
        return self.num_mel_bins // self.patch_size, self.num_frames // self.patch_size

    @property
    def max_source_positions(self) -> int:
        """Tokens of one clip, by the name that Whisper gives them and vLLM asks for."""
        rows, columns = self.grid
        return rows * columns


def count_audio_tokens(audio_config: PreTrainedConfig) -> int:
    """
    Tokens that an audio encoder gives for one clip.

    Raises:
        ValueError: for an encoder that is not known here; set `DaliConfig.audio_seq_length` then.
    """
    match audio_config.model_type:
        case "dali_audio":
            rows, columns = audio_config.grid
            return rows * columns
        case "audio-spectrogram-transformer":
            rows = (audio_config.num_mel_bins - audio_config.patch_size) // audio_config.frequency_stride + 1
            columns = (audio_config.max_length - audio_config.patch_size) // audio_config.time_stride + 1
            return rows * columns + 2  # class and distillation tokens
        case "whisper":
            return audio_config.max_source_positions
        case "clap_audio_model":  # square patches, merged two by two between stages
            side = audio_config.spec_size // audio_config.patch_stride[0] // 2 ** (len(audio_config.depths) - 1)
            return side * side
        case other:
            raise ValueError(
                f"The number of tokens of the audio encoder `{other}` is not known: give it as `audio_seq_length`."
            )


def audio_width(audio_config: PreTrainedConfig) -> int:
    """Width of an audio encoder's tokens."""
    if audio_config.model_type == "clap_audio_model":  # `hidden_size` is that of the text side's projection
        return audio_config.patch_embeds_hidden_size * 2 ** (len(audio_config.depths) - 1)
    return audio_config.d_model if audio_config.model_type == "whisper" else audio_config.hidden_size


@strict
class EarConfig(PreTrainedConfig):
    """
    What every captioner with an ear is told about it.

    Args:
        audio_config: Configuration of the audio encoder: a `DaliAudioConfig`, or that of another transformers audio
            encoder (AST, Whisper, CLAP's audio model).
        audio_token_index: Vocabulary index of the `<audio>` placeholder.
        audio_seq_length: Audio tokens per clip; follows from `audio_config` where that encoder is known.
        prefix_token_index: Vocabulary index of the `<prefix>` placeholder.
        prefix_length: Number of soft prefix tokens the model holds; 0 for none.
        prefix_position: Where prompts put the prefix: `"after_media"` (right behind the image and audio tokens, as the
            method was published) or `"front"` (before everything else, as PEFT's prompt tuning does).
        base_model: Folder or Hub id of the captioner the model was built from.
        base_model_revision: Commit of that captioner on the Hub.
        base_model_fingerprint: Values of the captioner's word embedding and projector, by which an ear knows it again.
        ear_only: Whether the checkpoint holds the ear alone; the captioner is then loaded from `base_model`.
    """

    audio_config: Any = None  # a configuration or its dictionary
    audio_token_index: int = interval(min=0)(default=32002)
    audio_seq_length: int | None = None
    prefix_token_index: int = interval(min=0)(default=32003)
    prefix_length: int = interval(min=0)(default=0)
    prefix_position: PrefixPosition = "after_media"
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: dict[str, list[float]] | None = None
    ear_only: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.audio_seq_length is None and self.audio_config is not None:
            self.audio_seq_length = count_audio_tokens(self.audio_config)
        if self.audio_seq_length is not None and self.audio_seq_length < 1:
            raise ValueError(f"`audio_seq_length` must be at least 1, it is {self.audio_seq_length}.")
        placeholders = {name: getattr(self, f"{name}_token_index") for name in ("image", "audio", "prefix")}
        if len(set(placeholders.values())) < len(placeholders):
            raise ValueError(f"Placeholders need a vocabulary index each, they have {placeholders}.")


AUDIO_SPEC = SubConfigSpec(config_class=AutoConfig, model_type="dali_audio")


@strict
class DaliConfig(EarConfig, LlavaConfig):
    """
    A LLaVA configuration with an ear.

    All arguments are those of [`EarConfig`] and [`~transformers.LlavaConfig`].
    """

    model_type = "dali"
    attribute_map = {
        "image_token_id": "image_token_index",
        "audio_token_id": "audio_token_index",
        "prefix_token_id": "prefix_token_index",
    }
    sub_configs_defaults = {**LlavaConfig.sub_configs_defaults, "audio_config": AUDIO_SPEC}


@strict
class DaliCaptionerConfig(EarConfig):
    """
    The configuration of a captioner of any image-text-to-text class, and of its ear.

    Args:
        captioner_config: Configuration of the captioner; LLaVA's by default.
        alignment_target: Which image tokens the audio tokens are aligned with: those that the captioner's projector
            reads (`"projector_input"`; the ear then has a copy of that projector, which must work token by token), or
            those that the language model reads (`"projector_output"`).

    All other arguments are those of [`EarConfig`].
    """

    model_type = "dali_captioner"
    attribute_map = {"audio_token_id": "audio_token_index", "prefix_token_id": "prefix_token_index"}
    sub_configs_defaults = {
        "captioner_config": SubConfigSpec(config_class=AutoConfig, model_type="llava"),
        "audio_config": AUDIO_SPEC,
    }

    captioner_config: Any = None  # a configuration or its dictionary
    alignment_target: AlignmentTarget = "projector_output"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """That of the captioner."""
        return self.captioner_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def image_token_index(self) -> int:
        """That of the captioner."""
        names = ("image_token_id", "image_token_index")
        return next(getattr(self.captioner_config, name) for name in names if hasattr(self.captioner_config, name))

    @property
    def vision_config(self) -> PreTrainedConfig:
        """That of the captioner."""
        return self.captioner_config.vision_config


# `audio_config` is found by its model type, also where this file comes from the Hub.
AutoConfig.register("dali_audio", DaliAudioConfig, exist_ok=True)
DaliConfig.register_for_auto_class()
DaliCaptionerConfig.register_for_auto_class()

__all__ = [
    "AlignmentTarget",
    "DaliAudioConfig",
    "DaliCaptionerConfig",
    "DaliConfig",
    "EarConfig",
    "PrefixPosition",
    "audio_width",
    "count_audio_tokens",
]
