"""Stage 2, second half: the audio projector learns to say from sound alone what image and sound said together.

    python -m trainers.dali.distillation dali/distillation [--setting value ...]

With `captions` (a folder of pseudo-captions) this is distillation; with a data set that has captions of its own it is
supervised fine-tuning. Only the audio copy of the projector trains; LoRA on the language model and the audio encoder
are options. The result needs no prefix.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on distillation; numbers of the released code.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import QUESTION
from trainers.dali.data_collator import DaliDataCollator
from trainers.dali.pseudo_captions import read_pseudo_captions
from trainers.recipes import Dtype, load_model, load_splits, save_model
from trainers.rows import sample_id
from trainers.stage import StageArguments, StageTrainer, run_stage

logger = logging.get_logger(__name__)


@dataclass
class DistillationConfig(StageArguments):
    """Settings of stage 2. The data set has `audio`, and without `captions` also `caption` or `captions`."""

    # Model and data
    model: str = HfArg(default="", help="Folder or Hub id of an aligned DALI model.")
    dtype: Dtype = HfArg(default="float32", help="Type of the frozen weights.")
    captions: str | None = HfArg(
        default=None,
        help="Folder of pseudo-captions, joined to the training data by id in place of its own.",
    )
    question: str = HfArg(default=QUESTION, help="What the prompt asks.")

    # What trains
    train_audio_encoder: bool = HfArg(default=False, help="Train audio encoder and projection too.")
    lora_rank: int = HfArg(
        default=0,
        help="Rank of LoRA on the linear layers of the language model, merged into it in the end; 0 for none. "
        "With it, captions of images change too.",
    )
    lora_alpha: float = HfArg(default=16.0, help="Scale of LoRA.")

    # Optimisation
    learning_rate: float = 2e-4
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 40
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    save_steps: float = 100
    save_total_limit: int | None = 2


class DistillationTrainer(StageTrainer):
    """
    Tunes the audio projector of a model on audio and captions.

    Args:
        model (`DaliMixin`): A DALI model; a prefix that it holds is taken off.
        args (`DistillationConfig`): Settings.
        processor (`AudioCaptionProcessorMixin`): The model's processor, which is told that there is no prefix.
        train_dataset, eval_dataset: Rows with `audio`, `caption` or `captions`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self, model: DaliMixin, args: DistillationConfig, processor, train_dataset=None, eval_dataset=None, **kwargs
    ):
        torch.manual_seed(args.seed)
        model.remove_prefix()
        processor.follow(model.config)
        parts = ["audio_projector", *(["audio_tower", "audio_projection"] if args.train_audio_encoder else [])]
        trained = [f"{model.ear_key}{part}" for part in parts]
        if args.lora_rank:
            trained += add_lora(model, args.lora_rank, args.lora_alpha)
        collator = DaliDataCollator(
            processor, "audio", question=args.question, max_skipped=args.max_skipped, seed=args.seed
        )
        super().__init__(model, args, trained, processor, train_dataset, eval_dataset, collator, **kwargs)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the model (see [`save_model`]), LoRA merged into it."""
        model = self.accelerator.unwrap_model(self.model)
        if self.args.lora_rank:
            state_dict = merged_state(model, state_dict)
        if state_dict is not None:
            is_stock = model.captioner_is_stock
            model = self.plain_model()
            model.captioner_is_stock = is_stock
        save_model(model, folder, state_dict, captioner_trained=bool(self.args.lora_rank))
        self.processing_class.save_pretrained(folder)


def add_lora(model: DaliMixin, rank: int, alpha: float) -> list[str]:
    """
    Puts LoRA on all linear layers of the language model.

    Returns:
        Names of the new parameters.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=r".*(language|text)_model\..*_proj")
    inject_adapter_in_model(config, model)
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def merged_state(model: nn.Module, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """
    The state that the model would have if LoRA were merged into its weights, under the names it had before LoRA.

    Args:
        model: A model with LoRA layers.
        state_dict: Its state, where its own parameters are sharded.
    """
    state = dict(state_dict or model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        (adapter,) = layer.scaling
        down, up = (state.pop(f"{name}.lora_{side}.{adapter}.weight").float() for side in "AB")
        for kind in ("weight", "bias"):
            if f"{name}.base_layer.{kind}" in state:
                state[f"{name}.{kind}"] = state.pop(f"{name}.base_layer.{kind}")
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + layer.scaling[adapter] * up @ down).to(weight.dtype)
    return state


class _WithCaption:
    """Rows with the captions of a folder, by id; for `map`."""

    def __init__(self, captions: dict[str, str]):
        self.captions = captions

    def __call__(self, row: dict) -> dict:
        return {"caption": self.captions[sample_id(row)]}


def join_captions(rows, folder: str):
    """
    Rows with pseudo-captions in place of their own captions.

    Args:
        rows: A `datasets` data set or stream with `id`.
        folder: Folder of pseudo-captions.

    Returns:
        The rows that have a pseudo-caption which is not empty.

    Raises:
        ValueError: if none has.
    """
    captions = {name: caption for name, caption in read_pseudo_captions(folder).items() if caption}
    rows = rows.remove_columns([name for name in ("caption", "captions") if name in (rows.column_names or [])])
    if hasattr(rows, "__len__"):
        chosen = [index for index, name in enumerate(rows["id"]) if str(name) in captions]
        logger.warning(f"{len(chosen)} of {len(rows)} clips have a pseudo-caption in {folder}.")
        if not chosen:
            raise ValueError(f"No id of the data set has a caption in {folder}: were they made from other data?")
        rows = rows.select(chosen)
        return rows.add_column("caption", [captions[str(name)] for name in rows["id"]])
    return rows.filter(lambda row: sample_id(row) in captions).map(_WithCaption(captions))


def new_trainer(config: DistillationConfig) -> DistillationTrainer:
    """The trainer, with model and data, that the settings describe."""
    train_rows, eval_rows = load_splits(config)
    if config.captions:
        train_rows = join_captions(train_rows, config.captions)
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    return DistillationTrainer(model, config, processor, train_rows, eval_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(DistillationConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
