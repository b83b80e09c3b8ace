"""What the command trees `dali` and `vipant` share. Nothing here imports torch, so help and mistakes cost no time.

A command is either written with typer, or handed on as typed to the module that does the work (`handed_on`), which has
the options and the help. A user's error ends any command in one line; `--debug` shows where it comes from.
"""

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

import typer

from datasets_scripts.commands import exit_code


def new_app(name: str, description: str) -> typer.Typer:
    """A command tree with `--version`."""
    app = typer.Typer(name=name, help=description, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {metadata.version('dali-audio')}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Show the version.", callback=show_version, is_eager=True
        ),
    ) -> None: ...

    return app


def new_group(app: typer.Typer, name: str, description: str) -> typer.Typer:
    """A command with commands below it, such as `dali train`."""
    group = typer.Typer(help=description, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


def handed_on(app: typer.Typer, name: str, module: str, description: str, *before: str) -> None:
    """
    Adds a command whose arguments go to the `main` of a module.

    Args:
        app (`typer.Typer`):
            Where the command stands.
        name (`str`):
            Name of the command.
        module (`str`):
            The module's name; it has `main(arguments)`, which may return an exit code.
        description (`str`):
            One line of help; the module's own help says the rest.
        before (`str`):
            Arguments that stand before those of the command line.
    """

    @app.command(
        name,
        help=description,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> None:
        sys.argv[0] = context.command_path  # what the module's help and model cards call the program
        raise typer.Exit(import_module(module).main([*before, *context.args]) or 0)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command tree.

    Args:
        app (`typer.Typer`):
            The tree.
        arguments (`Sequence[str]`, *optional*):
            Those of the command line; by default what this process was started with.

    Returns:
        `int`: the exit code: the command's, 1 after a user's error, 2 for wrong usage, 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in arguments if argument != "--debug"]

    def run() -> int:
        try:
            typer.main.get_command(app)(rest, prog_name=app.info.name)
        except SystemExit as end:
            if isinstance(end.code, str):
                raise ValueError(end.code) from end
            return end.code or 0
        return 0

    return exit_code(run, debug=len(rest) < len(arguments))
