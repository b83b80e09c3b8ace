"""The command trees: what they hold, that help needs no torch, and how a user's error ends."""

import subprocess
import sys

import pytest
import typer.testing

from tests.trainers.stages import ROOT
from trainers.cli import new_app, run_app
from trainers.dali import cli as dali
from trainers.vipant import cli as vipant


def leaves(command, path=()):
    """All commands below a command, by their words."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path
    for name, child in (below or {}).items():
        yield from leaves(child, (*path, name))


TREES = [(tree, words) for tree in (dali, vipant) for words in leaves(typer.main.get_command(tree.app))]


@pytest.mark.parametrize(("tree", "words"), TREES, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_every_command_shows_its_help(tree, words, capsys):
    assert tree.main([*words, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("module", ["trainers.dali.cli", "trainers.vipant.cli"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["no-such-command"]])
def test_help_and_mistakes_need_no_torch(module, arguments):
    program = f"import sys\nfrom {module} import main\ncode = main({arguments})\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_similar_commands_are_offered(capsys):
    assert dali.main(["capton"]) == 2
    assert "dali --help" in (shown := capsys.readouterr().err)
    assert "Did you mean 'caption'" in shown


@pytest.fixture
def broken():
    app = new_app("broken", "Fails.")

    @app.command("fail")
    def fail():
        raise ValueError("the sound\nhas no samples")

    return app


def test_errors_end_in_one_line(broken, capsys):
    assert run_app(broken, ["fail"]) == 1
    assert capsys.readouterr().err == "error: the sound has no samples\n"


def test_debug_shows_where_an_error_comes_from(broken):
    with pytest.raises(ValueError, match="no samples"):
        run_app(broken, ["fail", "--debug"])
