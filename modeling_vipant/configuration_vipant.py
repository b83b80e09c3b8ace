"""Configuration of VIP-ANT: CLIP's text and image towers, and an audio tower of the same kind."""

import sys
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.utils.type_validators import activation_fn_key, interval

FINITE = sys.float_info.max


@strict
class VipAntAudioConfig(PreTrainedConfig):
    """Configuration of the audio tower: CLIP's vision transformer over overlapping spectrogram patches.

    The defaults are those of the paper (ViT-B/32 on 10 s of sound). Sizes shared with the image tower have the
    names they have in `CLIPVisionConfig`.

    Args:
        num_mel_bins: Mel bins of a spectrogram frame.
        num_frames: Frames (10 ms each) the stored positions stand for; longer spectrograms interpolate them.
        shorter_positions: Positions of a spectrogram of fewer frames: "slice" takes the stored ones from time step 6
            on (or the last that suffice), as VIP-ANT does; "interpolate" squeezes all of them into the shorter time.
        num_channels: Input channels of the stored patch kernel; their mean is what a spectrogram meets.
        patch_size: Patch height (time frames) and width (mel bins).
        patch_stride: Step between patches in time frames and mel bins.
    """

    model_type = "vipant_audio_model"
    base_config_key = "audio_config"

    hidden_size: int = interval(min=1)(default=768)
    intermediate_size: int = interval(min=1)(default=3072)
    num_hidden_layers: int = interval(min=1)(default=12)
    num_attention_heads: int = interval(min=1)(default=12)
    num_channels: int = interval(min=1)(default=3)
    num_mel_bins: int = interval(min=1)(default=128)
    num_frames: int = interval(min=1)(default=1000)
    shorter_positions: Literal["slice", "interpolate"] = "slice"
    patch_size: list[int] | tuple[int, ...] = (32, 32)
    patch_stride: list[int] | tuple[int, ...] = (16, 24)
    hidden_act: str = activation_fn_key(default="quick_gelu")
    layer_norm_eps: float = interval(min=0.0, max=1.0)(default=1e-5)
    attention_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    initializer_factor: float = interval(min=0.0, max=FINITE)(default=1.0)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and frequency for `num_frames` frames: (61, 5) with the paper's sizes."""
        return self.grid_for(self.num_frames)

    def grid_for(self, num_frames: int) -> tuple[int, int]:
        """Patches along time and frequency for a spectrogram of `num_frames` frames."""
        sizes = zip((num_frames, self.num_mel_bins), self.patch_size, self.patch_stride, strict=True)
        time, frequency = ((size - patch) // stride + 1 for size, patch, stride in sizes)
        return time, frequency

    def validate_architecture(self) -> None:
        """Checks the sizes against each other; part of `@strict`'s validation.

        Raises:
            ValueError: If heads do not divide the width, or no patch fits in the spectrogram.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        for name in ("patch_size", "patch_stride"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise ValueError(
                    f"{name} must be two numbers of at least 1, time frames and mel bins, it is {getattr(self, name)}"
                )
        if min(self.grid) < 1:
            raise ValueError(
                f"a patch of {tuple(self.patch_size)} does not fit in {self.num_frames} frames x "
                f"{self.num_mel_bins} mel bins"
            )


@strict
class VipAntConfig(PreTrainedConfig):
    """Configuration of `VipAntModel` and `VipAntForAudioClassification`.

    Args:
        text_config: CLIP's text tower (`CLIPTextConfig` or its dict).
        vision_config: CLIP's image tower (`CLIPVisionConfig` or its dict).
        audio_config: The audio tower (`VipAntAudioConfig` or its dict).
        projection_dim: Width of the common embedding space.
        logit_scale_init_value: Logarithm of the first logit scales; ln(1 / 0.07).
        initializer_range: Standard deviation of the classification head's initial weights.
        initializer_factor: Factor on the standard deviations of CLIP's initial weights.
    """

    model_type = "vipant"
    sub_configs_defaults = {
        "text_config": CLIPTextConfig,
        "vision_config": CLIPVisionConfig,
        "audio_config": VipAntAudioConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    projection_dim: int = interval(min=1)(default=512)
    logit_scale_init_value: float | int = interval(min=-FINITE, max=FINITE)(default=2.6592)
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    initializer_factor: float = interval(min=0.0, max=FINITE)(default=1.0)

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving one model records only its own auto class; the same weights serve both.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_vipant.VipAntConfig",
                "AutoModel": "modeling_vipant.VipAntModel",
                "AutoModelForAudioClassification": "modeling_vipant.VipAntForAudioClassification",
            },
        )
        super().__post_init__(**kwargs)


VipAntConfig.register_for_auto_class("AutoConfig")

__all__ = ["VipAntAudioConfig", "VipAntConfig"]
