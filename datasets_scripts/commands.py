"""How every command ends: with a result, or with one line that says what is wrong."""

import argparse
import sys
from collections.abc import Callable, Sequence

from huggingface_hub.errors import StrictDataclassError

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError, MemoryError, StrictDataclassError)


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses arguments and runs a command.

    Args:
        parser (`argparse.ArgumentParser`):
            The command's parser, which gets the option `--debug`.
        command (`Callable`):
            Takes the parsed options, prints its result and returns the exit code.
        arguments (`Sequence[str]`, *optional*):
            Those of the command line; by default what this process was started with.

    Returns:
        `int`: the exit code: the command's, 1 after an error, 130 after an interrupt from the keyboard.
    """
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out beforehand, so that the switch may also stand behind a subcommand.
    options = parser.parse_args([argument for argument in given if argument != "--debug"])
    # `dali` and `vipant` keep the switch for themselves when they hand a command on.
    return exit_code(lambda: command(options), "--debug" in [*given, *sys.argv])


def exit_code(command: Callable[[], int], debug: bool = False) -> int:
    """Runs a command whose errors end in one line on the terminal.

    Args:
        command (`Callable`):
            Does the work and returns its exit code.
        debug (`bool`, *optional*, defaults to `False`):
            Whether an error is raised, with its traceback, and not printed in one line.

    Returns:
        `int`: the exit code: the command's, 1 after an error, 130 after an interrupt from the keyboard.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, USER_ERRORS) else f"unexpected {type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
