"""
DALI: a LLaVA captioner that hears.

Sound goes through the ear (see `ear_dali`), and what the ear makes of it stands in the place of `<audio>` placeholders
before the language model. Images take LLaVA's own path, untouched. Soft prefix tokens, where the model holds some,
stand in the place of `<prefix>` placeholders.

Source: *An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using Audiovisual Distribution
Alignment*, NeurIPS 2024, arXiv 2410.05997.
"""

import copy
import dataclasses
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .configuration_dali import DaliConfig
from .ear_dali import EarMixin, check_placeholders, fill_placeholders
from .modeling_dali_utils import DaliMixin, ear_fields, find_ear, require_all_weights

# What the forward passes take beside their named arguments.
KNOWN_KWARGS = {"use_cache", *TransformersKwargs.__annotations__}


class DaliModel(EarMixin, LlavaModel):
    """LLaVA without its language modelling head, with an audio encoder beside the image tower."""

    config: DaliConfig
    config_class = DaliConfig
    input_modalities = ("image", "audio", "text")

    def __init__(self, config: DaliConfig):
        LlavaPreTrainedModel.__init__(self, config)  # LLaVA's own would draw all weights, and `post_init` once more
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # The projector reads as many image features as there are selected vision layers, side by side.
        self.build_ear(self.multi_modal_projector.linear_1.in_features, LlavaMultiModalProjector(config))
        self.post_init()

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Image tokens as LLaVA's projector reads them: the vision tower's selected layer(s), unprojected.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            [B, tokens, width]: 576 x 1024 for CLIP ViT-L/14-336.
        """
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=layers, return_dict=True).hidden_states
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # drops the class token
        return torch.cat([hidden_states[layer][:, first:] for layer in layers], dim=-1)

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

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where images and sounds stand.

        Args:
            input_ids: [B, length], or None where there are embeddings only.
            inputs_embeds: [B, length, hidden size].
            image_features: [tokens, hidden size], if the placeholders are to be checked against them; so too
                `audio_features`.

        Returns:
            Boolean masks of `<image>` and of `<audio>` placeholders, each [B, length, 1].

        Raises:
            ValueError: if there are more or fewer placeholders than features.
        """
        masks = []
        for name, features in (("image", image_features), ("audio", audio_features)):
            mask = self.placeholder_mask(getattr(self.config, f"{name}_token_index"), input_ids, inputs_embeds)
            if features is not None:
                check_placeholders(name, features, mask)
            masks.append(mask[..., None])
        return masks[0], masks[1]

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings [B, length, hidden size]; placeholders may lie outside the vocabulary."""
        embeddings = self.get_input_embeddings()
        for token_id in (self.config.audio_token_index, self.config.prefix_token_index):
            if token_id >= embeddings.num_embeddings:
                input_ids = input_ids.masked_fill(input_ids == token_id, 0)
        return embeddings(input_ids)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaModelOutputWithPast:
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
        unknown = [name for name, value in kwargs.items() if name not in KNOWN_KWARGS and value is not None]
        if unknown:
            raise TypeError(f"Unknown inputs {unknown}: sound is `input_features`, images are `pixel_values`.")
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_text(input_ids)
        elif inputs_embeds is None or input_ids is not None:
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        encoded = dict(mm_encoder_outputs or {})
        for name, given in (("image", pixel_values), ("audio", input_features)):
            if given is not None and encoded.get(name) is not None:
                raise ValueError(f"The {name} inputs were given twice: raw and as `mm_encoder_outputs`.")
        captured = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **captured,
            )
        if input_features is not None:
            encoded["audio"] = self.get_audio_features(
                input_features, input_features_mask, return_dict=True, **captured
            )

        if encoded or inputs_embeds.shape[1] > 1:  # a single token is the model's own
            cached = 0 if cache is None else cache.get_seq_length()
            inputs_embeds = self.fill_all_placeholders(input_ids, inputs_embeds, encoded, cached)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            **outputs, image_outputs=encoded.get("image"), audio_outputs=encoded.get("audio")
        )

    def fill_all_placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        encoded: dict[str, BaseModelOutputWithPooling],
        cached: int | torch.Tensor,
    ) -> torch.Tensor:
        """Images, sounds and the soft prefix into their places; see [`fill_placeholders`] for arguments and errors."""
        # All are looked for first: without ids they are found by their embeddings, which are then replaced.
        image_mask, audio_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        prefix_mask = self.placeholder_mask(self.config.prefix_token_index, input_ids, inputs_embeds)
        for name, mask in (("image", image_mask), ("audio", audio_mask)):
            features = None if encoded.get(name) is None else torch.cat(list(encoded[name].pooler_output))
            inputs_embeds = fill_placeholders(name, features, mask[..., 0], inputs_embeds, cached)
        return self.fill_prefix(prefix_mask, inputs_embeds, cached)


class DaliForConditionalGeneration(DaliMixin, LlavaForConditionalGeneration):
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
    ear_key = "model."

    def __init__(self, config: DaliConfig):
        LlavaPreTrainedModel.__init__(self, config)  # as in `DaliModel`
        self.model = DaliModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def ear(self) -> DaliModel:
        """What holds the ear."""
        return self.model

    @classmethod
    def from_llava(
        cls,
        llava: "str | os.PathLike[str] | LlavaForConditionalGeneration",
        audio_encoder: "str | os.PathLike[str] | PreTrainedModel | None" = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        audio_config: PreTrainedConfig | None = None,
        ear: str | os.PathLike[str] | None = None,
        **kwargs: Any,
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
            ear: Folder or Hub id of a trained ear (see [`save_ear`]), in the place of the arguments above.
            kwargs: For `LlavaForConditionalGeneration.from_pretrained`, such as `dtype`.

        Returns:
            The model. Its audio projector is a copy of LLaVA's, its audio projection random if not given.

        Raises:
            ValueError: if the LLaVA checkpoint or the audio checkpoint lacks a weight or has one too many, or
                the ear was made for another LLaVA.
        """
        is_stock = not isinstance(llava, PreTrainedModel)
        if not isinstance(llava, PreTrainedModel):
            path = str(llava)
            llava, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
            require_all_weights(info, path)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} apply where LLaVA is loaded from a checkpoint; a model was given.")
        if isinstance(audio_encoder, PreTrainedModel):
            audio_config = audio_encoder.config
        config = config_from_llava(llava, audio_config)
        if ear is not None:
            folder = find_ear(ear)
            ear_config = cls.config_class.from_pretrained(folder)
            for name, value in ear_fields(ear_config).items():
                setattr(config, name, value)

        with torch.device("meta"):
            model = cls(config)
        for name in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(model.model, name, getattr(llava.model, name))
        model.lm_head = llava.lm_head
        projector = copy.deepcopy(llava.model.multi_modal_projector)
        model.model.build_ear(projector.linear_1.in_features, projector, audio_encoder)
        given = {"vision_config": llava.config.vision_config, "text_config": llava.config.text_config}
        given |= {"audio_config": audio_config} if isinstance(audio_encoder, PreTrainedModel) else {}
        for module in model.modules():  # what came with another configuration reads this one from now on
            for name, theirs in given.items():
                if getattr(module, "config", None) is theirs:
                    module.config = getattr(config, name)
        model.model.audio_tower.to(llava.device, llava.dtype)
        model.model.audio_projection.to(llava.device, llava.dtype)
        model.generation_config = copy.deepcopy(llava.generation_config)
        model.generation_config.max_new_tokens = 64  # as the released code evaluates
        model.tie_weights()
        if ear is not None:
            model.load_ear(folder, ear_config)
            model.tell_apart()
        elif tokenizer is not None:
            model.add_media_tokens(tokenizer)
        model.name_base(llava, is_stock)
        return model.train(llava.training)

    @property
    def image_modules(self) -> dict[str, nn.Module]:
        """The modules that make image tokens, by their names in this model."""
        return {"model.vision_tower": self.model.vision_tower}

    @classmethod
    def from_base(
        cls, captioner: "str | os.PathLike[str] | PreTrainedModel", **kwargs: Any
    ) -> "DaliForConditionalGeneration":
        """[`from_llava`] by the name that it has in every class."""
        return cls.from_llava(captioner, **kwargs)

    def add_media_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """As [`DaliMixin.add_media_tokens`]; placeholders are told apart by their embeddings too."""
        super().add_media_tokens(tokenizer)
        self.tell_apart()

    @torch.no_grad()
    def tell_apart(self) -> None:
        """
        Draws the embedding of a placeholder anew if it equals another one, on every machine the same.

        Where a model gets embeddings only (PEFT's prompt tuning), placeholders are found by them.
        """
        weight = self.get_input_embeddings().weight
        for index in (self.config.audio_token_index, self.config.prefix_token_index):
            if index < len(weight) and (weight == weight[index]).all(-1).sum() > 1:
                row = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(index))
                weight[index] = (row * self.config.text_config.initializer_range).to(weight)

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`DaliModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
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
        shift_labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaCausalLMOutputWithPast:
        """
        Args:
            labels: [B, length]; token ids to predict, -100 where there is nothing to predict.
            shift_labels: [B, length]; the same, one position earlier already, as sequence parallel training gives
                them. They take the place of `labels`.

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
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, shift_labels=shift_labels, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            audio_outputs=outputs.audio_outputs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base class's, with what assistant models and PEFT need."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, cache=cache, **kwargs)
        # The base class takes an assistant's first step for a later one and leaves out what it should see and hear.
        is_start = inputs["input_ids"] is not None and inputs["input_ids"].shape[1] > 1
        if is_start and cache is not None and cache.get_seq_length() == 0:
            inputs.setdefault("mm_encoder_outputs", kwargs.get("mm_encoder_outputs"))
        # PEFT 0.21, which wraps this method, looks for the cache by its former name.
        if "prepare_inputs_for_generation" in vars(self) and "cache" in inputs:
            inputs["past_key_values"] = inputs["cache"]
        return inputs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Encodes sounds once, before beams or samples multiply the rows, as the base class does with images."""
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        input_features = model_kwargs.pop("input_features", None)
        mask = model_kwargs.pop("input_features_mask", None)
        if input_features is not None:
            model_kwargs["mm_encoder_outputs"]["audio"] = self.model.get_audio_features(
                input_features, mask, return_dict=True
            )
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor | None,
        mm_encoder_output: dict[str, BaseModelOutputWithPooling],
        expand_size: int = 1,
        inputs_embeds: Any = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
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
        rows = torch.split(torch.cat(list(audio.pooler_output)), mask.sum(-1).tolist())
        audio.pooler_output = [row for row in rows for _ in range(expand_size)]
        return mm_encoder_output


def config_from_llava(llava: LlavaForConditionalGeneration, audio_config: PreTrainedConfig | None) -> DaliConfig:
    """The configuration of a DALI model that is built from `llava`; it shares no part with the ones given."""
    names = [field.name for field in dataclasses.fields(llava.config)]
    fields = copy.deepcopy({name: getattr(llava.config, name) for name in names} | {"audio_config": audio_config})
    vocabulary = llava.get_input_embeddings().num_embeddings
    fields |= {"audio_token_index": vocabulary, "prefix_token_index": vocabulary + 1}
    fields |= {"architectures": None, "transformers_version": None, "base_model": llava.name_or_path or None}
    # A new configuration sets the attention of all its parts; they keep what they had.
    parts = {"vision_config": llava.config.vision_config, "text_config": llava.config.text_config}
    attention = {name: part._attn_implementation for name, part in parts.items()}
    return DaliConfig(**fields, attn_implementation=attention | {"": llava.config._attn_implementation})


DaliForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["DaliForConditionalGeneration", "DaliModel"]
