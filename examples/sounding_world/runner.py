"""Stages that are done one after the other and not again, with one bar for the whole."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import psutil
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging


class Progress:
    """
    One bar for the whole: stage, time left, loss.

    Args:
        weights: Stages that are still to do, and about how long each takes.
    """

    def __init__(self, weights: dict[str, float]):
        self.weights, self.before, self.stage, self.loss = weights, 0.0, "", ""
        layout = "{desc:<16}{percentage:4.0f}% |{bar:30}| {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=sum(weights.values()), bar_format=layout, smoothing=0)

    def start(self, stage: str) -> None:
        """The next stage begins."""
        self.stage, self.loss = stage, ""
        self.bar.set_description_str(stage)
        self.done(0)

    def done(self, share: float) -> None:
        """So much of the stage, between 0 and 1, is done."""
        self.bar.n = self.before + share * self.weights[self.stage]
        self.bar.set_postfix_str(self.loss)

    def finish(self) -> None:
        """The stage is over."""
        self.before += self.weights[self.stage]


class Relay:
    """
    Stands in for the bar in another process.

    Args:
        report: Sends share and loss to the process that has the bar.
    """

    def __init__(self, report: Callable[[float, str], None]):
        self.report, self.loss = report, ""

    def done(self, share: float) -> None:
        """So much of the stage, between 0 and 1, is done."""
        self.report(share, self.loss)


class ShowProgress(TrainerCallback):
    """Tells the bar of a trainer's steps and loss."""

    def __init__(self, progress: Progress | Relay | None):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        """Shows how far training is."""
        if self.progress is not None:
            self.progress.done(state.global_step / state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the loss."""
        if self.progress is not None and "loss" in (logs or {}):
            self.progress.loss = f"loss {float(logs['loss']):.3g}"


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def peak_memory() -> float:
    """GiB that this process alone had in use at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_in_use() -> float:
    """GiB of this process and its children, what they share counted once where the system tells (Linux)."""
    own = psutil.Process()
    found = [process.memory_full_info() for process in (own, *own.children(recursive=True))]
    return sum(getattr(info, "pss", info.rss) for info in found) / 2**30


@dataclass(frozen=True)
class Stage:
    """
    A step of the demonstration.

    Attributes:
        name: As the bar shows it.
        seconds: About how long it takes, compared with the others.
        run: Does it.
    """

    name: str
    seconds: float
    run: Callable[[], None]


class Runner:
    """
    Runs stages and notes which are done.

    Args:
        command (`str`): What the user typed, for the cards of the models.
    """

    def __init__(self, command: str):
        self.command = command
        self.progress: Progress | Relay | None = None
        self.shared_memory = 0.0  # GiB in use while several processes trained
        datasets.disable_progress_bars()  # one bar is enough
        logging.disable_progress_bar()

    def run_stages(self, stages: Sequence[Stage], folder: Path) -> dict[str, dict]:
        """
        Runs the stages that are not done.

        Args:
            stages: All, in order.
            folder: Where it is noted which are done.

        Returns:
            What each stage took, those done before among them: `wall` and `cpu` seconds, `memory` in GiB (the most in
            use up to its end).
        """
        notes = {stage.name: folder / f"{stage.name.replace(' ', '_')}.json" for stage in stages}
        pending = [stage for stage in stages if not notes[stage.name].exists()]
        for stage in stages:
            if stage not in pending:
                print(f"{stage.name}: done before, taken from {folder.parent}")
        folder.mkdir(parents=True, exist_ok=True)
        self.progress = progress = Progress({stage.name: stage.seconds for stage in pending})
        with logging_redirect_tqdm():  # warnings above the bar, not through it
            for stage in pending:
                progress.start(stage.name)
                wall, cpu = time.perf_counter(), cpu_seconds()
                stage.run()
                progress.finish()
                spent = {
                    "wall": round(time.perf_counter() - wall, 1),
                    "cpu": round(cpu_seconds() - cpu, 1),
                    "memory": round(max(peak_memory(), self.shared_memory), 2),
                }
                notes[stage.name].write_text(json.dumps(spent))
        progress.bar.n = progress.bar.total
        progress.bar.close()
        return {stage.name: json.loads(notes[stage.name].read_text()) for stage in stages}

    def show(self, share: float, loss: str) -> None:
        """Shows on the bar what another process tells."""
        if self.progress is not None:
            self.progress.loss = loss
            self.progress.done(share)
        if share == 1:  # the last step: what they keep is all there
            self.shared_memory = max(self.shared_memory, memory_in_use())

    def train(self, trainer) -> None:
        """Runs a trainer with the bar in place of its own output."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShowProgress(self.progress))
        trainer.run(self.command, "the sounding world")
