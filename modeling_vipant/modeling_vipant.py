"""VIP-ANT: sound, picture and text in CLIP's embedding space.

An audio tower of CLIP's own shape is tied to CLIP's image space by video alone; since CLIP ties images to text, sound
can then be searched and named by text without any audio-text pair (arXiv 2112.08995).

The path of a sound, top to bottom: spectrogram -> overlapping patches + positions (`VipAntAudioEmbeddings`) ->
transformer (`VipAntAudioModel`) -> class token -> projection -> unit length (`VipAntModel.get_audio_features`).
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vipant import VipAntAudioConfig, VipAntConfig
from .pipeline_vipant import CUSTOM_PIPELINES

FIRST_SLICED_STEP = 6  # of time; where the positions of shorter spectrograms begin


def slice_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """A class position and consecutive time steps of a grid of patch positions.

    Args:
        positions: `[1 + time * frequency, width]`, the class token's first.
        grid: Time steps and frequency bands of `positions`.
        new_grid: Those wanted: no more time steps, as many bands.

    Returns:
        `[1 + new_time * frequency, width]`.
    """
    (time, frequency), (new_time, _) = grid, new_grid
    start = 1 + min(FIRST_SLICED_STEP, time - new_time) * frequency
    return torch.cat([positions[:1], positions[start : start + new_time * frequency]])


def interpolate_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear interpolation of a class position and a grid of patch positions.

    Args:
        positions: `[1 + rows * columns, width]`, the class token's first.
        grid: Rows and columns of `positions`.
        new_grid: Rows and columns wanted.

    Returns:
        `[1 + new_rows * new_columns, width]`.
    """
    if tuple(grid) == tuple(new_grid):
        return positions
    patches = positions[1:].T.reshape(1, -1, *grid)  # [1, width, rows, columns]
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], patches.flatten(2)[0].T])


def symmetric_cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the diagonal along rows plus along columns; the sum, as in VIP-ANT.

    Args:
        logits: `[batch, batch]`.
    """
    targets = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)


def embed(outputs: BaseModelOutputWithPooling, projection: nn.Linear, normalize: bool) -> BaseModelOutputWithPooling:
    """Puts the embeddings, projected and of unit length if wanted, in the place of a tower's `pooler_output`."""
    embeds = projection(outputs.pooler_output)
    outputs.pooler_output = F.normalize(embeds, dim=-1) if normalize else embeds
    return outputs


def average_windows(values: torch.Tensor, window_seconds: torch.Tensor) -> torch.Tensor:
    """The mean over the windows of each sound, weighted by their duration.

    Args:
        values: One row for each window, sound by sound, `[windows of all sounds, dim]`.
        window_seconds: How long each window is, `[batch, windows]`; 0 where a sound has no more.

    Returns:
        `[batch, dim]`.
    """
    present = window_seconds > 0
    padded = values.new_zeros(*present.shape, values.shape[-1])
    padded[present] = values
    weights = (window_seconds / window_seconds.sum(1, keepdim=True)).to(values.dtype)
    return (weights[..., None] * padded).sum(1)


@dataclass
class VipAntOutput(ModelOutput):
    """What `VipAntModel` gives; what belongs to an absent input is None.

    Args:
        loss: Symmetric cross entropy summed over all pairs of inputs, with `return_loss=True`.
        logits_per_audio: `[audio, text]`, or `[audio, image]` when there is no text.
        logits_per_text: `[text, audio]`, or `[text, image]` when there is no audio.
        logits_per_image: `[image, text]`, or `[image, audio]` when there is no text.
        audio_embeds: `[audio, projection_dim]`, of unit length; also `text_embeds`, `image_embeds`.
        audio_model_output: Output of the audio tower, its `pooler_output` the embedding before it is given unit
            length; also `text_model_output`, `vision_model_output`.
    """

    loss: torch.Tensor | None = None
    logits_per_audio: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    audio_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All present fields, nested outputs as tuples."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class VipAntPatchEmbedding(nn.Conv2d):
    """CLIP's patch kernel on a picture of one channel: the mean over its channels is applied."""

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """`[batch, 1, frames, bins]` to `[batch, width, time, frequency]`."""
        return F.conv2d(spectrogram, self.weight.mean(dim=1, keepdim=True), stride=self.stride)


class VipAntAudioEmbeddings(nn.Module):
    """Spectrogram to tokens: a class token, then overlapping patches in time-major order, each with its position."""

    def __init__(self, config: VipAntAudioConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = VipAntPatchEmbedding(
            config.num_channels,
            config.hidden_size,
            kernel_size=(config.patch_size[0], config.patch_size[1]),
            stride=(config.patch_stride[0], config.patch_stride[1]),
            bias=False,
        )
        time, frequency = config.grid
        self.position_embedding = nn.Embedding(1 + time * frequency, config.hidden_size)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """`[batch, frames, bins]` to `[batch, 1 + patches, width]`."""
        num_frames, num_bins = input_features.shape[1:]
        if num_bins != self.config.num_mel_bins or num_frames < self.config.patch_size[0]:
            raise ValueError(
                f"input_features of {num_frames} frames x {num_bins} mel bins; the audio tower takes at least "
                f"{self.config.patch_size[0]} frames x {self.config.num_mel_bins} bins"
            )
        features = input_features[:, None].to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(features).flatten(2).transpose(1, 2)  # [batch, time * frequency, width]
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        # By a call, as a module that is offloaded fetches its weight then.
        stored = self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=patches.device))
        grid, new_grid = self.config.grid, self.config.grid_for(num_frames)
        shorter = new_grid[0] < grid[0] and self.config.shorter_positions == "slice"
        resize = slice_positions if shorter else interpolate_positions
        return torch.cat([class_token, patches], dim=1) + resize(stored, grid, new_grid)


class VipAntPreTrainedModel(CLIPPreTrainedModel):
    """Weight initialisation and loading shared by the VIP-ANT models; the capabilities are CLIP's."""

    config: VipAntConfig
    base_model_prefix = "vipant"
    main_input_name = "input_features"
    input_modalities: tuple[str, ...] = ("audio", "image", "text")
    accepts_loss_kwargs = False  # the losses are means: Trainer divides them when it accumulates gradients
    _no_split_modules = [*CLIPPreTrainedModel._no_split_modules, "VipAntAudioEmbeddings"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, VipAntAudioEmbeddings):
            width, std = module.config.hidden_size, module.config.initializer_range * factor
            init.normal_(module.class_embedding, std=width**-0.5 * factor)
            init.normal_(module.patch_embedding.weight, std=std)
            init.normal_(module.position_embedding.weight, std=std)
        elif isinstance(module, VipAntModel):
            for projection in (module.audio_projection, module.text_projection, module.visual_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)
            for scale in (module.logit_scale, module.audio_image_logit_scale, module.audio_text_logit_scale):
                init.constant_(scale, self.config.logit_scale_init_value)
        elif isinstance(module, VipAntClassificationHead):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class VipAntAudioModel(VipAntPreTrainedModel):
    """The audio tower: CLIP's vision transformer over spectrogram patches."""

    config: VipAntAudioConfig
    input_modalities = ("audio",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: VipAntAudioConfig):
        super().__init__(config)
        self.embeddings = VipAntAudioEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's spelling
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encodes spectrograms.

        Args:
            input_features: Normalised log-mel spectrograms, `[batch, frames, bins]`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` `[batch, 1 + patches, width]` and `pooler_output` `[batch, width]`, the class token
            behind the last LayerNorm.
        """
        hidden_states = self.pre_layrnorm(self.embeddings(input_features))
        hidden_states = self.encoder(inputs_embeds=hidden_states, **kwargs).last_hidden_state
        pooled = self.post_layernorm(hidden_states[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class VipAntModel(VipAntPreTrainedModel):
    """Sound, image and text towers with one embedding space.

    Image and text towers are CLIP's and carry CLIP's parameter names, so CLIP checkpoints load. `logit_scale` is
    CLIP's and scales image-text similarity; `audio_image_logit_scale` and `audio_text_logit_scale` are those of sound.
    """

    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = (r".*\.position_ids", r"classifier\..*", r"barlow_twins\..*")

    def __init__(self, config: VipAntConfig):
        super().__init__(config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.audio_model = VipAntAudioModel._from_config(config.audio_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.audio_projection = nn.Linear(config.audio_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.audio_image_logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.audio_text_logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @classmethod
    def from_clip(cls, clip: CLIPModel | str, **audio_config: Any) -> "VipAntModel":
        """A model whose image and text towers are `clip` and whose audio tower starts from the image tower.

        The patch kernel is kept with its channels, whose mean is applied; positions are interpolated bilinearly from
        the image grid to the spectrogram's (VIP-ANT, section 3).

        Args:
            clip: A CLIP model, or the name or folder of one.
            **audio_config: Fields of `VipAntAudioConfig` that are no property of the image tower, as `num_frames`.
                `patch_stride` is half the patch in time and three quarters in frequency where not given: (16, 24)
                for ViT-B/32.

        Returns:
            The model in `clip`'s dtype and on its device. `clip` itself is left as it was.

        Raises:
            ValueError: If `audio_config` contradicts the image tower, whose weights could not be taken then.
        """
        if isinstance(clip, str):
            clip = CLIPModel.from_pretrained(clip)
        vision = clip.config.vision_config
        inherited = {
            name: getattr(vision, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_channels",
                "hidden_act",
                "layer_norm_eps",
                "attention_dropout",
                "initializer_range",
                "initializer_factor",
            )
        } | {"patch_size": (vision.patch_size, vision.patch_size)}
        for name, value in inherited.items():
            if name in audio_config and audio_config[name] != value:
                raise ValueError(f"{name}={audio_config[name]!r} contradicts CLIP's image tower, which has {value!r}")
        audio_config.setdefault("patch_stride", (vision.patch_size // 2, vision.patch_size * 3 // 4))

        model = cls(
            VipAntConfig(
                text_config=clip.config.text_config.to_dict(),
                vision_config=vision.to_dict(),
                audio_config=VipAntAudioConfig(**(inherited | audio_config)).to_dict(),
                projection_dim=clip.config.projection_dim,
                logit_scale_init_value=clip.config.logit_scale_init_value,
            )
        ).to(device=clip.device, dtype=clip.dtype)
        for name, module in clip.named_children():
            model.get_submodule(name).load_state_dict(module.state_dict())
        model.logit_scale.data.copy_(clip.logit_scale)

        state = clip.vision_model.state_dict()
        side = vision.image_size // vision.patch_size
        state["embeddings.position_embedding.weight"] = interpolate_positions(
            state["embeddings.position_embedding.weight"], (side, side), model.config.audio_config.grid
        )
        model.audio_model.load_state_dict(state)
        model.audio_projection.load_state_dict(clip.visual_projection.state_dict())
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """The base class's; the configuration names the pipeline whose code is saved beside it."""
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)  # transformers writes classes into it
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        window_seconds: torch.Tensor | None = None,
        normalize: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeds sounds.

        Args:
            input_features: Normalised log-mel spectrograms, `[batch, frames, bins]`; any number of frames. Or
                `[batch, windows, frames, bins]`, with `window_seconds`.
            input_features_mask: Accepted from the front end and not used: padding is silence to the tower, as it was
                in training.
            window_seconds: How long each window of a sound is, `[batch, windows]`; 0 where a sound has no more. The
                embedding of a sound is the mean of those of its windows, weighted by their duration.
            normalize: Whether embeddings are given unit length.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            The tower's output with the embeddings `[batch, projection_dim]` as its `pooler_output`; everything else
            in it is of single windows.
        """
        if window_seconds is None:
            outputs = self.audio_model(input_features=input_features, return_dict=True, **kwargs)
            return embed(outputs, self.audio_projection, normalize)
        outputs = self.audio_model(input_features=input_features[window_seconds > 0], return_dict=True, **kwargs)
        mean = average_windows(embed(outputs, self.audio_projection, normalize=True).pooler_output, window_seconds)
        outputs.pooler_output = F.normalize(mean, dim=-1) if normalize else mean
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, normalize: bool = True, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Embeds images.

        Args:
            pixel_values: `[batch, 3, height, width]`, from CLIP's image processor.
            normalize: Whether embeddings are given unit length.
            **kwargs: `interpolate_pos_encoding`, `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            The tower's output with the embeddings `[batch, projection_dim]` as its `pooler_output`.
        """
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return embed(outputs, self.visual_projection, normalize)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        normalize: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeds texts.

        Args:
            input_ids: `[batch, length]`, from CLIP's tokenizer.
            attention_mask: `[batch, length]`, 1 for tokens and 0 for padding.
            normalize: Whether embeddings are given unit length.
            **kwargs: `position_ids`, `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            The tower's output with the embeddings `[batch, projection_dim]` as its `pooler_output`.
        """
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return embed(outputs, self.text_projection, normalize)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        window_seconds: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VipAntOutput:
        """Embeds what is given and compares each kind of input with each other kind.

        Args:
            input_ids: Texts, `[texts, length]`.
            pixel_values: Images, `[images, 3, height, width]`.
            input_features: Sounds, `[sounds, frames, bins]`; long ones in windows, see `get_audio_features`.
            attention_mask: Mask of the texts, `[texts, length]`.
            input_features_mask: Accepted from the front end and not used: padding is silence to the tower, as it was
                in training.
            window_seconds: How long each window of a long sound is, `[sounds, windows]`.
            return_loss: Whether the inputs are matched pairs whose contrastive loss is wanted.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            Embeddings of each input, scaled similarities of each pair, and the loss where asked for.

        Raises:
            TypeError: For an unknown keyword argument.
            ValueError: Without any input, or for a loss of fewer than two kinds or of unequal numbers.
        """
        if unknown := kwargs.keys() - TransformersKwargs.__annotations__.keys():
            raise TypeError(f"VipAntModel got unknown arguments: {', '.join(sorted(unknown))}")
        if input_ids is None and pixel_values is None and input_features is None:
            raise ValueError("VipAntModel needs input_features, pixel_values or input_ids")
        audio = image = text = audio_embeds = image_embeds = text_embeds = None
        if input_features is not None:
            audio = self.get_audio_features(
                input_features, window_seconds=window_seconds, normalize=False, return_dict=True, **kwargs
            )
            audio_embeds = F.normalize(audio.pooler_output, dim=-1)
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, normalize=False, return_dict=True, **kwargs)
            image_embeds = F.normalize(image.pooler_output, dim=-1)
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, normalize=False, return_dict=True, **kwargs)
            text_embeds = F.normalize(text.pooler_output, dim=-1)

        logits_per_audio = logits_per_text = logits_per_image = None
        pairs = []
        if audio_embeds is not None and image_embeds is not None:
            logits_per_audio = self.audio_image_logit_scale.exp() * audio_embeds @ image_embeds.T
            logits_per_image = logits_per_audio.T
            pairs.append(logits_per_audio)
        if image_embeds is not None and text_embeds is not None:
            logits_per_image = self.logit_scale.exp() * image_embeds @ text_embeds.T
            logits_per_text = logits_per_image.T
            pairs.append(logits_per_image)
        if audio_embeds is not None and text_embeds is not None:
            logits_per_audio = self.audio_text_logit_scale.exp() * audio_embeds @ text_embeds.T
            logits_per_text = logits_per_audio.T
            pairs.append(logits_per_audio)

        loss = None
        if return_loss:
            if not pairs or any(len(logits) != len(logits.T) for logits in pairs):
                raise ValueError("return_loss=True needs at least two kinds of input, as many of each")
            loss = torch.stack([symmetric_cross_entropy(logits) for logits in pairs]).sum()
        return VipAntOutput(
            loss=loss,
            logits_per_audio=logits_per_audio,
            logits_per_text=logits_per_text,
            logits_per_image=logits_per_image,
            audio_embeds=audio_embeds,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            audio_model_output=audio,
            text_model_output=text,
            vision_model_output=image,
        )


class VipAntClassificationHead(nn.Module):
    """VIP-ANT's head: LayerNorm, a linear layer, and the exponential of a learnt scale as a factor.

    The linear layer has a bias where a clip has one label, and none where it has several.
    """

    def __init__(self, config: VipAntConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.projection_dim)
        bias = config.problem_type != "multi_label_classification"
        self.linear = nn.Linear(config.projection_dim, config.num_labels, bias=bias)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """`[batch, projection_dim]` to `[batch, labels]`."""
        return self.logit_scale.exp() * self.linear(self.norm(embeds))


class VipAntForAudioClassification(VipAntPreTrainedModel):
    """The audio tower with a head on its embedding: tagging (several labels a clip) or classification (one).

    `config.problem_type` chooses: "multi_label_classification" (binary cross entropy) or
    "single_label_classification" (cross entropy). A saved `VipAntModel` loads; its head is then new.
    """

    input_modalities = ("audio",)
    _keys_to_ignore_on_load_unexpected = (
        r"(text_model|vision_model|text_projection|visual_projection)\..*",
        r"(audio_(image|text)_)?logit_scale",
    )

    def __init__(self, config: VipAntConfig):
        super().__init__(config)
        if config.problem_type not in (None, "multi_label_classification", "single_label_classification"):
            raise ValueError(
                f"problem_type {config.problem_type!r} is neither 'multi_label_classification' nor "
                "'single_label_classification'"
            )
        self.audio_model = VipAntAudioModel._from_config(config.audio_config)
        self.audio_projection = nn.Linear(config.audio_config.hidden_size, config.projection_dim, bias=False)
        self.classifier = VipAntClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        labels: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        window_seconds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Scores each label.

        Args:
            input_features: Normalised log-mel spectrograms, `[batch, frames, bins]`.
            labels: Class numbers `[batch]` for one label a clip, or `[batch, num_labels]` for several (0 or 1) and
                for mixtures (shares).
            input_features_mask: Accepted from the front end and not used: padding is silence to the tower, as it was
                in training.
            window_seconds: How long each window of a long sound is, `[batch, windows]`, with `input_features`
                `[batch, windows, frames, bins]`; the scores of windows are averaged by their duration.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` `[batch, num_labels]`, and `loss` where labels are given.

        Raises:
            TypeError: For an unknown keyword argument.
        """
        if unknown := kwargs.keys() - TransformersKwargs.__annotations__.keys():
            raise TypeError(f"VipAntForAudioClassification got unknown arguments: {', '.join(sorted(unknown))}")
        if window_seconds is not None:
            input_features = input_features[window_seconds > 0]
        outputs = self.audio_model(input_features=input_features, return_dict=True, **kwargs)
        logits = self.classifier(self.audio_projection(outputs.pooler_output))
        if window_seconds is not None:
            logits = average_windows(logits, window_seconds)
        loss = None
        if labels is not None:
            if self.config.problem_type == "multi_label_classification":
                loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
            else:
                loss = F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


VipAntModel.register_for_auto_class("AutoModel")
VipAntForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["VipAntAudioModel", "VipAntForAudioClassification", "VipAntModel", "VipAntPreTrainedModel"]
