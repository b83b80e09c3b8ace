"""Public data sets, folders and tables as data sets on disk, for `--dataset` of the trainers.

    python -m datasets_scripts.build clotho clotho/ --split development --output data/clotho
    python -m datasets_scripts.build audiocaps test.csv videos/ --output data/audiocaps
    python -m datasets_scripts.build csv_table clips.csv --columns audio=file caption=text --output data/clips

The data set holds the files' bytes, so it can be moved.
"""

import argparse
import inspect
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets

from datasets_scripts.commands import run_command

BUILDERS = (
    "audiocaps",
    "audioset",
    "audiotxt",
    "av_folder",
    "cav_mae",
    "clotho",
    "csv_table",
    "esc50",
    "llava_chat",
    "urbansound8k",
    "vggsound",
    "vipant_index",
)


def build(name: str, output: str | Path, **arguments: Any) -> datasets.Dataset:
    """Builds a data set and saves it.

    Args:
        name (`str`):
            Name of a builder, one of `BUILDERS`.
        output (`str` or `Path`):
            Folder for the data set, as `datasets.load_from_disk` opens it; must be new, or empty.
        arguments:
            Arguments of the builder.

    Returns:
        `datasets.Dataset`: the data set.

    Raises:
        ValueError: if the output folder is not empty, or a table is wrong.
        FileNotFoundError: if files are missing.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another output folder, or remove this one")
    dataset = builder(name)(**arguments)
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.dali-partial")
    try:
        dataset.save_to_disk(str(partial))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dataset


def builder(name: str) -> Any:
    """The function of a builder."""
    return getattr(import_module(f"datasets_scripts.builders.{name}"), name)


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """Reads `WHAT=COLUMN` pairs.

    Raises:
        ValueError: if one is not like that.
    """
    columns = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--columns takes pairs such as audio=file caption=text, not {wrong[0]!r}")
    return columns


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser("datasets_scripts.build", description=__doc__.split("\n")[0])
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in BUILDERS:
        function = builder(name)
        summary = (inspect.getdoc(function) or "").split("\n")[0]
        one = names.add_parser(name, help=summary, description=summary)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is parameter.empty:
                one.add_argument(parameter.name)
            elif parameter.name == "columns":
                one.add_argument("--columns", nargs="+", metavar="WHAT=COLUMN", help="what the table's columns hold")
            else:
                one.add_argument(f"--{parameter.name}", default=parameter.default, help="(default: %(default)s)")
        one.add_argument("--output", required=True, help="folder for the data set")
    return run_command(parser, _build, arguments)


def _build(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("name", "output", "debug")}
    if given.get("columns") is not None:
        given["columns"] = parse_columns(given["columns"])
    dataset = build(options.name, options.output, **given)
    print(f"{len(dataset)} rows ({', '.join(dataset.column_names)}): {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
