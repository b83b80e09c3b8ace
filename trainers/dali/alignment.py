"""Stage 1b: an audio encoder learns, from video alone, tokens distributed like the image tokens of the frame.

    python -m trainers.dali.alignment dali/alignment [--setting value ...]

One step: audio tokens A of a clip [B, n, d] and image tokens I of one of its frames [B, m, d] (frozen tower); token
weights alpha, beta (uniform, or scored by cross-attention); a loss between the two weighted sets, averaged over the
batch. Audio encoder, projection and scorers train.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on token distribution alignment; numbers of the released code.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, EvalPrediction, PreTrainedModel, TrainingArguments
from transformers.hf_argparser import HfArg

from modeling_dali import DaliAudioModel
from modeling_dali.explain import save_scorers
from modeling_dali.modeling_dali_utils import DaliMixin, find_captioner
from modeling_dali.processing_audio import AudioCaptionProcessorMixin
from trainers.dali import image_token_cache
from trainers.dali.data_collator import AlignmentCollator
from trainers.fingerprints import rows_hash, weights_hash
from trainers.losses import (
    EntropySchedule,
    TransportScorer,
    attentive_transport,
    contrastive,
    entropy,
    mean_tokens,
    mmd,
    optimal_transport,
)
from trainers.recipes import Dtype, load_model, load_splits, save_model
from trainers.rows import require_columns, without_decoding
from trainers.stage import StageArguments, StageTrainer, run_stage

AlignmentLoss = Literal["attentive_ot", "contrastive", "mmd", "ot", "sinkhorn", "unbalanced_ot"]
LAYERS = ("vision_feature_layer", "vision_feature_select_strategy")
LOSSES = get_args(AlignmentLoss)


@dataclass
class AlignmentConfig(StageArguments):
    """Settings of stage 1b. The data set has `audio` and `frames` or `image`."""

    # Model and data
    model: str = HfArg(default="llava-hf/llava-1.5-7b-hf", help="Folder or Hub id of a LLaVA or DALI model.")
    audio_encoder: str | None = HfArg(
        default=None,
        help="Where the audio encoder of a LLaVA model starts from: a CAV-MAE or DALI .pth, or the folder or Hub id "
        "of an audio model; none for random weights.",
    )
    dtype: Dtype = HfArg(default="float32", help="Type of the frozen weights.")
    augment: bool = HfArg(default=True, help="Add noise to the features and roll their time axis.")
    first_frame: bool = HfArg(
        default=False, help="Take the first frame of each clip, as the released code does, and not a random one."
    )
    mask_padding: bool = HfArg(default=False, help="Leave audio tokens that are padding only out of the loss.")
    cache_image_tokens: str | None = HfArg(
        default=None, help="Folder that keeps image tokens, so that the image tower runs once per frame."
    )
    cache_features: bool = HfArg(default=False, help="Keep the features of all clips in memory; for small data sets.")

    # Loss
    loss: AlignmentLoss = HfArg(default="attentive_ot", help="Distance between the token sets.")
    epsilon: float = HfArg(
        default=5e-4, help="Entropic regularisation of sinkhorn and unbalanced_ot, relative to the mean cost."
    )
    marginal_penalty: float = HfArg(
        default=1.0, help="Penalty of unbalanced_ot on the marginals, relative to the mean cost."
    )
    temperature: float = HfArg(default=0.05, help="Temperature of the contrastive loss.")

    # Attentive optimal transport
    attentive_solver: Literal["exact", "sinkhorn", "unbalanced"] = HfArg(
        default="exact", help="How attentive_ot solves the transport."
    )
    scorer_heads: int = HfArg(
        default=8, help="Heads of the scorers' attention; 0 for the paper's single plain attention."
    )
    scorer_temperature: float = HfArg(default=20.0, help="Temperature of the scorers' softmax over tokens.")
    uniform_mix: float = HfArg(default=0.5, help="Share of uniform weights in the scored ones.")
    entropy_start: float = HfArg(default=500.0, help="Weight lambda of the entropies at first.")
    entropy_end: float = HfArg(default=100.0, help="Weight lambda of the entropies in the end.")
    uniform_epochs: float = HfArg(default=1.0, help="Epochs with uniform weights; from their end lambda falls.")
    entropy_decay_end: float = HfArg(default=5.0, help="Epochs after which lambda is entropy_end.")
    entropy_staircase: bool = HfArg(
        default=True, help="Let lambda fall by steps, at the end of each epoch, as the released code does."
    )
    encoder_transport_gradient: float = HfArg(
        default=1.0,
        help="Factor of the transport's gradient for the encoder once weights are scored: 1 is the gradient of the "
        "loss, 2 what the released code has by its two backward passes.",
    )

    # Optimisation
    train_positions: bool = HfArg(default=True, help="Train the positions of CAV-MAE's encoder, as published.")
    learning_rate: float = 1e-4
    scorer_learning_rate: float = HfArg(default=1e-4, help="Learning rate of the scorers.")
    halve_after: float = HfArg(
        default=10.0, help="Epochs after which a constant learning rate is halved for the first time; 0 for never."
    )
    halve_every: float = HfArg(default=5.0, help="Epochs after which it is halved again.")
    halve_scorers: bool = HfArg(
        default=False, help="Halve the scorers' learning rate too, which the released code does not."
    )
    lr_scheduler_type: str = "constant"
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    weight_decay: float = 5e-7
    max_grad_norm: float = 0.0
    num_train_epochs: float = 20
    per_device_train_batch_size: int = 256
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2


class AlignmentModel(nn.Module):
    """
    Both encoders, the scorers and the loss. The language model has no part in this stage and stays outside.

    Args:
        dali: The model whose audio side trains.
        args: Settings.
    """

    audio_tower: PreTrainedModel

    def __init__(self, dali: DaliMixin, args: AlignmentConfig):
        super().__init__()
        self.args = args
        self.names = {part: f"{dali.ear_key}{part}" for part in ("audio_tower", "audio_projection")}
        self.names |= {name.rpartition(".")[2]: name for name in dali.image_modules}
        for part, name in self.names.items():
            self.add_module(part, dali.get_submodule(name))
        if args.loss == "attentive_ot":
            self.scorer = TransportScorer(
                dali.ear.audio_projection.out_features,
                args.scorer_heads or None,
                args.scorer_temperature,
                args.uniform_mix,
            )
        self.get_audio_tokens, self.audio_token_mask = dali.ear.get_audio_tokens, dali.ear.audio_token_mask
        self.get_image_tokens = dali.get_image_tokens
        self._no_split_modules = [*(dali.ear.audio_tower._no_split_modules or []), *(dali._no_split_modules or [])]

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Checkpoints the activations of the audio encoder."""
        self.audio_tower.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        input_features: torch.Tensor,
        pair_weight: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        uniform: bool = True,
        entropy_weight: float = 0.0,
        **pictures: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_features: [B, frames, bins].
            pair_weight: [B], 0 for pairs that do not count.
            image_tokens: [B, m, d], in the place of pictures.
            input_features_mask: [B, frames]; leaves tokens of padding out of the loss.
            uniform: Whether tokens weigh the same, whatever the scorers say.
            entropy_weight: lambda.
            pictures: What the captioner's image processor gives, `pixel_values` [B, 3, height, width] for LLaVA.

        Returns:
            `losses` [B]; in eval mode also `audio` and `image`, moments of both token sets (see [`moments`]).
        """
        audio = self.get_audio_tokens(input_features)  # A [B, n, d]
        if image_tokens is None:
            with torch.no_grad():
                image_tokens = self.get_image_tokens(**pictures)  # I [B, m, d]
        image, image_mask = pad_tokens(image_tokens)
        image = image.to(audio.dtype)
        mask = None if input_features_mask is None else self.audio_token_mask(input_features_mask)
        weights: dict[str, Any] = {"audio_mask": mask, "image_mask": image_mask, "pair_confidence": pair_weight}

        losses: Any
        match self.args.loss:
            case "mmd":
                losses = mmd(audio, image, **weights)
            case "ot":
                losses = optimal_transport(audio, image, **weights)
            case "sinkhorn":
                losses = optimal_transport(audio, image, solver="sinkhorn", epsilon=self.args.epsilon, **weights)
            case "unbalanced_ot":
                weights |= {"epsilon": self.args.epsilon, "marginal_penalty": self.args.marginal_penalty}
                losses = optimal_transport(audio, image, solver="unbalanced", **weights)
            case "attentive_ot":
                weights |= {"solver": self.args.attentive_solver}
                if uniform:
                    losses = attentive_transport(audio, image, None, None, entropy_weight, **weights)
                else:
                    factor = self.args.encoder_transport_gradient
                    losses = scored_transport(self.scorer, audio, image, entropy_weight, factor, **weights)
            case "contrastive":
                pooled = mean_tokens(audio, mask), mean_tokens(image, image_mask)
                losses = contrastive(*pooled, 1 / self.args.temperature, pair_confidence=pair_weight)
        if self.training:
            return {"losses": losses}
        return {"losses": losses, "audio": moments(audio, mask), "image": moments(image, image_mask)}


def pad_tokens(tokens: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Token sets of one size each, and a mask of what is real.

    Args:
        tokens: [B, m, d], or a list of [m, d] where sets differ in size.

    Returns:
        [B, m, d], and a boolean mask [B, m], None where all are real.
    """
    if isinstance(tokens, torch.Tensor):
        return tokens, None
    masks = [torch.ones(len(some), dtype=torch.bool, device=some.device) for some in tokens]
    return pad_sequence(tokens, batch_first=True), pad_sequence(masks, batch_first=True)


def scored_transport(
    scorer: TransportScorer,
    audio: torch.Tensor,
    image: torch.Tensor,
    entropy_weight: float,
    encoder_factor: float = 1.0,
    audio_mask: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
    pair_confidence: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    Attentive transport with scored weights, where the encoder may feel the transport more than the scorers do.

    Args:
        scorer: Gives the weights.
        audio: A [B, n, d].
        image: I [B, m, d].
        entropy_weight: lambda.
        encoder_factor: Factor of the transport's gradient with respect to A; the loss itself stays the same.
        audio_mask, image_mask: [B, n] and [B, m], True for tokens that count.
        pair_confidence: [B], factors of the losses.
        options: Options of the solver.

    Returns:
        [B] losses.
    """
    masks = {"audio_mask": audio_mask, "image_mask": image_mask}
    options |= {**masks, "pair_confidence": pair_confidence}
    losses: Any
    if encoder_factor == 1:
        alpha, beta = scorer(audio, image, **masks)
        losses = attentive_transport(audio, image, alpha, beta, entropy_weight, **options)
        return losses
    felt = audio.detach() + encoder_factor * (audio - audio.detach())  # A, with its gradient multiplied
    alpha, beta = scorer(felt, image, **masks)
    losses = attentive_transport(felt, image, alpha, beta, 0.0, **options)
    alpha, beta = scorer(audio, image, **masks)
    entropies = entropy(alpha, audio, audio_mask) + entropy(beta, image, image_mask)
    return losses - entropy_weight * (entropies if pair_confidence is None else entropies * pair_confidence)


class AlignmentTrainer(StageTrainer):
    """
    Trains audio encoder, projection and scorers of a model.

    Args:
        model: A DALI model.
        args: Settings.
        processor: The model's processor.
        train_dataset, eval_dataset: Rows with `audio` and `frames` or `image`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self,
        model: DaliMixin,
        args: AlignmentConfig,
        processor: AudioCaptionProcessorMixin,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        torch.manual_seed(args.seed)
        self.dali = model
        self.schedule = EntropySchedule(
            args.entropy_start, args.entropy_end, args.uniform_epochs, args.entropy_decay_end, args.entropy_staircase
        )
        collator = AlignmentCollator(
            processor,
            mask_padding=args.mask_padding,
            augment=args.augment,
            first_frame=args.first_frame,
            cache_features=args.cache_features,
            max_skipped=args.max_skipped,
            seed=args.seed,
        )
        if args.cache_image_tokens is not None:
            folder = args.cache_image_tokens
            collator.image_tokens = cache_image_tokens(folder, model, processor, args, train_dataset)
        trained = ["audio_tower", "audio_projection", *(["scorer"] if args.loss == "attentive_ot" else [])]
        if args.ddp_find_unused_parameters is None:  # scorers rest while weights are uniform
            args.ddp_find_unused_parameters = args.loss == "attentive_ot"
        wrapper = AlignmentModel(model, args)
        super().__init__(
            wrapper,
            args,
            trained,
            processor,
            train_dataset,
            eval_dataset,
            collator,
            compute_metrics=alignment_metrics,
            **kwargs,
        )
        if isinstance(model.ear.audio_tower, DaliAudioModel):
            model.ear.audio_tower.positions.requires_grad_(args.train_positions)
        behind = getattr(model.config, "alignment_target", "projector_input") == "projector_output"
        if behind and train_dataset is not None and not model.ear.audio_projection.bias.any():  # as it was made
            start_at_image_tokens(model, collator, train_dataset)
        self.label_names = ["pair_weight"]
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the pairs of the global batch that count."""
        training = self.model.training
        if training:
            self.freeze()
        step = self.schedule(self.state.epoch or 0.0)
        uniform, entropy_weight = (step.uniform, step.entropy_weight) if training else (True, 0.0)
        outputs = model(**inputs, uniform=uniform, entropy_weight=entropy_weight)
        pairs = self.accelerator.reduce(inputs["pair_weight"].sum(), reduction="mean")  # of all processes
        loss = outputs.pop("losses").sum() / pairs.clamp(min=torch.finfo(pairs.dtype).tiny)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with lambda."""
        if "loss" in logs and self.args.loss == "attentive_ot":
            step = self.schedule(self.state.epoch or 0.0)
            logs |= {"entropy_weight": step.entropy_weight, "uniform_weights": float(step.uniform)}
        super().log(logs, start_time)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Adam as published, or another `optim`; the scorers have a learning rate of their own."""
        model = model or self.model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if "scorer." not in name], "lr": self.args.learning_rate},
            {"params": [p for name, p in trained if "scorer." in name], "lr": self.args.scorer_learning_rate},
        ]
        groups = [group | {"weight_decay": self.args.weight_decay} for group in groups if group["params"]]
        optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.args.optim == TrainingArguments.default_optim:
            optimizer_class = torch.optim.Adam
            kwargs.pop("fused", None)
        self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Scorers that rested so far have no optimizer state, and sharded loading wants some of all that trains.
        rested = (self.state.epoch or 0.0) <= self.args.uniform_epochs
        scorers = [p for name, p in self.trained_parameters() if rested and name.startswith("scorer.")]
        for parameter in scorers:
            parameter.requires_grad_(False)
        super()._load_optimizer_and_scheduler(checkpoint)
        for parameter in scorers:
            parameter.requires_grad_(True)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """
        Halves a constant learning rate every few epochs, as published, that of the scorers only with
        `halve_scorers`; other schedules are `Trainer`'s.
        """
        args = self.args
        halves = args.lr_scheduler_type == "constant" and args.halve_after
        if halves and getattr(self, "lr_scheduler", None) is None:
            global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            steps_per_epoch = math.ceil(len(self.train_dataset) / global_batch)

            def factor(step: int) -> float:
                late = step / steps_per_epoch - args.halve_after
                return 1.0 if late < 0 else 0.5 ** (1 + math.floor(late / args.halve_every))

            optimizer = optimizer or self.optimizer
            factors = [factor, factor if args.halve_scorers else lambda step: 1.0][: len(optimizer.param_groups)]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the model (see [`save_model`]), and the scorers beside it."""
        state = None
        if state_dict is None:
            state_dict = self.model.state_dict()
        else:
            named = [(name.partition("."), t) for name, t in state_dict.items() if not name.startswith("scorer.")]
            names = self.accelerator.unwrap_model(self.model).names
            state = self.dali.state_dict() | {f"{names[part]}.{rest}": t for (part, _, rest), t in named}
        scorer = {name.removeprefix("scorer."): t for name, t in state_dict.items() if name.startswith("scorer.")}
        save_model(self.dali, folder, state)
        self.processing_class.save_pretrained(folder)
        if scorer:
            args = self.args
            save_scorers(folder, scorer, args.scorer_heads, args.scorer_temperature, args.uniform_mix)


@torch.no_grad()
def start_at_image_tokens(model: DaliMixin, collator: AlignmentCollator, rows, clips: int = 16) -> None:
    """
    Gives audio tokens the mean and the spread of image tokens, before anything else is learned.

    Behind a captioner's projector these lie far from where a new projection puts its tokens: for one of published size
    at a mean length of 19, where words have 1.

    Args:
        model: A model with an untrained projection.
        collator: Reads rows.
        rows: Clips, a data set or a stream.
        clips: How many of them are looked at.
    """
    if hasattr(rows, "__len__"):
        chosen = [rows[index * len(rows) // clips] for index in range(clips)]
    else:
        chosen = list(islice(rows, clips))
    batch = BatchFeature(collator([row | {"index": index} for index, row in enumerate(chosen)]))
    batch.pop("input_features_mask", None)
    projection, counts = model.ear.audio_projection, batch.pop("pair_weight") > 0
    sounds = batch.pop("input_features").to(projection.weight.device)
    audio = model.eval().get_audio_tokens(sounds)[counts].flatten(0, 1)
    pictures = model.get_image_tokens(**batch.to(sounds.device, model.dtype))
    image = torch.cat([tokens for tokens, counted in zip(pictures, counts, strict=True) if counted])
    scale = (image - image.mean(0)).std() / (audio - audio.mean(0)).std()
    projection.weight.mul_(scale)
    projection.bias.copy_(image.mean(0) - scale * audio.mean(0))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def moments(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean token and mean squared length of the tokens of each set.

    Args:
        tokens: [B, n, d].
        mask: [B, n], True for tokens that count.

    Returns:
        [B, d + 1], without gradient.
    """
    tokens = tokens.detach().float()
    lengths = mean_tokens(tokens.square().sum(-1, keepdim=True), mask)
    return torch.cat([mean_tokens(tokens, mask), lengths], dim=-1)


def alignment_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    Retrieval between the mean tokens of sounds and pictures, both ways, and the modality gap.

    Args:
        prediction: Moments [N, d + 1] of both sides; as labels the weights [N] of the pairs.

    Returns:
        `audio_to_image_R@k`, `image_to_audio_R@k`: share of clips whose partner is among the k most similar (cosine);
        `modality_gap`: distance of the means of all audio and all image tokens, over the root mean square distance
        of tokens from the mean of their side.
    """
    counts = torch.from_numpy(prediction.label_ids) > 0
    audio, image = (torch.from_numpy(side)[counts].double() for side in prediction.predictions)
    similarity = nn.functional.normalize(audio[:, :-1], dim=-1) @ nn.functional.normalize(image[:, :-1], dim=-1).T
    metrics: dict[str, float] = {}
    for name, scores in (("audio_to_image", similarity), ("image_to_audio", similarity.T)):
        better = (scores > scores.diagonal()[:, None]).sum(1)
        metrics |= {f"{name}_R@{k}": float((better < k).double().mean()) for k in (1, 5, 10)}
    means = [side[:, :-1].mean(0) for side in (audio, image)]
    spreads = [
        (side[:, -1].mean() - mean.square().sum()).clamp(min=0).sqrt()
        for side, mean in zip((audio, image), means, strict=True)
    ]
    metrics["modality_gap"] = float((means[0] - means[1]).norm() / (sum(spreads) / 2))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Image tokens on disk


def cache_image_tokens(
    folder: str, model: DaliMixin, processor: AudioCaptionProcessorMixin, args: TrainingArguments, rows
) -> image_token_cache.ImageTokenCache:
    """
    Makes (what is missing of) the cache of the image tokens of a data set.

    Raises:
        ValueError: for a stream, or a folder that holds the tokens of other data.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError("`cache_image_tokens` needs a data set with a length, not a stream.")
    require_columns(rows, [("image", "frames")], "training")
    modules = nn.ModuleList(model.image_modules.values()).eval().to(args.device)

    @torch.no_grad()
    def encode(pictures: list) -> torch.Tensor:
        inputs = BatchFeature(processor.image_inputs(pictures)).to(args.device, model.dtype)
        tokens = model.get_image_tokens(**inputs)
        if not isinstance(tokens, torch.Tensor):
            raise ValueError("Image tokens can be cached only where all pictures have as many of them.")
        return tokens

    identity = {
        "weights": weights_hash(modules),
        "rows": rows_hash(rows),
        "preprocessing": processor.image_processor.to_json_string(),
        "layers": [getattr(find_captioner(model).config, name, None) for name in LAYERS],
        "target": getattr(model.config, "alignment_target", "projector_input"),
    }
    return image_token_cache.build(
        folder,
        without_decoding(rows),
        encode,
        identity,
        args.per_device_train_batch_size,
        args.process_index,
        args.world_size,
        barrier=torch.distributed.barrier if args.world_size > 1 else lambda: None,
    )


def new_trainer(config: AlignmentConfig) -> AlignmentTrainer:
    """The trainer, with model and data, that the settings describe."""
    train_rows, eval_rows = load_splits(config)
    model, processor = load_model(config.model, config.audio_encoder, config.dtype, config.seed)
    return AlignmentTrainer(model, config, processor, train_rows, eval_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(AlignmentConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
