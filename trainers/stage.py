"""What the three stages share: which weights train, checkpoints that survive a kill, order of the data, the card.

- Only named modules train, in float32; everything else is frozen and in eval mode.
- A checkpoint holds what trains, with optimizer, schedule and random states. It is written beside the others and
  renamed when complete: a folder `checkpoint-N` is always whole.
- Training rows come in an order, and with an epoch, that follow from (seed, epoch): see `data_collator`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from trainers.model_card import training_section, write_card
from trainers.rows import require_columns, without_decoding

logger = logging.get_logger(__name__)

TRAINED = "trained.safetensors"  # the weights of a checkpoint
SETTINGS = "settings.json"  # and the settings it was made with
STAGING = ".incomplete"  # where checkpoints and models are written before they are renamed
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk gives, by way of the library that writes


# ---------------------------------------------------------------------------------------------------------------------
# Data in an order that follows from seed and epoch


class Rows(torch.utils.data.Dataset):
    """
    Rows of a data set with an `index`, and in training with an `epoch`.

    Args:
        rows: Anything with a length and rows by index.
    """

    def __init__(self, rows):
        self.rows = without_decoding(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """The row of an index, or of (epoch, index)."""
        if isinstance(key, tuple):
            return {**self.rows[key[1]], "epoch": key[0], "index": key[1]}
        return {**self.rows[key], "index": key}


class EpochSampler(torch.utils.data.Sampler):
    """A permutation for each epoch, from (seed, epoch) alone; gives (epoch, index)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        epoch = self.epoch
        return ((epoch, index) for index in torch.randperm(self.length, generator=generator).tolist())


class StreamedRows(torch.utils.data.IterableDataset):
    """
    Rows of a stream, with `epoch` and `index`; one pass over it is one epoch.

    Args:
        stream: A `datasets.IterableDataset` or any iterable that can be gone through again.
        length: Rows of one pass, by which schedules know how far training is.
    """

    def __init__(self, stream, length: int):
        self.stream, self.length = without_decoding(stream), length
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Tells the rows, and a stream that shuffles, which epoch it is."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict]:
        epoch = int(self._epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        worker = torch.utils.data.get_worker_info()
        # In workers a `datasets` stream shares out its shards by itself.
        shares, mine = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if hasattr(self.stream, "set_epoch"):
            shares, mine = 1, 0
        count = 0
        for index, row in enumerate(self.stream):
            if index == self.length:
                return
            count += 1
            if index % shares == mine:
                yield {**row, "epoch": epoch, "index": index}
        if worker is None and count < self.length:
            raise ValueError(f"The stream ends after {count} rows, but `train_rows` says {self.length}.")


class _SetEpoch(TrainerCallback):
    """Tells sampler or stream the epoch, also where training resumes in the middle of one."""

    def __init__(self, trainer: "StageTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        for source in (self.trainer.sampler, self.trainer.train_dataset):
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


class StageTrainer(Trainer):
    """
    A `Trainer` that trains a part of a model and keeps the rest as it is.

    Args:
        model: What is trained; its parameters outside `trained` are frozen.
        args: The stage's settings.
        trained: Names of the modules and parameters of `model` that train.
        processor: The `DaliProcessor`, saved with the result.
        train_dataset, eval_dataset: Rows (see `data_collator`); a training stream has no length and needs
            `args.train_rows`.
        data_collator: Must have `columns` and `skips`.
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
        self.sampler = None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=self.open_rows(train_dataset, args),
            eval_dataset=None if eval_dataset is None else Rows(eval_dataset),
            processing_class=processor,
            **kwargs,
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"FSDP was asked for, but accelerate does not shard on {args.device.type} devices.")
        self.add_callback(_SetEpoch(self))

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
        return StreamedRows(rows, args.train_rows)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, StreamedRows):
            return None
        self.sampler = EpochSampler(len(rows), self.args.data_seed or self.args.seed)
        return self.sampler

    def freeze(self) -> None:
        """Puts what does not train into eval mode: no dropout in it."""
        if self.args.activation_checkpointing:
            return  # layers checkpoint their activations in training mode only
        for module in self.accelerator.unwrap_model(self.model).children():
            eval_if_frozen(module)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One step; where no sample of a batch could be decoded, there are no labels to divide by."""
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer`'s, with what is frozen in eval mode."""
        if self.model.training:
            self.freeze()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer`'s, but into a folder beside, which gets its name when it is complete."""
        output_dir, limit = Path(self.args.output_dir), self.args.save_total_limit
        name, settings = f"checkpoint-{self.state.global_step}", self.args.to_json_string()
        staging, final = output_dir / STAGING / name, output_dir / name
        if self.is_world_process_zero():
            shutil.rmtree(staging.parent, ignore_errors=True)  # what a kill has left
        self.accelerator.wait_for_everyone()
        self.args.output_dir, self.args.save_total_limit = str(staging.parent), None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (staging / SETTINGS).write_text(settings)
                if self.state.best_global_step:
                    self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                    self.state.save_to_json(staging / "trainer_state.json")
                shutil.rmtree(final, ignore_errors=True)
                staging.rename(final)
                shutil.rmtree(staging.parent, ignore_errors=True)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging.parent, ignore_errors=True)
            last = get_last_checkpoint(output_dir)
            raise OSError(
                f"{final} could not be written: {error}. "
                + (f"{last} is complete: free space and resume from it." if last else "There is no earlier one.")
            ) from error
        finally:
            self.args.output_dir, self.args.save_total_limit = str(output_dir), limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the result of the stage (see `save_result`); inside a checkpoint, only the weights that train.

        Args:
            output_dir: Where to; `args.output_dir` by default.
        """
        folder = Path(output_dir or self.args.output_dir)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if _internal_call:
            # Sharded weights are written by the optimizer's part of the checkpoint.
            if self.args.should_save and not sharded:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({name: p.detach().contiguous() for name, p in self.trained_parameters()}, folder / TRAINED)
            return
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if sharded else None
        if self.args.should_save:
            staging = folder / STAGING / folder.resolve().name  # the card takes its title from it
            shutil.rmtree(staging, ignore_errors=True)
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
        Writes what the stage is for.

        Args:
            folder: An empty folder.
            state_dict: The whole state of the model where its own parameters are sharded, else None.
        """
        raise NotImplementedError

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of what trains."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / TRAINED
        if not file.exists():
            raise ValueError(f"{resume_from_checkpoint} is no checkpoint of this stage: it has no {TRAINED}.")
        load_trained(dict(self.trained_parameters()), load_file(file), file)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)

    # The whole run --------------------------------------------------------------------------------------------------

    def run(self, command: str = "", data: str = "") -> dict[str, float]:
        """
        Trains (from the last checkpoint in `output_dir`, if there is one), evaluates, saves the result and its card.

        Args:
            command: What started the run, for the card.
            data: What it is trained on, for the card.

        Returns:
            All metrics.
        """
        metrics = self.train(resume_from_checkpoint=self.checkpoint_to_resume()).metrics
        if self.eval_dataset is not None:
            metrics |= self.evaluate()
        metrics["skipped_samples"] = int(
            self.accelerator.reduce(torch.tensor(self.data_collator.skips.skipped, device=self.args.device))
        )
        self.save_model()
        if self.is_world_process_zero():
            write_card(self.args.output_dir, training_section(self, command, data, metrics))
        self.save_state()
        self.save_metrics("all", metrics)
        logger.warning(f"{metrics['skipped_samples']} samples were skipped because they could not be decoded.")
        return metrics

    def checkpoint_to_resume(self) -> str | None:
        """`args.resume_from_checkpoint`; by default the last one in the output folder; "false" for none."""
        given = self.args.resume_from_checkpoint
        if given is not None:
            return None if given.lower() == "false" else given
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        if last is not None:
            logger.warning(f"Resuming from {last}. (To start anew: --resume_from_checkpoint false)")
            self.warn_of_other_settings(Path(last) / SETTINGS)
        return last

    def warn_of_other_settings(self, file: Path) -> None:
        """Names the settings that are not those of the checkpoint that training resumes from."""
        if not file.exists():
            return
        found, ours = json.loads(file.read_text()), json.loads(self.args.to_json_string())
        if different := sorted(name for name in ours if name in found and ours[name] != found[name]):
            logger.warning(f"These settings differ from the checkpoint's: {', '.join(different)}.")


def train_only(model: nn.Module, trained: list[str]) -> None:
    """
    Freezes a model but for some modules or parameters, which are kept in float32.

    Args:
        model: The model.
        trained: Their names.

    Raises:
        ValueError: if a name is no module and no parameter of the model.
    """
    model.requires_grad_(False)
    for name in trained:
        chosen = [p for n, p in model.named_parameters() if n == name or n.startswith(f"{name}.")]
        if not chosen:
            raise ValueError(f"The model has no `{name}` to train.")
        for parameter in chosen:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def eval_if_frozen(module: nn.Module) -> None:
    """Puts the largest parts of a module that have parameters, none of which trains, into eval mode."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if trains and not any(trains):
        module.eval()
        return
    for child in module.children():
        eval_if_frozen(child)


@torch.no_grad()
def load_trained(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], source) -> None:
    """
    Copies tensors of a checkpoint into parameters.

    Args:
        parameters: What trains, by name.
        tensors: What the checkpoint holds, by name.
        source: The checkpoint, for messages.

    Raises:
        ValueError: if names or shapes differ; lists them. Nothing is copied then.
    """
    problems = [f"{name} is not in the checkpoint" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"{name} does not train in this run" for name in sorted(tensors.keys() - parameters.keys())]
    problems += [
        f"{name} has the shape {list(tensors[name].shape)}, the model's is {list(parameters[name].shape)}"
        for name in sorted(parameters.keys() & tensors.keys())
        if tensors[name].shape != parameters[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit: {'; '.join(problems[:5])}{more}.")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
