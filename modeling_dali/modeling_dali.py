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

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_dali import DaliConfig
from .ear_dali import DaliMixin, EarMixin, fill_placeholders, require_all_weights

# What language models call their cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


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


class DaliModel(EarMixin, LlavaModel):
    """LLaVA without its language modelling head, with an audio encoder beside the image tower."""

    config: DaliConfig
    config_class = DaliConfig
    input_modalities = ("image", "audio", "text")

    def __init__(self, config: DaliConfig):
        super().__init__(config)
        # The projector reads as many image features as there are selected vision layers, side by side.
        width = self.multi_modal_projector.linear_1.in_features
        self.build_ear(width, copy.deepcopy(self.multi_modal_projector))
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
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # drops the class token
        return torch.cat(
            [hidden_states[i][:, first:] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1
        )

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
            masks = {
                name: self.placeholder_mask(getattr(self.config, f"{name}_token_index"), input_ids, inputs_embeds)
                for name in ("image", "audio", "prefix")
            }
            soft_tokens = features | {"prefix": self.prefix_for(masks["prefix"])}
            for name, mask in masks.items():
                inputs_embeds = fill_placeholders(name, soft_tokens[name], mask, inputs_embeds)

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

    def __init__(self, config: DaliConfig):
        super().__init__(config)
        self.model = DaliModel(config)
        self.post_init()

    @property
    def ear(self) -> DaliModel:
        """What holds the ear."""
        return self.model

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
        projector = copy.deepcopy(llava.model.multi_modal_projector)
        model.model.build_ear(projector.linear_1.in_features, projector, audio_encoder)
        model.model.audio_tower.to(llava.device, llava.dtype)
        model.model.audio_projection.to(llava.device, llava.dtype)
        model.generation_config = copy.deepcopy(llava.generation_config)
        model.generation_config.max_new_tokens = 64  # as in the released code
        model.tie_weights()
        if tokenizer is not None:
            model.add_media_tokens(tokenizer)
        return model.train(llava.training)

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`DaliModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values)

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


DaliForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["DaliForConditionalGeneration", "DaliModel"]
