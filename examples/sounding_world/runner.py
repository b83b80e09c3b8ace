"""What both demonstrations share: stages under one bar, some of them trained in several processes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import psutil
from transformers import PrinterCallback
from transformers.utils import logging

from trainers.progress import Progress, ShowProgress, Stage, peak_memory, run_stages


class Relay:
    """
    Stands in for the bar in another process.

    Args:
        report (`Callable[[float, str], None]`): Sends share and loss to the process that has the bar.
    """

    def __init__(self, report: Callable[[float, str], None]):
        self.report, self.loss = report, ""

    def done(self, share: float) -> None:
        """So much of the stage, between 0 and 1, is done."""
        self.report(share, self.loss)


def memory_in_use() -> float:
    """GiB of this process and its children, what they share counted once where the system tells (Linux)."""
    own = psutil.Process()
    found = [process.memory_full_info() for process in (own, *own.children(recursive=True))]
    return sum(getattr(info, "pss", info.rss) for info in found) / 2**30


class Runner:
    """
    Runs stages that are not done, with the bar in place of the trainers' own output.

    Args:
        command (`str`): What the user typed, for the cards of the models.
    """

    def __init__(self, command: str):
        self.command = command
        self.progress: Progress | Relay | None = None
        self.shared_memory = 0.0  # GiB in use while several processes trained
        datasets.disable_progress_bars()  # one bar is enough
        logging.disable_progress_bar()

    def stage(self, name: str, weight: float, run: Callable[[], object]) -> Stage:
        """A stage that shows on the bar what it trains."""

        def follow(progress: Progress) -> None:
            self.progress = progress
            run()

        return Stage(name, weight, follow)

    def run_stages(self, stages: Sequence[Stage], folder: Path) -> dict[str, dict]:
        """Runs the stages that are not done; see [`~trainers.progress.run_stages`]."""
        return run_stages(stages, folder, lambda: max(peak_memory(), self.shared_memory))

    def show(self, share: float, loss: str) -> None:
        """Shows on the bar what another process tells."""
        if self.progress is not None:
            self.progress.loss = loss
            self.progress.done(share)
        if share == 1:  # the last step: what they keep is all there
            self.shared_memory = max(self.shared_memory, memory_in_use())

    def train(self, trainer) -> None:
        """Runs a trainer."""
        trainer.remove_callback(PrinterCallback)
        if self.progress is not None:
            trainer.add_callback(ShowProgress(self.progress))
        trainer.run(self.command, "the sounding world")
