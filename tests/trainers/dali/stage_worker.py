"""Runs of stages in processes of their own, which may be killed: forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from tests.tiny import tiny_dali
from tests.trainers.stages import clips, settings
from trainers.dali.alignment import AlignmentConfig, AlignmentTrainer
from trainers.dali.distillation import DistillationConfig, DistillationTrainer
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer

STAGES = {
    "prefix_tuning": (PrefixTuningConfig, PrefixTuningTrainer),
    "alignment": (AlignmentConfig, AlignmentTrainer),
    "distillation": (DistillationConfig, DistillationTrainer),
}
SHORT = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps"}


class Kill(TrainerCallback):
    """kill -9 at the end of a step, before anything of it is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(stage: str, folder: Path, rows=None, **options):
    """A stage's trainer on the tiny model and the small world."""
    config_class, trainer_class = STAGES[stage]
    if stage == "alignment":
        options = {"entropy_start": 5.0, "entropy_end": 1.0, "learning_rate": 1e-3} | options
    config = config_class(**settings(folder, **(SHORT | {"save_steps": 2} | options)))
    model, processor = tiny_dali()
    return trainer_class(model, config, processor, clips() if rows is None else rows)


def train(
    stage: str, folder: Path, kill_step: int = 0, kill_file: str = "", rank=0, world=1, port=0, **options
) -> None:
    """
    Trains and writes the final weights and losses to `folder/final.pt`.

    Args:
        kill_step: End the process at this step.
        kill_file: At that step, not at once but when this file of the checkpoint is half written.
    """
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if options.get("fsdp"):
        shard_on_cpu()
    trainer = build(stage, folder, **options)
    if kill_file:
        kill_while_writing(trainer, kill_step, kill_file)
    elif kill_step:
        trainer.add_callback(Kill(kill_step))
    trainer.run()
    weights = {name: parameter.detach() for name, parameter in trainer.trained_parameters()}
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}
    if rank == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": weights, "losses": losses}, folder / "final.pt")


def shard_on_cpu() -> None:
    """torch shards (FSDP2) on CPU too, but accelerate asks for it on accelerators only: this makes it ask here."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = patched


def kill_while_writing(trainer, step: int, name: str) -> None:
    """Kills the process in the middle of a save, with a file cut short on disk."""
    saved = {"optimizer.pt": "_save_optimizer_and_scheduler", "trained.safetensors": "save_model"}
    method = saved[name]
    original = getattr(trainer, method)

    def cut_short(output_dir, *args, **kwargs):
        original(output_dir, *args, **kwargs)
        if trainer.state.global_step == step:
            os.truncate(Path(output_dir) / name, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(trainer, method, cut_short)


def context():
    """Processes forked from a server with all imports done."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tests.trainers.dali.stage_worker"])
    return forkserver


def start(target, *args, world: int = 1, **kwargs) -> list[int]:
    """Runs a function in one process or, as ranks of a gloo group, in several; returns their exit codes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = [{"rank": rank, "world": world, "port": port} for rank in range(world)] if world > 1 else [{}]
    processes = [context().Process(target=target, args=args, kwargs=kwargs | rank) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
