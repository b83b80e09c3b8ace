"""Stage 2, second half: the audio projector learns to say from sound alone what image and sound said together.

    python -m trainers.dali.distillation recipes/dali/distillation.yaml [--field value ...]

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
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_dali import DaliForConditionalGeneration, DaliProcessor
from modeling_dali.processing_audio import QUESTION
from trainers.dali.data_collator import DaliDataCollator
from trainers.dali.pseudo_captions import read_captions
from trainers.model_card import command_line
from trainers.processes import leave_group
from trainers.recipes import load_model, load_rows, parse_recipe
from trainers.rows import sample_id
from trainers.stage import StageTrainer

logger = logging.get_logger(__name__)


@dataclass
class DistillationConfig(TrainingArguments):
    """
    Settings of stage 2.

    Args:
        model: Folder or Hub id of an aligned DALI model.
        dtype: Of the frozen weights.
        dataset: Data set with `audio` (see [`load_rows`]), and with `caption` or `captions` unless these come from
            `captions`.
        train_split, eval_split: Its splits; no evaluation without the second.
        train_rows: Rows of one pass over a stream; makes the training data be streamed.
        captions: Folder of pseudo-captions, joined to the training data by `id`.
        max_skipped: Tolerated share of samples that cannot be decoded.
        question: What the prompt asks.
        train_audio_encoder: Whether audio encoder and projection train too.
        lora_rank: Rank of LoRA on the linear layers of the language model, merged into it in the end; 0 for none.
            Then captions of images change too.
        lora_alpha: Scale of LoRA.

    All other arguments are those of [`~transformers.TrainingArguments`].
    """

    # Model and data
    model: str = ""
    dtype: str = "float32"
    dataset: str = ""
    train_split: str = "train"
    eval_split: str = ""
    train_rows: int | None = None
    captions: str | None = None
    max_skipped: float = 0.01
    question: str = QUESTION

    # What trains
    train_audio_encoder: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0

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
        model: A DALI model; a prefix that it holds is taken off.
        args: Settings.
        processor: The model's processor; is told that there is no prefix.
        train_dataset, eval_dataset: Rows with `audio`, `caption` or `captions`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self,
        model: DaliForConditionalGeneration,
        args: DistillationConfig,
        processor: DaliProcessor,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        torch.manual_seed(args.seed)
        model.remove_prefix()
        processor.follow(model.config)
        trained = ["model.audio_projector"]
        if args.train_audio_encoder:
            trained += ["model.audio_tower", "model.audio_projection"]
        if args.lora_rank:
            trained += add_lora(model, args.lora_rank, args.lora_alpha)
        collator = DaliDataCollator(
            processor, "audio", question=args.question, max_skipped=args.max_skipped, seed=args.seed
        )
        super().__init__(model, args, trained, processor, train_dataset, eval_dataset, collator, **kwargs)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the whole model, LoRA merged into it."""
        model = self.accelerator.unwrap_model(self.model)
        if self.args.lora_rank:
            state_dict = merged_state(model, state_dict)
        model_class = type(model)
        try:
            model.__class__ = DaliForConditionalGeneration  # FSDP gives it another one, whose code would be saved
            model.save_pretrained(folder, state_dict=state_dict)
        finally:
            model.__class__ = model_class
        self.processing_class.save_pretrained(folder)


def add_lora(model: DaliForConditionalGeneration, rank: int, alpha: float) -> list[str]:
    """
    Puts LoRA on all linear layers of the language model.

    Returns:
        Names of the new parameters.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=r".*language_model\..*_proj")
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
    captions = {name: caption for name, caption in read_captions(folder).items() if caption}
    rows = rows.remove_columns([name for name in ("caption", "captions") if name in (rows.column_names or [])])
    if hasattr(rows, "__len__"):
        chosen = [index for index, name in enumerate(rows["id"]) if str(name) in captions]
        logger.warning(f"{len(chosen)} of {len(rows)} clips have a pseudo-caption in {folder}.")
        if not chosen:
            raise ValueError(f"No id of the data set has a caption in {folder}: were they made from other data?")
        rows = rows.select(chosen)
        return rows.add_column("caption", [captions[str(name)] for name in rows["id"]])
    return rows.filter(lambda row: sample_id(row) in captions).map(_WithCaption(captions))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the recipe says."""
    config = parse_recipe(DistillationConfig, sys.argv[1:] if arguments is None else arguments)
    train_rows = load_rows(config.dataset, config.train_split, streaming=bool(config.train_rows))
    if config.captions:
        train_rows = join_captions(train_rows, config.captions)
    eval_rows = load_rows(config.dataset, config.eval_split) if config.eval_split else None
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    trainer = DistillationTrainer(model, config, processor, train_rows, eval_rows)
    trainer.run(command_line(), config.dataset)


if __name__ == "__main__":
    main()
    leave_group()
