"""Stage 1a: sixteen soft tokens teach an image captioner to say what would be heard.

    python -m trainers.dali.prefix_tuning recipes/dali/prefix_tuning.yaml [--field value ...]

Only the prefix trains, on images with captions of their sound; 16 pairs are enough. The result is a PEFT prompt-tuning
adapter, which `model.load_prefix(folder)` and peft load.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on prefix tuning; numbers of the released code.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import TrainingArguments

from modeling_dali import DaliForConditionalGeneration, DaliProcessor
from modeling_dali.processing_audio import QUESTION
from trainers.dali.data_collator import DaliDataCollator
from trainers.model_card import command_line
from trainers.processes import leave_group
from trainers.recipes import load_model, load_rows, parse_recipe
from trainers.stage import StageTrainer


@dataclass
class PrefixTuningConfig(TrainingArguments):
    """
    Settings of stage 1a.

    Args:
        model: Folder or Hub id of a LLaVA checkpoint or of a DALI model.
        dtype: Of the frozen weights.
        dataset: Data set with `image`, `caption` or `captions` (see [`load_rows`]).
        train_split, eval_split: Its splits; no evaluation without the second.
        train_rows: Rows of one pass over a stream.
        max_skipped: Tolerated share of samples that cannot be decoded.
        prefix_length: Number of soft tokens.
        prefix_position: `"after_media"`, as published, or `"front"`, as PEFT places its prompt.
        question: What the prompt asks.

    All other arguments are those of [`~transformers.TrainingArguments`].
    """

    # Model and data
    model: str = "llava-hf/llava-1.5-7b-hf"
    dtype: str = "float32"
    dataset: str = ""
    train_split: str = "train"
    eval_split: str = ""
    train_rows: int | None = None
    max_skipped: float = 0.01

    # Prefix
    prefix_length: int = 16
    prefix_position: Literal["after_media", "front"] = "after_media"
    question: str = QUESTION

    # Optimisation
    learning_rate: float = 1e-3
    num_train_epochs: float = 500
    per_device_train_batch_size: int = 16
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    save_steps: float = 100
    save_total_limit: int | None = 2


class PrefixTuningTrainer(StageTrainer):
    """
    Trains new soft tokens of a model.

    Args:
        model: A DALI model; a prefix that it holds is replaced by a new one.
        args: Settings.
        processor: The model's processor; is told of the prefix.
        train_dataset, eval_dataset: Rows with `image`, `caption` or `captions`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self,
        model: DaliForConditionalGeneration,
        args: PrefixTuningConfig,
        processor: DaliProcessor,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        torch.manual_seed(args.seed)
        model.add_prefix(args.prefix_length, args.prefix_position)
        processor.follow(model.config)
        collator = DaliDataCollator(
            processor, "image", question=args.question, max_skipped=args.max_skipped, seed=args.seed
        )
        super().__init__(model, args, ["model.prefix"], processor, train_dataset, eval_dataset, collator, **kwargs)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the prefix as a PEFT adapter."""
        model = self.accelerator.unwrap_model(self.model)
        prefix = model.model.prefix
        try:
            if state_dict is not None:
                model.model.prefix = nn.Parameter(state_dict["model.prefix"])
            model.save_prefix(folder)
        finally:
            model.model.prefix = prefix


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the recipe says."""
    config = parse_recipe(PrefixTuningConfig, sys.argv[1:] if arguments is None else arguments)
    train_rows = load_rows(config.dataset, config.train_split, streaming=bool(config.train_rows))
    eval_rows = load_rows(config.dataset, config.eval_split) if config.eval_split else None
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    trainer = PrefixTuningTrainer(model, config, processor, train_rows, eval_rows)
    trainer.run(command_line(), config.dataset)


if __name__ == "__main__":
    main()
    leave_group()
