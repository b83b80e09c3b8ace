"""Contrastive training of VIP-ANT: sound, pictures and captions pulled together in CLIP's space.

    python -m trainers.vipant.contrastive vipant/va_pretraining --dataset DATA --output_dir runs/va
    accelerate launch -m trainers.vipant.contrastive vipant/at_gold_captions --model runs/va --output_dir runs/at

VA pre-training trains the audio tower against the frozen image tower, AT fine-tuning against the frozen text tower.
The loss spans the global batch: embeddings are gathered over processes, gradients are exact. With `micro_batch_size`
gradients are cached (GradCache, arXiv 2101.06983), so that memory bounds the micro batch and not the global batch.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    TrainerCallback,
    TrainerControl,
)
from transformers.hf_argparser import HfArg

from modeling_vipant import VipAntModel, VipAntProcessor, vipant_feature_extractor
from trainers.losses.barlow_twins import BarlowTwins
from trainers.losses.contrastive import contrastive
from trainers.metrics.retrieval import retrieval_metrics
from trainers.recipes import load_splits
from trainers.rows import Rows
from trainers.stage import StageArguments, StageTrainer, run_stage
from trainers.vipant.data_collator import ClipCollator
from trainers.vipant.lars import lars_optimizer

INPUTS = {"audio": ("input_features",), "image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
SCALES = {  # the parameter that scales a pair's similarities
    "audio-image": "audio_image_logit_scale",
    "audio-text": "audio_text_logit_scale",
    "image-text": "logit_scale",
}
TOWERS = {
    "audio": ("audio_model", "audio_projection"),
    "image": ("vision_model", "visual_projection"),
    "text": ("text_model", "text_projection"),
}
OUTPUTS = {"audio": "audio_model_output", "image": "vision_model_output", "text": "text_model_output"}


@dataclass
class ContrastiveConfig(StageArguments):
    """
    Settings of `ContrastiveTrainer`; the defaults are VA pre-training with AdamW, where the recipes take LARS. The
    data set has what `pairs` name: `audio`, `image` or `frames`, `caption` or `captions`.
    """

    # Model and data
    model: str = HfArg(default="openai/clip-vit-base-patch32", help="Folder or Hub id of a VIP-ANT or CLIP model.")
    num_frames: int = HfArg(default=1000, help="Spectrogram frames of a new audio tower; 1000 is 10 s.")
    frequency_mask: int = HfArg(default=32, help="Widest masked band in mel bins (SpecAugment); 0 for none.")
    time_mask: int = HfArg(default=200, help="Longest masked stretch in frames (SpecAugment); 0 for none.")
    cache_features: bool = HfArg(
        default=False, help="Keep spectrograms and pictures in memory; for small data sets of short clips."
    )

    # Objective
    pairs: list[str] = HfArg(
        default_factory=lambda: ["audio-image"], help=f"What is pulled together: {', '.join(SCALES)}."
    )
    train_towers: list[str] = HfArg(
        default_factory=lambda: ["audio"], help=f"Towers that train: {', '.join(TOWERS)}; the others stay frozen."
    )
    loss: Literal["contrastive", "barlow_twins"] = HfArg(
        default="contrastive", help="Symmetric cross entropy, both directions summed, or Barlow Twins."
    )
    fresh_logit_scales: bool = HfArg(
        default=True, help="Start the logit scales of the pairs anew at 1 / 0.07, whatever the model's are."
    )
    max_logit_scale: float | None = HfArg(
        default=None, help="Upper bound of the learnt logit scales; none for no bound, as published. CLIP's is 100."
    )
    barlow_projector: list[int] = HfArg(
        default_factory=lambda: [2048, 4096, 4096], help="Widths of the projector of Barlow Twins."
    )
    barlow_redundancy_weight: float = HfArg(default=0.0051, help="Weight of the off-diagonal terms of Barlow Twins.")
    micro_batch_size: int | None = HfArg(
        default=None, help="Clips that go through the towers at once; none for the whole batch."
    )

    # Optimisation
    per_device_train_batch_size: int = 432
    learning_rate: float = 5e-4
    weight_decay: float = 1e-6
    lars: bool = HfArg(default=False, help="Use LARS in place of optim.")
    lars_weight_lr: float = HfArg(default=0.2, help="LARS' rate of weight matrices per 256 clips of the global batch.")
    lars_bias_lr: float = HfArg(
        default=0.0048, help="LARS' rate of biases, norms and scales per 256 clips of the global batch."
    )

    dataloader_drop_last: bool = True  # the batch is the objective's own: no partial ones

    def __post_init__(self):
        super().__post_init__()
        if not self.pairs or not set(self.pairs) <= set(SCALES):
            raise ValueError(f"pairs={self.pairs}: choose among {', '.join(SCALES)}")
        if not self.train_towers or not set(self.train_towers) <= set(self.modalities):
            raise ValueError(f"train_towers={self.train_towers}: choose among {', '.join(self.modalities)}")
        if self.loss == "barlow_twins" and len(self.pairs) > 1:
            raise ValueError(f"barlow_twins has one projector, for one pair; pairs={self.pairs}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        if self.max_logit_scale is not None and not self.max_logit_scale > 1:
            raise ValueError(f"max_logit_scale={self.max_logit_scale} must be greater than 1")

    @property
    def modalities(self) -> list[str]:
        """The kinds of input that occur in `pairs`."""
        return [kind for kind in INPUTS if any(kind in pair.split("-") for pair in self.pairs)]


class ContrastiveTrainer(StageTrainer):
    """
    Trains a `VipAntModel` with a loss over the global batch.

    Args:
        model (`VipAntModel`): The model; towers outside `args.train_towers` are frozen.
        args (`ContrastiveConfig`): Settings.
        processor (`VipAntProcessor`): The model's.
        train_dataset, eval_dataset: Rows with what `args.pairs` name.
        kwargs: Further arguments of `Trainer`.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: VipAntModel,
        args: ContrastiveConfig,
        processor: VipAntProcessor,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        trained = [name for kind in args.train_towers for name in TOWERS[kind]]
        if args.loss == "barlow_twins":
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(args.seed)
                width, sizes = model.config.projection_dim, args.barlow_projector
                loss = BarlowTwins(width, sizes, args.barlow_redundancy_weight)
            model.barlow_twins = loss.to(at_least_float32(model.dtype))
            trained.append("barlow_twins")
        else:
            scales = sorted({SCALES[pair] for pair in args.pairs})
            trained += scales
            if args.fresh_logit_scales:
                for name in scales:
                    torch.nn.init.constant_(model.get_parameter(name), model.config.logit_scale_init_value)
        collator = ClipCollator(
            processor,
            args.modalities,
            args.frequency_mask,
            args.time_mask,
            args.cache_features,
            args.max_skipped,
            args.seed,
        )
        super().__init__(model, args, trained, processor, train_dataset, eval_dataset, collator, **kwargs)
        if args.max_logit_scale is not None:
            self.add_callback(_BoundLogitScale(args.max_logit_scale))

    def forward_backward(self, model, inputs: dict[str, torch.Tensor], num_items_in_batch=None) -> torch.Tensor:
        """
        Gradients of the loss over the global batch.

        1. Embed the micro batches. 2. Take the gradient of the loss with respect to all embeddings. 3. Go back through
        the towers, one micro batch after another. A single micro batch keeps its graph from 1, several are embedded
        again in 3.
        """
        model.train()
        self.freeze()
        inputs = self._prepare_inputs(inputs)
        micro_batches = list(self._micro_batches(inputs))
        single = len(micro_batches) == 1

        outputs, states = [], []
        for micro_batch in micro_batches:
            states.append(RandomState(*micro_batch.values()))
            with torch.set_grad_enabled(single):
                outputs.append(self._embed(model, micro_batch, self.args.modalities))
        whole = {kind: torch.cat([o[kind].detach() for o in outputs]) for kind in self.args.modalities}
        embeds = {kind: part.to(at_least_float32(part.dtype)) for kind, part in whole.items()}
        loss, embed_grads, loss_grads = self._loss_and_gradients(embeds, inputs.get("pair_weight"))

        start = 0
        for i, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
            last = i == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                if single:
                    output = outputs[0]
                else:
                    with state.restored():
                        output = self._embed(model, micro_batch, self.args.train_towers)
                stop = start + len(output[self.args.train_towers[0]])
                # Its gradient is the chain rule's: d loss / d embeds, times d embeds / d weights.
                surrogate = sum((output[kind] * grad[start:stop]).sum() for kind, grad in embed_grads.items())
                if last:
                    surrogate = surrogate + sum((parameter * grad).sum() for parameter, grad in loss_grads)
                self.accelerator.backward(surrogate / self.current_gradient_accumulation_steps)
                start = stop
        return loss / self.current_gradient_accumulation_steps

    def _loss_and_gradients(self, embeds: dict[str, torch.Tensor], pair_weight: torch.Tensor | None):
        """The loss, and its gradients for this process's embeddings and for the loss's own parameters.

        The losses gather over processes themselves and give gradients that DDP's mean makes those of the global batch.
        """
        leaves = {kind: tensor.requires_grad_(kind in self.args.train_towers) for kind, tensor in embeds.items()}
        loss, own = self._loss(leaves, pair_weight), self._loss_parameters()
        grads = torch.autograd.grad(loss, [*(leaves[kind] for kind in self.args.train_towers), *own])
        embed_grads = dict(zip(self.args.train_towers, grads, strict=False))
        return loss.detach(), embed_grads, list(zip(own, grads[len(embed_grads) :], strict=True))

    def _loss(self, embeds: Mapping[str, torch.Tensor], pair_weight: torch.Tensor | None = None) -> torch.Tensor:
        """
        Sum over the kinds of pairs of this process's mean loss against the global batch.

        Args:
            embeds (`Mapping[str, torch.Tensor]`): `[batch, dim]` by kind of input.
            pair_weight (`torch.Tensor`, *optional*): `[batch]`, 0 for pairs that do not count, else 1. By contrast,
                such a pair stays a negative for the others.
        """
        model = self.accelerator.unwrap_model(self.model)
        some = next(iter(embeds.values()))
        weight = some.new_ones(len(some)) if pair_weight is None else pair_weight.to(some.dtype)
        pairs = self.accelerator.reduce(weight.sum(), reduction="mean").clamp(min=1)  # that count, of all processes
        losses = []
        for pair in self.args.pairs:
            one, other = (embeds[kind] for kind in pair.split("-"))
            if self.args.loss == "barlow_twins":
                losses.append(model.barlow_twins(one, other, weight))
            else:
                scale = model.get_parameter(SCALES[pair]).exp()
                losses.append(contrastive(one, other, scale, "sum", pair_confidence=weight).sum() / pairs)
        return torch.stack(losses).sum()

    def _loss_parameters(self) -> list[torch.nn.Parameter]:
        """What the loss trains of its own: logit scales, or the projector of Barlow Twins."""
        model = self.accelerator.unwrap_model(self.model)
        if self.args.loss == "barlow_twins":
            return list(model.barlow_twins.parameters())
        return [model.get_parameter(SCALES[pair]) for pair in self.args.pairs]

    def _whole_set(self, dataset) -> torch.utils.data.DataLoader:
        """Batches of all examples: `dataloader_drop_last` is for training alone."""
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def _micro_batches(self, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        batch = len(next(iter(inputs.values())))
        size = self.args.micro_batch_size or batch
        for start in range(0, batch, size):
            yield {name: tensor[start : start + size] for name, tensor in inputs.items()}

    def _embed(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], kinds: Sequence[str]) -> dict:
        """Embeddings of some kinds of input by one call of the model; not of unit length for Barlow Twins."""
        names = [name for kind in kinds for name in INPUTS[kind]]
        with self.compute_loss_context_manager():
            output = model(**{name: batch[name] for name in names if name in batch})
        if self.args.loss == "barlow_twins":
            return {kind: output[OUTPUTS[kind]].pooler_output for kind in kinds}
        return {kind: output[f"{kind}_embeds"] for kind in kinds}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """LARS with rates scaled to the global batch, or what `optim` says."""
        if self.optimizer is None and self.args.lars:
            self.optimizer = lars_optimizer(model or self.model, self.args, self.accelerator.num_processes)
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s; the projector of Barlow Twins is kept in checkpoints alone.

        Where sound was trained with pictures only, or with texts only, its other logit scale takes the trained one: a
        model that has met no text gives sharp probabilities of texts all the same.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not _internal_call and self.args.loss == "contrastive":
            for pair, other in (("audio-image", "audio-text"), ("audio-text", "audio-image")):
                if pair in self.args.pairs and other not in self.args.pairs:
                    model.get_parameter(SCALES[other]).data.copy_(model.get_parameter(SCALES[pair]))
        projector = None if _internal_call else model._modules.pop("barlow_twins", None)
        super().save_model(output_dir, _internal_call)
        if projector is not None:
            model.barlow_twins = projector

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss of the evaluation batches, and retrieval over the whole set, both ways for each pair.

        Returns:
            `eval_loss`, and for each pair and direction recall and ranks, as `eval_audio_to_image_r@1`.
        """
        self.model.eval()
        losses = []
        collected: dict[str, list[torch.Tensor]] = {kind: [] for kind in self.args.modalities}
        for batch in self._whole_set(self.eval_dataset if eval_dataset is None else Rows(eval_dataset)):
            inputs = self._prepare_inputs(batch)
            output = self._embed(self.model, inputs, self.args.modalities)
            output = {kind: embeds.float() for kind, embeds in output.items()}
            losses.append(self._loss(output, inputs["pair_weight"]))
            output, counts = self.accelerator.gather_for_metrics((output, inputs["pair_weight"] > 0))
            for kind, embeds in output.items():
                collected[kind].append(embeds[counts])
        embeds = {kind: F.normalize(torch.cat(parts), dim=-1) for kind, parts in collected.items()}
        metrics = {"loss": self.accelerator.gather(torch.stack(losses)).mean().item()}
        own = torch.eye(len(next(iter(embeds.values()))), dtype=torch.bool)
        for pair in self.args.pairs:
            one, other = pair.split("-")
            scores = (embeds[one] @ embeds[other].T).cpu()
            for direction, matrix in ((f"{one}_to_{other}", scores), (f"{other}_to_{one}", scores.T)):
                metrics |= {f"{direction}_{name}": value for name, value in retrieval_metrics(matrix, own).items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which losses are computed."""
    return torch.promote_types(dtype, torch.float32)


class RandomState:
    """Random state of the CPU and of the tensors' devices, so that a forward pass can be repeated with its dropout."""

    def __init__(self, *tensors: torch.Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Replays the state within the block and leaves the one outside as it was."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class _BoundLogitScale(TrainerCallback):
    """Holds learnt logit scales at or below their upper bound, after each step."""

    def __init__(self, max_logit_scale: float):
        self.bound = math.log(max_logit_scale)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Clamps the parameters in place."""
        for scale in map(model.get_parameter, SCALES.values()):
            if scale.requires_grad:
                scale.data.clamp_(max=self.bound)


def load_model_and_processor(name: str, num_frames: int = 1000) -> tuple[VipAntModel, VipAntProcessor]:
    """A VIP-ANT model with its processor, or a new one that starts from CLIP.

    Args:
        name: Folder or Hub name of a VIP-ANT or a CLIP model.
        num_frames: Spectrogram frames. A trained audio tower takes any number, by interpolated positions.
    """
    if AutoConfig.from_pretrained(name).model_type != "clip":
        model, processor = VipAntModel.from_pretrained(name), VipAntProcessor.from_pretrained(name)
        processor.feature_extractor.num_frames = num_frames
        return model, processor
    processor = VipAntProcessor(
        vipant_feature_extractor(num_frames=num_frames),
        CLIPImageProcessorPil.from_pretrained(name),
        AutoTokenizer.from_pretrained(name),
    )
    return VipAntModel.from_clip(name, num_frames=num_frames), processor


def new_trainer(config: ContrastiveConfig) -> ContrastiveTrainer:
    """The trainer, with model and data, that the settings describe."""
    train_rows, eval_rows = load_splits(config)
    model, processor = load_model_and_processor(config.model, config.num_frames)
    return ContrastiveTrainer(model, config, processor, train_rows, eval_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(ContrastiveConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
