"""Every command ends in one line."""

import argparse

import pytest

from datasets_scripts.commands import run_command


def run(command, *arguments):
    parser = argparse.ArgumentParser("command")
    parser.add_argument("--number", type=int, default=0)
    return run_command(parser, command, arguments)


def failing(error):
    def command(options):
        raise error

    return command


def test_a_command_gets_its_options_and_gives_its_exit_code():
    assert run(lambda options: options.number, "--number", "3") == 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\n  split"), "error: no such split"),
        (MemoryError(), "error: MemoryError"),
        (KeyError("id"), "error: unexpected KeyError: 'id'"),
    ],
)
def test_an_error_is_one_line_and_with_debug_a_traceback(error, line, capsys):
    assert run(failing(error)) == 1
    assert capsys.readouterr().err == line + "\n"
    with pytest.raises(type(error)):
        run(failing(error), "--debug")


def test_debug_may_stand_behind_a_subcommand():
    parser = argparse.ArgumentParser("command")
    parser.add_subparsers(dest="name").add_parser("one")
    with pytest.raises(ValueError, match="wrong"):
        run_command(parser, failing(ValueError("wrong")), ["one", "--debug"])


def test_an_interrupt_is_no_error(capsys):
    assert run(failing(KeyboardInterrupt())) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_the_switch_of_a_command_tree_holds_for_what_it_hands_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["dali data prepare", "--debug"])
    with pytest.raises(ValueError, match="wrong"):
        run(failing(ValueError("wrong")))
