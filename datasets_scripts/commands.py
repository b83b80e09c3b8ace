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
            Of the command; gets the option `--debug`.
        command (`Callable`):
            Takes the parsed options, prints its result and returns the exit code.
        arguments (`Sequence[str]`, *optional*):
            Of the command line; those of this process by default.

    Returns:
        `int`: the exit code: the command's, 1 after an error, 130 after an interrupt from the keyboard.
    """
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    # `dali` and `vipant` keep the switch for themselves when they hand a command on.
    return exit_code(lambda: command(options), options.debug or "--debug" in sys.argv)


def exit_code(command: Callable[[], int], debug: bool = False) -> int:
    """Runs a command whose errors end in one line on the terminal.

    Args:
        command (`Callable`):
            Does the work and returns its exit code.
        debug (`bool`, *optional*, defaults to `False`):
            Whether to show where an error comes from instead.

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
