"""What the training stages of both systems share: which weights train, complete checkpoints, faults that stop a run.

- Only named modules train, in float32; everything else is frozen and in eval mode.
- A checkpoint holds what trains, with optimizer, schedule and random states (see `checkpoints`); a run that was killed
  goes on from the last one by itself.
- Training rows come in an order, and with an epoch, that follow from (seed, epoch): see `rows`.
- A loss, gradient or feature that is not finite ends the run and names the clips.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from datasets_scripts.files import locked
from datasets_scripts.streaming import ShardStream
from trainers.checkpoints import TRAINED, last_complete, load_trained, read_manifest, write_manifest
from trainers.model_card import command_line, training_section, write_card
from trainers.processes import leave_group
from trainers.recipes import check_choices, run_recipe
from trainers.rows import EpochSampler, Rows, StreamedRows, WithIds, require_columns

logger = logging.get_logger(__name__)

STAGING = ".dali-partial"  # where a result is written before its files get their place
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk gives, by way of the library that writes


@dataclass
class StageArguments(TrainingArguments):
    """Settings of every stage; each explains itself in the stage's `--help`."""

    model: str = HfArg(default="", help="Folder or Hub id of the model to start from.")
    dataset: str = HfArg(
        default="",
        help="Data set: a folder saved by datasets or of shards, a file (parquet, JSON lines, CSV) or a Hub id; "
        "behind a # the name of a configuration.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    eval_split: str = HfArg(default="", help="Split to evaluate on; without one there is no evaluation.")
    train_rows: int | None = HfArg(
        default=None, help="Rows of one pass over the training data, which are then streamed."
    )
    max_skipped: float = HfArg(default=0.01, help="Largest share of samples that may fail to decode.")
    output_dir: str | None = HfArg(default=None, help="Folder of the checkpoints and the result.")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)


class StageTrainer(Trainer):
    """
    A `Trainer` that trains a part of a model and keeps the rest as it is.

    Args:
        model (`nn.Module`): What is trained; its parameters outside `trained` are frozen.
        args (`StageArguments`): The stage's settings.
        trained (`list[str]`): Names of the modules and parameters of `model` that train.
        processor: The model's processor, saved with the result.
        train_dataset, eval_dataset: Rows; a training stream has no length and needs `args.train_rows`.
        data_collator: Makes batches of rows; has `columns` (see [`require_columns`]) and `skips` (a
            [`SkippedSamples`]).
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: if a data set is empty or lacks a column, or if processes that were started together would each
            train for itself.
    """

    def __init__(
        self,
        model: nn.Module,
        args,
        trained: list[str],
        processor,
        train_dataset,
        eval_dataset,
        data_collator,
        **kwargs,
    ):
        grouped = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if grouped > args.world_size:
            raise ValueError(
                f"{grouped} processes were started together, but each would train for itself: on CPU, set "
                "`use_cpu: true`."
            )
        if args.n_gpu > 1:
            logger.warning("One of several GPUs is used: start with torchrun or accelerate launch to use them all.")
            args._n_gpu = 1
        args.remove_unused_columns = False  # the collator reads raw columns
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        for name, rows in (("training", train_dataset), ("evaluation", eval_dataset)):
            if rows is not None:
                require_columns(rows, data_collator.columns, name)
        train_only(model, trained)
        # FSDP shards by these names, and refuses one that the model does not have.
        present = {type(module).__name__ for module in model.modules()}
        names: Any = getattr(model, "_no_split_modules", None) or ()
        model._no_split_modules = sorted(present.intersection(names))  # type: ignore[assignment]
        self.settings = json.loads(args.to_json_string())
        self.checkpoint_limit = args.save_total_limit
        args.save_total_limit = None  # old checkpoints go when the new one is known to be complete, not before
        self.model_class: Any = type(model)
        self.skips = data_collator.skips
        self.batch_ids: list[str] = []
        super().__init__(
            model,
            args,
            data_collator=WithIds(data_collator),
            train_dataset=self.open_rows(train_dataset, args),
            eval_dataset=None if eval_dataset is None else Rows(eval_dataset),
            processing_class=processor,
            **kwargs,
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"FSDP was asked for, but accelerate does not shard on {args.device.type} devices.")
        self.label_names = ["labels"]  # whatever else the model's signature offers
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.add_callback(_CheckGradients(self))

    @staticmethod
    def open_rows(rows, args):
        """Training rows, or a stream of them."""
        if rows is None:
            return None
        if hasattr(rows, "__len__"):
            return Rows(rows)
        if not args.train_rows:
            raise ValueError("Training on a stream needs `train_rows`, the rows of one pass over it.")
        args.accelerator_config.dispatch_batches = False  # each process decodes its own batches
        if isinstance(rows, ShardStream):
            rows.seed = args.data_seed or args.seed
        return StreamedRows(rows, args.train_rows)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(*args, **kwargs)
        if isinstance(self.train_dataset, StreamedRows):
            self.train_dataset.resume(epoch, batches, self._train_batch_size * self.args.world_size)
        return epoch, batches

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        return None if isinstance(rows, StreamedRows) else EpochSampler(len(rows), self.data_seed, self.row_weights())

    @property
    def data_seed(self) -> int:
        """Seed of the order of the rows."""
        return self.args.data_seed or self.args.seed

    def row_weights(self) -> torch.Tensor | None:
        """Weights `[rows]` by which training rows are drawn; by default each comes once an epoch."""
        return None

    # Steps ----------------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Puts what does not train into eval mode: no dropout in it."""
        if self.args.activation_checkpointing:
            return  # layers checkpoint their activations in training mode only
        for module in self.accelerator.unwrap_model(self.model).children():
            eval_if_frozen(module)

    def _prepare_inputs(self, inputs):
        self.batch_ids = inputs.pop("ids", [])
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """
        One step; where no sample of a batch could be decoded, there are no labels to divide by.

        Raises:
            FloatingPointError: if the loss is not finite; names the clips.
        """
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        try:
            loss = self.forward_backward(model, inputs, num_items_in_batch)
        except ValueError as error:  # a loss that refuses its input knows the pair's place, not its name
            raise ValueError(f"{error} (step {self.state.global_step + 1}, {self.batch_name(inputs)})") from error
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, {self.batch_name(inputs)}: lower "
                "the learning rate, or take a clip with damaged values out of the data."
            )
        return loss

    def forward_backward(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Loss and gradients of a batch; by default `Trainer`'s."""
        return super().training_step(model, inputs, num_items_in_batch)

    def batch_name(self, inputs: dict[str, Any]) -> str:
        """The clips of this batch that have inputs which are not finite, or if there are none, all of them."""
        broken: set[int] = set()
        for value in inputs.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and len(value) == len(self.batch_ids):
                finite = value.reshape(len(value), -1).isfinite().all(1)
                broken.update((~finite).nonzero()[:, 0].tolist())
        if broken:
            return f"inputs not finite: {', '.join(self.batch_ids[index] for index in sorted(broken))}"
        return f"clips {', '.join(self.batch_ids)}"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer`'s, with what is frozen in eval mode."""
        if self.model.training:
            self.freeze()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = Path(self.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier run: its manifest would not fit
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_manifest(checkpoint, self.settings)
        except WRITE_ERRORS as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            last = get_last_checkpoint(output_dir)
            raise OSError(
                f"{checkpoint} could not be written: {error}. "
                + (f"{last} is complete: free space and resume from it." if last else "There is no earlier one.")
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(output_dir), self.checkpoint_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the result of the stage (see `save_result`); inside a checkpoint, only the weights that train.

        Args:
            output_dir (`str`, *optional*): Where to; `args.output_dir` by default.
        """
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:
            # Sharded weights are written by the optimizer's part of the checkpoint.
            if self.args.should_save and not self.sharded:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({name: p.detach().contiguous() for name, p in self.trained_parameters()}, folder / TRAINED)
            return
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if self.sharded else None
        if self.args.should_save:
            staging = folder / STAGING / folder.resolve().name  # the card takes its title from it
            shutil.rmtree(staging.parent, ignore_errors=True)
            staging.mkdir(parents=True)
            try:
                self.save_result(staging, state_dict)
                for file in sorted(staging.iterdir()):
                    file.replace(folder / file.name)
            except WRITE_ERRORS as error:
                raise OSError(
                    f"The result could not be written to {folder}: {error}. No checkpoint is lost."
                ) from error
            finally:
                shutil.rmtree(staging.parent, ignore_errors=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """
        Writes what the stage is for; by default the model and its processor.

        Args:
            folder (`Path`): An empty folder.
            state_dict (`dict[str, torch.Tensor]`, *optional*): The whole state of the model where its own parameters
                are not that, or are sharded.
        """
        model = self.accelerator.unwrap_model(self.model) if state_dict is None else self.plain_model()
        model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

    def plain_model(self) -> Any:
        """An empty model to save a state by: FSDP and LoRA change classes, whose code would be saved."""
        model: Any = self.accelerator.unwrap_model(self.model)
        with torch.device("meta"):
            plain = self.model_class(model.config)
        plain.generation_config = model.generation_config
        return plain

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of what trains."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / TRAINED
        load_trained(dict(self.trained_parameters()), load_file(file), file)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)

    # The whole run --------------------------------------------------------------------------------------------------

    def run(self, command: str = "", data: str = "") -> dict[str, float]:
        """
        Trains (from the last checkpoint in `output_dir`, if there is one), evaluates, saves the result and its card.

        Args:
            command (`str`, *optional*, defaults to `""`): What started the run, for the card.
            data (`str`, *optional*, defaults to `""`): What it is trained on, for the card.

        Returns:
            `dict[str, float]`: All metrics.

        Raises:
            RuntimeError: if another run holds `output_dir`.
        """
        with locked(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            checkpoint = self.checkpoint_to_resume()
            metrics = self.take_finished(checkpoint) if checkpoint else None
            if metrics is None:
                metrics = self.train(resume_from_checkpoint=checkpoint).metrics
            if self.eval_dataset is not None:
                metrics |= self.evaluate()
            skipped = torch.tensor(self.skips.skipped, device=self.args.device)
            metrics["skipped_samples"] = int(self.accelerator.reduce(skipped))
            self.save_model()
            if self.is_world_process_zero():
                write_card(self.args.output_dir, training_section(self, command, data, metrics))
            self.save_state()
            self.save_metrics("all", metrics)
        logger.warning(f"{metrics['skipped_samples']} samples were skipped because they could not be decoded.")
        return metrics

    def checkpoint_to_resume(self) -> str | None:
        """
        `args.resume_from_checkpoint`; by default the last one in the output folder; "false" for none.

        Raises:
            ValueError: if that checkpoint is incomplete or damaged.
        """
        given = self.args.resume_from_checkpoint
        if given is None:
            if self.is_world_process_zero() and Path(self.args.output_dir).is_dir():
                last_complete(self.args.output_dir)
            self.accelerator.wait_for_everyone()
            given = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            if given is not None:
                logger.warning(f"Resuming from {given}. (To start anew: --resume_from_checkpoint false)")
        elif given.lower() == "false":
            return None
        if given is not None:
            made_with = read_manifest(Path(given))["settings"]
            different = sorted(n for n, value in self.settings.items() if n in made_with and made_with[n] != value)
            if different:
                logger.warning(f"These settings differ from the checkpoint's: {', '.join(different)}.")
        return given

    def take_finished(self, checkpoint: str) -> dict[str, float] | None:
        """Loads the last checkpoint of a run that has no step left, and returns no metrics; else None."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step or self.sharded:
            return None
        logger.warning(f"{checkpoint} is the end of this run: nothing is trained.")
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return {}


class _CheckGradients(TrainerCallback):
    """Stops before a step with gradients that are not finite."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.scaler is not None or self.trainer.sharded:
            return  # a loss scale finds its measure by gradients that overflow
        gradients = [p.grad for _, p in self.trainer.trained_parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise FloatingPointError(
                f"Gradients are not finite in step {state.global_step + 1}, clips "
                f"{', '.join(self.trainer.batch_ids)}: lower the learning rate, or train in float32."
            )


def run_stage(config_class, new_trainer: Callable[[Any], StageTrainer], arguments: Sequence[str] | None = None) -> int:
    """
    The command line of a stage: trains as recipe and options say.

    Args:
        config_class: The stage's settings.
        new_trainer (`Callable`): Makes the trainer from them.
        arguments (`Sequence[str]`, *optional*): `[RECIPE] [--setting value ...]`; those of this process by default.

    Returns:
        `int`: the exit code.
    """

    def train(config) -> int:
        new_trainer(config).run(command_line(), config.dataset)
        return 0

    code = run_recipe(config_class, train, arguments)
    leave_group()  # out here, where nothing refers to the trainer any more
    return code


def train_only(model: nn.Module, trained: list[str]) -> None:
    """
    Freezes a model but for some modules or parameters, which are kept in float32 at least.

    Args:
        model (`nn.Module`): The model.
        trained (`list[str]`): Their names.

    Raises:
        ValueError: if a name is no module and no parameter of the model.
    """
    model.requires_grad_(False)
    for name in trained:
        chosen = [p for n, p in model.named_parameters() if n == name or n.startswith(f"{name}.")]
        if not chosen:
            raise ValueError(f"The model has no `{name}` to train.")
        for parameter in chosen:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)


def eval_if_frozen(module: nn.Module) -> None:
    """Puts the largest parts of a module that have parameters, none of which trains, into eval mode."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if trains and not any(trains):
        module.eval()
        return
    for child in module.children():
        eval_if_frozen(child)
