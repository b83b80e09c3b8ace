"""
The ear: audio encoder, projection, projector and soft prefix, the same for every captioner.

    log-mel frames [B, 1024, 128]
      -> audio_tower         CAV-MAE's audio branch               [B, 512, 768]
      -> audio_projection    into the space of the image tokens   [B, 512, 1024]   <- "audio tokens"
      -> audio_projector     into the language model's space      [B, 512, 4096]
      -> in the place of `<audio>` placeholders

Soft prefix tokens, where the ear holds some, stand in the place of `<prefix>` placeholders.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .audio_encoder_dali import build_audio_tower
from .checkpoint_dali import AudioBackbone, read_audio_backbone
from .configuration_dali import audio_width

PREFIX_STD = 1e-4  # of new soft prefix tokens


class EarMixin(PreTrainedModel):
    """
    A module with an ear: its parts, and what they make of sound.

    The module has a `config` with `audio_config`, `prefix_length` and a language model.
    """

    audio_tower: PreTrainedModel
    audio_projection: nn.Linear
    audio_projector: nn.Module
    prefix: nn.Parameter | None

    def build_ear(
        self,
        token_width: int,
        projector: nn.Module,
        audio_encoder: "str | os.PathLike[str] | PreTrainedModel | None" = None,
    ) -> None:
        """
        Gives the module an ear; what is not given starts from random weights.

        Args:
            token_width: Width of the audio tokens: that of the image tokens which they are aligned with.
            projector: From audio tokens to the language model's space; becomes part of the ear.
            audio_encoder: A CAV-MAE or DALI checkpoint (`.pth`; of a DALI one the projection is taken too), or an
                audio model, which becomes part of the ear.
        """
        config = self.config
        if isinstance(audio_encoder, PreTrainedModel):
            self.audio_tower = audio_encoder
        else:
            self.audio_tower = build_audio_tower(config.audio_config)
        self.audio_projection = nn.Linear(audio_width(config.audio_config), token_width)
        init.normal_(self.audio_projection.weight, std=config.get_text_config().initializer_range)
        init.zeros_(self.audio_projection.bias)
        self.audio_projector = projector
        self.prefix = None
        if config.prefix_length:
            self.prefix = nn.Parameter(torch.zeros(config.prefix_length, config.get_text_config().hidden_size))
        if isinstance(audio_encoder, (str, os.PathLike)):
            self.load_audio_encoder(audio_encoder)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EarMixin) and module.prefix is not None:
            init.normal_(module.prefix, std=PREFIX_STD)

    def load_audio_encoder(self, path: str | os.PathLike[str]) -> AudioBackbone:
        """
        Loads the audio side of a CAV-MAE or DALI checkpoint (`.pth`) into this ear.

        Returns:
            What the file holds: also the scorers of attentive transport, which are no part of the model.

        Raises:
            ValueError: lists every tensor that the file lacks or has in another shape.
        """
        backbone = read_audio_backbone(path, self.audio_tower, self.audio_projection)
        self.audio_tower.load_state_dict(backbone.encoder)
        if backbone.projection is not None:
            self.audio_projection.load_state_dict(backbone.projection)
        return backbone

    def encode_audio(self, input_features: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """
        The audio encoder's outputs.

        Args:
            input_features: As the audio encoder takes them: log-mel frames [B, 1024, 128] by default.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `last_hidden_state` [B, tokens, width]: 512 x 768 by default.
        """
        outputs = self.audio_tower(**{self.audio_tower.main_input_name: input_features}, return_dict=True, **kwargs)
        if outputs.last_hidden_state.ndim == 4:  # CLAP's encoder gives a map [B, width, frequency, time]
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(2).transpose(1, 2)
        return outputs

    def get_audio_tokens(self, input_features: torch.Tensor) -> torch.Tensor:
        """
        Audio tokens in the space of the image tokens: what the projector reads, unprojected.

        Args:
            input_features: As the audio encoder takes them: log-mel frames [B, 1024, 128] by default.

        Returns:
            [B, tokens, width]: 512 x 1024 by default.
        """
        return self.audio_projection(self.encode_audio(input_features).last_hidden_state)

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        Encodes clips.

        Args:
            input_features: As the audio encoder takes them: log-mel frames [B, 1024, 128] by default.
            input_features_mask: [B, frames]. Leaves out tokens that are padding only (see [`audio_token_mask`]).
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `pooler_output`, what stands in the place of `<audio>` placeholders: [B, 512, hidden size], or with a mask
            a list of [tokens, hidden size], one per clip; and the audio encoder's own `last_hidden_state`
            [B, 512, 768], `hidden_states` and `attentions`.
        """
        outputs = self.encode_audio(input_features, **kwargs)
        features = self.audio_projector(self.audio_projection(outputs.last_hidden_state))
        if input_features_mask is not None:
            masks = self.audio_token_mask(input_features_mask)
            features = [clip[mask] for clip, mask in zip(features, masks, strict=True)]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
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

    def fill_prefix(
        self, mask: torch.Tensor, inputs_embeds: torch.Tensor, cached: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """
        Puts the soft prefix where `mask` [B, length] says that `<prefix>` placeholders stand: all of it in each row
        that has any. Arguments and errors are those of [`fill_placeholders`].
        """
        if self.prefix is None:
            return fill_placeholders("prefix", None, mask, inputs_embeds, cached)
        counts = mask.sum(-1)
        fits = ((counts == 0) | (counts == len(self.prefix))).all() | (cached > 0)
        torch_compilable_check(fits, lambda: misfit("prefix", int(counts.max()), len(self.prefix)))
        # The copies are read in order, so a row without a prefix takes nothing from them.
        return scatter(self.prefix.repeat(len(mask), 1), mask, inputs_embeds)


def fill_placeholders(
    name: str,
    features: torch.Tensor | None,
    mask: torch.Tensor,
    inputs_embeds: torch.Tensor,
    cached: int | torch.Tensor = 0,
) -> torch.Tensor:
    """
    Puts soft tokens where placeholders stand. Traced by `torch.compile` and `torch.export`.

    Args:
        name: Which placeholders: "image", "audio" or "prefix".
        features: [tokens, hidden size], or None where there is nothing to put.
        mask: Boolean [B, length]; where the placeholders stand.
        inputs_embeds: [B, length, hidden size].
        cached: How many tokens of a cache the text continues. What continues a cache may be the model's own guess,
            with any id: it may have placeholders without features.

    Returns:
        The new `inputs_embeds`.

    Raises:
        ValueError: if there are more or fewer placeholders than features, or if those are of another width.
    """
    if features is None:
        found = mask.sum()
        torch_compilable_check((found == 0) | (cached > 0), lambda: misfit(name, int(found), 0))
        return inputs_embeds
    check_placeholders(name, features, mask)
    if features.shape[-1] != inputs_embeds.shape[-1]:
        raise ValueError(
            f"The {name} features are {features.shape[-1]} wide, the language model {inputs_embeds.shape[-1]}. Are "
            "they another model's? An assistant model must be as wide as the model that it assists."
        )
    return scatter(features, mask, inputs_embeds)


def check_placeholders(name: str, features: torch.Tensor, mask: torch.Tensor) -> None:
    """
    Raises:
        ValueError: if `mask` [B, length] has more or fewer places than there are `features` [tokens, hidden size].
    """
    found = mask.sum()
    available = features.shape[0]  # not `len`, which asks for the number itself where it is traced
    torch_compilable_check(found == available, lambda: misfit(name, int(found), available))


def scatter(features: torch.Tensor, mask: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Puts the first of `features` [tokens, hidden size] where `mask` [B, length] holds."""
    return inputs_embeds.masked_scatter(mask[..., None], features.to(inputs_embeds.device, inputs_embeds.dtype))


def misfit(name: str, placeholders: int, features: int) -> str:
    """The message for placeholders and features that differ in number."""
    hints = {
        "prefix": "Does the model hold a prefix (`config.prefix_length`), and of that length?",
        "image": "Do `pixel_values` and the text come from one call of the processor?",
        "audio": "Do `input_features`, `input_features_mask` and the text come from one call of the processor? "
        "(A mask makes the model leave out the tokens that are padding only.)",
    }
    return (
        f"The text has {placeholders} <{name}> placeholders, but there are {features} {name} features. {hints[name]}"
    )


__all__ = ["PREFIX_STD", "EarMixin", "check_placeholders", "fill_placeholders", "misfit"]
