"""A run of several stages under one bar: which are done, how long is left, what each took."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, TrainerCallback

from datasets_scripts.files import write_whole


class Progress:
    """
    One bar for the whole run: stage, share, time left, loss.

    Args:
        weights (`dict[str, float]`): The stages that are still to do, and about how long each takes.
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
        """Shows which share of the stage, between 0 and 1, is done."""
        self.bar.n = self.before + share * self.weights[self.stage]
        self.bar.set_postfix_str(self.loss)

    def finish(self) -> None:
        """The stage is over."""
        self.before += self.weights[self.stage]

    def follow(self, trainer) -> None:
        """Shows a trainer's steps and loss on the bar, in place of its own output."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShowProgress(self))


class ShowProgress(TrainerCallback):
    """
    Shows a trainer's steps and loss on a bar.

    Args:
        progress: Anything with `done(share)` and an attribute `loss`.
    """

    def __init__(self, progress):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        """Shows that one more step is done."""
        self.progress.done(state.global_step / state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keeps the latest loss for the bar."""
        if "loss" in (logs or {}):
            self.progress.loss = f"loss {float(logs['loss']):.3g}"


@dataclass(frozen=True)
class Stage:
    """
    A step of a run.

    Attributes:
        name (`str`): As the bar shows it.
        weight (`float`): About how long it takes, compared with the others.
        run (`Callable[[Progress], None]`): Does it, and goes on where it was cut off.
    """

    name: str
    weight: float
    run: Callable[[Progress], None]


def run_stages(stages: Sequence[Stage], folder: Path, memory: Callable[[], float] | None = None) -> dict[str, dict]:
    """
    Runs the stages that are not done.

    Args:
        stages (`Sequence[Stage]`): All of them, in order.
        folder (`Path`): Where it is noted which are done.
        memory (`Callable`, *optional*): GiB in use at most so far; by default those of this process alone.

    Returns:
        `dict[str, dict]`: what each stage took, those done before among them: `wall` and `cpu` seconds, `memory` in
        GiB (the most in use up to its end).
    """
    notes = {stage.name: folder / f"{stage.name.replace(' ', '_')}.json" for stage in stages}
    pending = [stage for stage in stages if not notes[stage.name].exists()]
    for stage in stages:
        if stage not in pending:
            print(f"{stage.name}: already done in {folder.parent}")
    progress = Progress({stage.name: stage.weight for stage in pending})
    with logging_redirect_tqdm():  # warnings above the bar, not through it
        for stage in pending:
            progress.start(stage.name)
            wall, cpu = time.perf_counter(), cpu_seconds()
            stage.run(progress)
            progress.finish()
            spent = {
                "wall": round(time.perf_counter() - wall, 1),
                "cpu": round(cpu_seconds() - cpu, 1),
                "memory": round((memory or peak_memory)(), 2),
            }
            with write_whole(notes[stage.name]) as partial:
                partial.write_text(json.dumps(spent))
    progress.bar.n = progress.bar.total
    progress.bar.close()
    return {stage.name: json.loads(notes[stage.name].read_text()) for stage in stages}


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def peak_memory() -> float:
    """GiB that this process alone had in use at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
