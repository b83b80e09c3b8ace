"""The audio encoder: CAV-MAE's audio branch, or another encoder of transformers that gives tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, ClapAudioModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_dali import DaliAudioConfig


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """
    2-D sin-cos positions [1, rows * columns, width] of a grid read row by row.

    The first half of the width encodes the column (time), the second the row (frequency), each as sines, then cosines.

    Source: MAE's positions on CAV-MAE's grid.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions: torch.Tensor) -> torch.Tensor:
        angles = positions.flatten()[:, None].double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column), encode(row)], dim=1).float()[None]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention; `query`, `key`, `value` [B, heads, tokens, head width]."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DaliAudioAttention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: DaliAudioConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, tokens, width] -> the same shape, and the attention weights where they exist."""
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, head width]
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.proj(output.reshape(batch, tokens, width)), weights


class DaliAudioLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: DaliAudioConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = DaliAudioAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`hidden_states` [B, tokens, width] -> the same shape."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.fc2(self.act(self.fc1(self.norm2(hidden_states))))


class DaliAudioModel(PreTrainedModel):
    """
    The audio branch of CAV-MAE: patches of a log-mel spectrogram through a pre-norm ViT.

    Tokens are in frequency-major order: token `f * 64 + t` covers mel bins `16 f ... 16 f + 15` and frames
    `16 t ... 16 t + 15`.
    """

    config: DaliAudioConfig
    config_class = DaliAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DaliAudioLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DaliAudioLayer, "attentions": DaliAudioAttention}

    def __init__(self, config: DaliAudioConfig):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, math.prod(config.grid), config.hidden_size))
        self.modality = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(DaliAudioLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DaliAudioModel):
            init.copy_(module.positions, sincos_positions(*self.config.grid, self.config.hidden_size))
            init.normal_(module.modality, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.patch_embedding

    @capture_outputs
    def forward(self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """
        Args:
            input_features: Normalised log-mel frames [B, frames, mel bins].

        Returns:
            `last_hidden_state` [B, tokens, width].

        Raises:
            ValueError: if the frames or bins are not those of the configuration.
        """
        expected = (self.config.num_frames, self.config.num_mel_bins)
        if input_features.ndim != 3 or tuple(input_features.shape[1:]) != expected:
            raise ValueError(
                f"`input_features` must be [batch, {expected[0]} frames, {expected[1]} mel bins], its shape is "
                f"{tuple(input_features.shape)}."
            )
        spectrogram = input_features.to(self.patch_embedding.weight.dtype).transpose(1, 2)[
            :, None
        ]  # [B, 1, bins, frames]
        hidden_states = self.patch_embedding(spectrogram).flatten(2).transpose(1, 2)  # [B, tokens, width]
        hidden_states = hidden_states + (self.positions + self.modality).to(hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


def build_audio_tower(audio_config: PreTrainedConfig) -> PreTrainedModel:
    """The audio encoder of a configuration: CAV-MAE's branch, or any transformers encoder with token outputs."""
    if audio_config.model_type == "dali_audio":
        return DaliAudioModel(audio_config)
    if audio_config.model_type == "clap_audio_model":  # not among the Auto classes
        return ClapAudioModel(audio_config)
    tower = AutoModel.from_config(audio_config)
    return tower.get_encoder() if audio_config.is_encoder_decoder else tower


__all__ = ["DaliAudioModel", "build_audio_tower", "sincos_positions"]
