"""Stage 1a: sixteen soft tokens teach an image captioner to say what would be heard.

    python -m trainers.dali.prefix_tuning dali/prefix_tuning [--setting value ...]

Only the prefix trains, on images with captions of their sound; 16 pairs are enough. The result is a PEFT prompt-tuning
adapter, which `model.load_prefix(folder)` and peft load.

Source: *An Eye for an Ear* (arXiv 2410.05997), section on prefix tuning; numbers of the released code.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.hf_argparser import HfArg

from modeling_dali.configuration_dali import PrefixPosition
from modeling_dali.modeling_dali_utils import DaliMixin
from modeling_dali.processing_audio import QUESTION
from trainers.dali.data_collator import DaliDataCollator
from trainers.recipes import Dtype, load_model, load_splits
from trainers.stage import StageArguments, StageTrainer, run_stage


@dataclass
class PrefixTuningConfig(StageArguments):
    """Settings of stage 1a. The data set has `image`, `caption` or `captions`."""

    # Model and data
    model: str = HfArg(default="llava-hf/llava-1.5-7b-hf", help="Folder or Hub id of a LLaVA or DALI model.")
    dtype: Dtype = HfArg(default="float32", help="Type of the frozen weights.")

    # Prefix
    prefix_length: int = HfArg(default=16, help="Number of soft tokens.")
    prefix_position: PrefixPosition = HfArg(
        default="after_media", help="Where they stand: after_media as published, or front as in PEFT."
    )
    question: str = HfArg(default=QUESTION, help="What the prompt asks.")

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
        model (`DaliMixin`): A DALI model; a prefix that it holds is replaced by a new one.
        args (`PrefixTuningConfig`): Settings.
        processor (`AudioCaptionProcessorMixin`): The model's processor, which is told of the prefix.
        train_dataset, eval_dataset: Rows with `image`, `caption` or `captions`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self, model: DaliMixin, args: PrefixTuningConfig, processor, train_dataset=None, eval_dataset=None, **kwargs
    ):
        torch.manual_seed(args.seed)
        model.add_prefix(args.prefix_length, args.prefix_position)
        processor.follow(model.config)
        collator = DaliDataCollator(
            processor, "image", question=args.question, max_skipped=args.max_skipped, seed=args.seed
        )
        trained = [f"{model.ear_key}prefix"]
        super().__init__(model, args, trained, processor, train_dataset, eval_dataset, collator, **kwargs)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the prefix as a PEFT adapter."""
        model = self.accelerator.unwrap_model(self.model)
        prefix = model.ear.prefix
        try:
            if state_dict is not None:
                model.ear.prefix = nn.Parameter(state_dict[f"{model.ear_key}prefix"])
            model.save_prefix(folder)
        finally:
            model.ear.prefix = prefix


def new_trainer(config: PrefixTuningConfig) -> PrefixTuningTrainer:
    """The trainer, with model and data, that the settings describe."""
    train_rows, eval_rows = load_splits(config)
    model, processor = load_model(config.model, dtype=config.dtype, seed=config.seed)
    return PrefixTuningTrainer(model, config, processor, train_rows, eval_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(PrefixTuningConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
