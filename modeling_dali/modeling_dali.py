"""
DALI: an image captioner (LLaVA) that hears.

Sound goes through the model like this:

    log-mel frames [B, 1024, 128]
      -> audio_tower         CAV-MAE's audio branch               [B, 512, 768]
      -> audio_projection    into the space of the image tokens   [B, 512, 1024]   <- "audio tokens"
      -> audio_projector     LLaVA's projector, audio copy        [B, 512, 4096]
      -> in the place of `<audio>` placeholders -> language model -> text

Images take LLaVA's own path, untouched. Soft prefix tokens, where the model holds some, stand in the place of
`<prefix>` placeholders.

Source: *An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using Audiovisual Distribution
Alignment*, NeurIPS 2024, arXiv 2410.05997.
"""

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, ClapAudioModel, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import TransformersKwargs, is_peft_available
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_dali import AudioBackbone, read_audio_backbone
from .configuration_dali import DaliAudioConfig, DaliConfig, PrefixPosition, audio_width
from .model_card_dali import model_card

if is_peft_available():
    from peft import PeftConfig, PromptTuningConfig, TaskType, load_peft_weights

# What language models call their cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

PREFIX_STD = 1e-4  # of new soft prefix tokens


# ---------------------------------------------------------------------------------------------------------------------
# Audio encoder


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """
    Fixed 2-D sin-cos positions [1, rows * columns, width] of a grid read row by row.

    The first half of the width encodes the column (time), the second the row (frequency), each as sines, then cosines.

    Source: MAE's positions on CAV-MAE's grid.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions):
        angles = positions.flatten()[:, None].double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column), encode(row)], dim=1).float()[None]


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, tokens, width] -> the same shape, and the attention weights where they exist."""
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, head width]
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
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
        self.register_buffer("positions", sincos_positions(*config.grid, config.hidden_size))
        self.modality = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(DaliAudioLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DaliAudioModel):
            init.copy_(module.positions, sincos_positions(*self.config.grid, self.config.hidden_size))
            init.normal_(module.modality, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.patch_embedding

    @capture_outputs
    def forward(self, input_features: torch.Tensor, **kwargs) -> BaseModelOutput:
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


def build_audio_tower(audio_config) -> PreTrainedModel:
    """The audio encoder of a configuration: CAV-MAE's branch, or any transformers encoder with token outputs."""
    if audio_config.model_type == "dali_audio":
        return DaliAudioModel(audio_config)
    if audio_config.model_type == "clap_audio_model":  # not among the Auto classes
        return ClapAudioModel(audio_config)
    tower = AutoModel.from_config(audio_config)
    return tower.get_encoder() if audio_config.is_encoder_decoder else tower


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA with an audio side


@dataclasses.dataclass
class DaliModelOutputWithPast(BaseModelOutputWithPast):
    """
    The language model's outputs, and projected tokens [tokens of all images or clips, hidden size]:
    `image_hidden_states`, `audio_hidden_states`.
    """

    image_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


@dataclasses.dataclass
class DaliCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    The language model's outputs, and projected tokens [tokens of all images or clips, hidden size]:
    `image_hidden_states`, `audio_hidden_states`.
    """

    image_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


class DaliModel(LlavaModel):
    """LLaVA without its language modelling head, with an audio encoder beside the image tower."""

    config: DaliConfig
    config_class = DaliConfig
    input_modalities = ("image", "audio", "text")

    def __init__(self, config: DaliConfig):
        super().__init__(config)
        self.audio_tower = build_audio_tower(config.audio_config)
        # The projector reads as many image features as there are selected vision layers, side by side.
        self.audio_projection = nn.Linear(
            audio_width(config.audio_config), self.multi_modal_projector.linear_1.in_features
        )
        self.audio_projector = copy.deepcopy(self.multi_modal_projector)
        self.prefix = None
        if config.prefix_length:
            self.prefix = nn.Parameter(torch.zeros(config.prefix_length, config.text_config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DaliModel) and module.prefix is not None:
            init.normal_(module.prefix, std=PREFIX_STD)

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Image tokens as LLaVA's projector reads them: the vision tower's selected layer(s), unprojected.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            [B, tokens, width]: 576 x 1024 for CLIP ViT-L/14-336.
        """
        layers = self.config.vision_feature_layer
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # drops the class token
        return torch.cat(
            [hidden_states[i][:, first:] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1
        )

    def get_audio_tokens(self, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Audio tokens in the space of the image tokens: what the projector reads, unprojected.

        Args:
            input_features: As the audio encoder takes them: log-mel frames [B, 1024, 128] by default.

        Returns:
            [B, tokens, width]: 512 x 1024 by default.
        """
        hidden_states = self.audio_tower(
            **{self.audio_tower.main_input_name: input_features}, return_dict=True, **kwargs
        ).last_hidden_state
        if hidden_states.ndim == 4:  # CLAP's encoder gives a map [B, width, frequency, time]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        return self.audio_projection(hidden_states)

    def get_audio_features(self, input_features: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Encodes clips.

        Args:
            input_features: As the audio encoder takes them: log-mel frames [B, 1024, 128] by default.

        Returns:
            `last_hidden_state`: audio tokens in the space of the image tokens [B, 512, 1024];
            `pooler_output`: the same through the audio projector [B, 512, hidden size].
        """
        audio_tokens = self.get_audio_tokens(input_features, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=audio_tokens, pooler_output=self.audio_projector(audio_tokens)
        )

    def audio_token_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """
        Which audio tokens have heard at least one frame that is not padding.

        Args:
            input_features_mask: [B, frames], 1 for sound and 0 for padding.

        Returns:
            Boolean mask [B, tokens].

        Raises:
            ValueError: with an audio encoder other than CAV-MAE's, whose tokens have no frames of their own.
        """
        config = self.config.audio_config
        if config.model_type != "dali_audio":
            raise ValueError(f"Tokens of the audio encoder `{config.model_type}` do not belong to single frames.")
        rows, columns = config.grid
        heard = input_features_mask.view(len(input_features_mask), columns, config.patch_size).any(-1)  # [B, columns]
        return heard[:, None].expand(-1, rows, -1).flatten(1)

    def encode_audio(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """
        What stands in the place of `<audio>` placeholders: `pooler_output`, a list of [tokens, hidden size], one per
        clip. With a mask, tokens that are padding only are left out.
        """
        features = self.get_audio_features(input_features)
        if input_features_mask is None:
            features.pooler_output = list(features.pooler_output)
        else:
            masks = self.audio_token_mask(input_features_mask)
            features.pooler_output = [clip[mask] for clip, mask in zip(features.pooler_output, masks, strict=True)]
        return features

    def placeholder_mask(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Where a placeholder stands [B, length]; found by its embedding where there are no ids (PEFT gives none)."""
        if input_ids is not None:
            return input_ids == token_id
        embeddings = self.get_input_embeddings()
        if token_id >= embeddings.num_embeddings:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        embedding = embeddings(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding.to(inputs_embeds.dtype)).all(-1)

    def fill_placeholders(
        self, name: str, features: torch.Tensor | None, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """
        Puts features [tokens, hidden size] where the placeholders of `name` ("image", "audio", "prefix") stand.

        Raises:
            ValueError: if there are more or fewer placeholders than features.
        """
        mask = self.placeholder_mask(getattr(self.config, f"{name}_token_index"), input_ids, inputs_embeds)
        placeholders, available = int(mask.sum()), 0 if features is None else len(features)
        if placeholders != available:
            raise ValueError(
                f"The text has {placeholders} <{name}> placeholders, but there are {available} {name} features. "
                + {
                    "prefix": "Does the model hold a prefix (`config.prefix_length`), and of that length?",
                    "image": "Do `pixel_values` and the text come from one call of the processor?",
                    "audio": "Do `input_features`, `input_features_mask` and the text come from one call of the "
                    "processor? (A mask makes the model leave out the tokens that are padding only.)",
                }[name]
            )
        if features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(mask[..., None], features.to(inputs_embeds.device, inputs_embeds.dtype))

    def embed_text(self, input_ids) -> torch.Tensor:
        """Word embeddings [B, length, hidden size]; placeholders may lie outside the vocabulary."""
        embeddings = self.get_input_embeddings()
        for token_id in (self.config.audio_token_index, self.config.prefix_token_index):
            if token_id >= embeddings.num_embeddings:
                input_ids = input_ids.masked_fill(input_ids == token_id, 0)
        return embeddings(input_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> DaliModelOutputWithPast:
        """
        LLaVA's forward with two more inputs.

        Args:
            input_features: Log-mel frames [clips, 1024, 128], in the order of the `<audio>` blocks of the batch.
            input_features_mask: [clips, 1024]. Give it to leave out audio tokens that are padding only; the text then
                has as many fewer placeholders (`trim_padding=True` of the processor).

        Raises:
            TypeError: for an argument that the model does not know: it would be left out without a word.
            ValueError: if placeholders and features differ in number.
        """
        known = {"use_cache", *TransformersKwargs.__annotations__}
        unknown = [name for name, value in kwargs.items() if name not in known and value is not None]
        if unknown:
            raise TypeError(f"Unknown inputs {unknown}: sound is `input_features`, images are `pixel_values`.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        encoded = dict(mm_encoder_outputs or {})
        for name, given in (("image", pixel_values), ("audio", input_features)):
            if given is not None and encoded.get(name) is not None:
                raise ValueError(f"The {name} inputs were given twice: raw and as `mm_encoder_outputs`.")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
        if input_features is not None:
            encoded["audio"] = self.encode_audio(input_features, input_features_mask)
        features = {
            name: torch.cat(list(encoded[name].pooler_output)) if encoded.get(name) is not None else None
            for name in ("image", "audio")
        }

        if inputs_embeds is None:
            inputs_embeds = self.embed_text(input_ids)
        cache = past_key_values if cache is None else cache
        # Text that continues a cache was written by the model: it has no placeholders to fill, whatever its ids. The
        # length is asked first: for a static cache the second question waits for the device.
        is_start = inputs_embeds.shape[1] > 1 and (cache is None or cache.get_seq_length() == 0)
        if is_start or any(given is not None for given in features.values()):
            inputs_embeds = self.fill_placeholders("image", features["image"], input_ids, inputs_embeds)
            inputs_embeds = self.fill_placeholders("audio", features["audio"], input_ids, inputs_embeds)
            inputs_embeds = self.fill_prefix(input_ids, inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return DaliModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features["image"],
            audio_hidden_states=features["audio"],
            **{CACHE: outputs.get(CACHE)},
        )

    def fill_prefix(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Puts the soft tokens where `<prefix>` placeholders stand: the whole prefix in each row that has any."""
        mask = self.placeholder_mask(self.config.prefix_token_index, input_ids, inputs_embeds)
        rows = int(mask.any(-1).sum())
        features = None if self.prefix is None or rows == 0 else self.prefix.repeat(rows, 1)
        return self.fill_placeholders("prefix", features, input_ids, inputs_embeds)


class DaliForConditionalGeneration(LlavaForConditionalGeneration):
    """
    A LLaVA captioner that takes images, sounds or both.

    Example:

    ```python
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    prompt = processor.caption_prompt("audio")
    inputs = processor(text=prompt, audio=waveform, sampling_rate=16_000, return_tensors="pt")
    print(processor.decode_captions(model.generate(**inputs), inputs))
    ```
    """

    config: DaliConfig
    config_class = DaliConfig
    input_modalities = ("image", "audio", "text")

    def __init__(self, config: DaliConfig):
        super().__init__(config)
        self.model = DaliModel(config)
        self.post_init()

    # Loading and saving ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs
    ):
        """
        Loads a saved DALI model, and takes no weight for granted.

        All arguments are those of [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the checkpoint lacks a weight of the model, holds one that the model has no place for, or
                one of another shape (unless `ignore_mismatched_sizes`).
        """
        # Mismatches are let through here, to be named below together with everything else.
        model, info = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        require_all_weights(info, str(args[0]) if args else "the checkpoint", ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_llava(
        cls,
        llava: "str | os.PathLike | LlavaForConditionalGeneration",
        audio_encoder: "str | os.PathLike | PreTrainedModel | None" = None,
        *,
        tokenizer=None,
        audio_config=None,
        **kwargs,
    ) -> "DaliForConditionalGeneration":
        """
        Builds a DALI model from a LLaVA checkpoint.

        Args:
            llava: A LLaVA model, whose modules become part of the result, or a checkpoint of transformers' LLaVA class
                (folder or Hub id). Any image tower, language model, `vision_feature_layer` and select strategy.
            audio_encoder: Where the audio side starts from: a CAV-MAE or DALI checkpoint (`.pth`; of a DALI one the
                projection is taken too), or an audio model (CAV-MAE's branch or another transformers encoder), which
                becomes part of the result. Without it the audio encoder starts from random weights.
            tokenizer: The captioner's tokenizer. `<audio>` and `<prefix>` are added to it (see
                [`add_media_tokens`]). Without it the placeholders get the two indices behind the vocabulary.
            audio_config: Configuration of a new audio encoder; `DaliAudioConfig()` by default.
            kwargs: For `LlavaForConditionalGeneration.from_pretrained`, such as `dtype`.

        Returns:
            The model. Its audio projector is a copy of LLaVA's, its audio projection random if not given.

        Raises:
            ValueError: if the LLaVA checkpoint or the audio checkpoint lacks a weight or has one too many.
        """
        if not isinstance(llava, PreTrainedModel):
            path = str(llava)
            llava, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
            require_all_weights(info, path)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} apply where LLaVA is loaded from a checkpoint; a model was given.")
        if isinstance(audio_encoder, PreTrainedModel):
            audio_config = audio_encoder.config
        vocabulary = llava.get_input_embeddings().num_embeddings
        fields = {field.name: getattr(llava.config, field.name) for field in dataclasses.fields(llava.config)}
        fields |= {"architectures": None, "transformers_version": None, "audio_config": audio_config}
        fields |= {"audio_token_index": vocabulary, "prefix_token_index": vocabulary + 1}
        fields |= {"base_model": llava.name_or_path or None}
        config = DaliConfig(**fields)

        with torch.device("meta"):
            model = cls(config)
        for name in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(model.model, name, getattr(llava.model, name))
        model.lm_head = llava.lm_head
        model.model.audio_projector = copy.deepcopy(llava.model.multi_modal_projector)
        if isinstance(audio_encoder, PreTrainedModel):
            model.model.audio_tower = audio_encoder
        else:
            model.model.audio_tower = build_audio_tower(config.audio_config)
        model.model.audio_projection = nn.Linear(
            model.model.audio_projection.in_features, model.model.audio_projection.out_features
        )
        init.normal_(model.model.audio_projection.weight, std=config.text_config.initializer_range)
        init.zeros_(model.model.audio_projection.bias)
        model.model.audio_tower.to(llava.device, llava.dtype)
        model.model.audio_projection.to(llava.device, llava.dtype)
        if isinstance(audio_encoder, (str, os.PathLike)):
            model.load_audio_encoder(audio_encoder)
        model.generation_config = copy.deepcopy(llava.generation_config)
        model.generation_config.max_new_tokens = 64  # as in the released code
        model.tie_weights()
        if tokenizer is not None:
            model.add_media_tokens(tokenizer)
        return model.train(llava.training)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Saves weights, configuration, generation configuration, the code that loads them (see `auto_map` in the
        configuration) and, unless the folder has one, a model card. The processor is saved by its own
        `save_pretrained`.

        All arguments are those of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        this = "modeling_dali.DaliForConditionalGeneration"
        auto_classes = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
        self.config.auto_map = {"AutoConfig": "configuration_dali.DaliConfig"} | dict.fromkeys(auto_classes, this)
        super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and not card.exists():
            model_card(self.config, Path(save_directory).name).save(card)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs) -> str:
        """
        Uploads what `save_pretrained` writes. A repository without a model card gets DALI's.

        All arguments are those of [`~transformers.PreTrainedModel.push_to_hub`].
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md"):
            model_card(self.config, repo_id).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, private=private, token=token, **kwargs)

    def load_audio_encoder(self, path: str | os.PathLike) -> AudioBackbone:
        """
        Loads the audio side of a CAV-MAE or DALI checkpoint (`.pth`) into this model.

        Returns:
            What the file holds: also the scorers of attentive transport, which are no part of the model.

        Raises:
            ValueError: lists every tensor that the file lacks or has in another shape.
        """
        backbone = read_audio_backbone(path, self.model.audio_tower, self.model.audio_projection)
        self.model.audio_tower.load_state_dict(backbone.encoder)
        if backbone.projection is not None:
            self.model.audio_projection.load_state_dict(backbone.projection)
        return backbone

    def add_media_tokens(self, tokenizer) -> None:
        """
        Adds `<audio>` and `<prefix>` to a tokenizer and tells the configuration their indices.

        The embeddings grow if they have no spare rows for them. Rows of the two tokens that equal another row are
        drawn anew: where a model gets embeddings only (PEFT's prompt tuning), placeholders are found by them.
        """
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<audio>", "<prefix>"]}, replace_extra_special_tokens=False
        )
        indices = tokenizer.convert_tokens_to_ids(["<audio>", "<prefix>"])
        self.config.audio_token_index, self.config.prefix_token_index = indices
        if max(indices) >= self.get_input_embeddings().num_embeddings:
            self.resize_token_embeddings(max(indices) + 1)
        self.generation_config.suppress_tokens = indices  # placeholders are for prompts: the model never writes one
        weight = self.get_input_embeddings().weight
        with torch.no_grad():
            for index in indices:
                if (weight == weight[index]).all(-1).sum() > 1:
                    weight[index].normal_(std=self.config.text_config.initializer_range)

    # The prefix -----------------------------------------------------------------------------------------------------

    def add_prefix(self, length: int = 16, position: PrefixPosition = "after_media") -> None:
        """
        Gives the model new soft prefix tokens, normal with standard deviation 1e-4.

        Args:
            length: Number of soft tokens.
            position: `"after_media"` or `"front"` (see [`DaliConfig`]).
        """
        self.set_prefix(torch.randn(length, self.config.text_config.hidden_size) * PREFIX_STD, position)

    def remove_prefix(self) -> None:
        """Takes the soft prefix tokens off; prompts without `<prefix>` give what they gave before."""
        self.model.prefix = None
        self.config.prefix_length = 0

    def load_prefix(self, path: str | os.PathLike, position: PrefixPosition | None = None) -> None:
        """
        Loads soft prefix tokens from a PEFT prompt-tuning adapter.

        Args:
            path: Folder or Hub id of the adapter.
            position: `"after_media"` or `"front"`; the configuration's by default.

        Raises:
            ValueError: if the adapter is not prompt tuning, or its tokens have another width than the language model.
        """
        adapter = PeftConfig.from_pretrained(str(path))
        if adapter.peft_type != "PROMPT_TUNING":
            raise ValueError(f"{path} holds a {adapter.peft_type} adapter, a PROMPT_TUNING one is needed.")
        prefix = load_peft_weights(str(path), device="cpu")["prompt_embeddings"]
        width = self.config.text_config.hidden_size
        if prefix.shape[-1] != width:
            raise ValueError(f"The prefix in {path} is {prefix.shape[-1]} wide, the language model {width}.")
        self.set_prefix(prefix, position or self.config.prefix_position)

    def save_prefix(self, path: str | os.PathLike) -> None:
        """Saves the soft prefix tokens as a PEFT prompt-tuning adapter, which `load_prefix` and peft load."""
        if self.model.prefix is None:
            raise ValueError("The model holds no prefix to save.")
        text = self.config.text_config
        PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=len(self.model.prefix),
            token_dim=text.hidden_size,
            num_transformer_submodules=1,
            num_attention_heads=text.num_attention_heads,
            num_layers=text.num_hidden_layers,
            base_model_name_or_path=self.name_or_path or None,
            inference_mode=True,
        ).save_pretrained(str(path))
        weights = {"prompt_embeddings": self.model.prefix.detach().cpu().contiguous()}
        save_file(weights, Path(path) / "adapter_model.safetensors", metadata={"format": "pt"})

    def set_prefix(self, prefix: torch.Tensor, position: PrefixPosition = "after_media") -> None:
        """Gives the model the soft prefix tokens `prefix` [length, hidden size], standing at `position`."""
        if position not in get_args(PrefixPosition):
            raise ValueError(f"A prefix stands `after_media` or in `front`, not at `{position}`.")
        self.model.prefix = nn.Parameter(prefix.to(self.device, self.dtype).clone())
        self.config.prefix_length = len(prefix)
        self.config.prefix_position = position

    # Forward and generation -----------------------------------------------------------------------------------------

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`DaliModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values)

    def get_audio_features(self, input_features: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`DaliModel.get_audio_features`]."""
        return self.model.get_audio_features(input_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> DaliCausalLMOutputWithPast:
        """
        Args:
            labels: [B, length]; token ids to predict, -100 where there is nothing to predict.

        All other arguments, and the errors, are those of [`DaliModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            input_features=input_features,
            input_features_mask=input_features_mask,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return DaliCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs) -> dict:
        """The base class's; the cache goes by its former name too, by which PEFT 0.21's prompt tuning looks for it."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs["cache"]
        return inputs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Encodes sounds once, before beams or samples multiply the rows, as the base class does with images."""
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        input_features = model_kwargs.pop("input_features", None)
        mask = model_kwargs.pop("input_features_mask", None)
        if input_features is not None:
            model_kwargs["mm_encoder_outputs"]["audio"] = self.model.encode_audio(input_features, mask)
        return model_kwargs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """Repeats each row's encoded clips `expand_size` times, row by row."""
        mm_encoder_output = super()._expand_multimodal_outputs(
            input_ids, mm_encoder_output, expand_size=expand_size, inputs_embeds=inputs_embeds
        )
        audio = mm_encoder_output.get("audio")
        if audio is None:
            return mm_encoder_output
        if input_ids is not None and input_ids.numel() == 0:
            input_ids = None
        mask = self.model.placeholder_mask(self.config.audio_token_index, input_ids, inputs_embeds)
        rows = torch.cat(audio.pooler_output).split(mask.sum(-1).tolist())
        audio.pooler_output = [row for row in rows for _ in range(expand_size)]
        return mm_encoder_output


def require_all_weights(info: dict, source: str, ignore_mismatched_sizes: bool = False) -> None:
    """
    Raises:
        ValueError: if loading `source` left weights at random values or out of the model; lists them.
    """
    problems = {
        "missing in the checkpoint": info["missing_keys"],
        "without a place in the model": info["unexpected_keys"],
        "of another shape": [] if ignore_mismatched_sizes else [key for key, *_ in info["mismatched_keys"]],
    }
    lines = [f"- {what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys]
    if lines:
        raise ValueError(f"The weights of {source} do not fit the model.\n" + "\n".join(lines))


DaliForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["DaliAudioModel", "DaliForConditionalGeneration", "DaliModel"]
