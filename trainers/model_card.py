"""The part of a model card that says how a stage was trained."""

import re
import shlex
import sys
from pathlib import Path

import accelerate
import datasets
import torch
import transformers

HEADING = "## Training"
SECRET = re.compile(r"--\w*[_-]token")
SECRET_VALUE = re.compile(rf"^({SECRET.pattern})=.*")


def command_line() -> str:
    """What started this process, as it can be typed again; without the tokens that open the Hub."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {main.name}" if main is not None else shlex.quote(sys.argv[0])
    shown: list[str] = []
    for argument in sys.argv[1:]:
        if shown and SECRET.fullmatch(shown[-1]):
            argument = "..."
        shown.append(SECRET_VALUE.sub(r"\1=...", argument))
    return f"python {program} {shlex.join(shown)}"


def training_section(trainer, command: str, data: str, metrics: dict[str, float]) -> str:
    """
    Args:
        trainer: A `StageTrainer` at the end of its run.
        command: What started it.
        data: What it was trained on.
        metrics: What was measured.

    Returns:
        Markdown: command, data, settings, losses and metrics.
    """
    args = trainer.args
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    shown = losses[:: max(1, len(losses) // 10)]
    if losses and shown[-1] != losses[-1]:
        shown.append(losses[-1])
    settings = {
        "epochs": args.num_train_epochs,
        "steps": trainer.state.global_step,
        "global batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "seed": args.seed,
        "trained parameters": sum(parameter.numel() for _, parameter in trainer.trained_parameters()),
    }
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, accelerate, datasets)]
    lines = [HEADING, "", f"`{type(trainer).__name__}`, on {data or 'a data set given in code'}."]
    if command:
        lines += ["", "```bash", command, "```"]
    lines += ["", *_table("setting", "value", settings.items())]
    lines += ["", *_table("step", "loss", ((step, f"{loss:.4g}") for step, loss in shown))]
    lines += ["", *_table("metric", "value", ((name, f"{value:.4g}") for name, value in sorted(metrics.items())))]
    return "\n".join([*lines, "", f"Made with {', '.join(versions)}.", ""])


def write_card(folder: str, section: str) -> None:
    """Puts the section on training at the end of the folder's README, in the place of an older one."""
    path = Path(folder) / "README.md"
    if path.exists():
        card = path.read_text().split(f"\n{HEADING}\n")[0]
    else:
        card = f"# {Path(folder).name}\n\nA stage of DALI ([arXiv 2410.05997](https://arxiv.org/abs/2410.05997)).\n"
    path.write_text(f"{card.rstrip()}\n\n{section}")


def _table(left: str, right: str, rows) -> list[str]:
    return [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
