"""Children that hang, eat or crash cost their own item only."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from datasets_scripts.workers import Casualty, guarded_map, run_tasks
from tests.datasets_scripts.workloads import misbehave

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_item_gets_a_result_whatever_its_child_does():
    items = ["a", "hang", "eat", "b", "crash", "spin", "kill", "c"]
    started = time.monotonic()
    results = dict(guarded_map(misbehave, zip(items, items, strict=True), workers=2, timeout=1, memory=1 << 30))
    assert time.monotonic() - started < 30
    casualties = {item: result.reason for item, result in results.items() if isinstance(result, Casualty)}
    assert casualties == {
        "hang": "timeout",
        "spin": "timeout",
        "eat": "out_of_memory",
        "crash": "crashed",
        "kill": "out_of_memory",
    }
    assert results["crash"].detail == "the process ended with code -6"
    assert [results[item] for item in "abc"] == list("abc")
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i, "x"

    results = guarded_map(misbehave, items(), workers=2, timeout=5, memory=1 << 30)
    next(results)
    assert len(taken) <= 5
    results.close()


def test_an_error_of_the_function_reaches_the_caller():
    with pytest.raises(ValueError, match="of this item"):
        list(guarded_map(misbehave, [(0, "raise")], 1, 5, 1 << 30))


def test_children_that_cannot_start_are_no_casualties(monkeypatch):
    monkeypatch.setattr(misbehave, "__module__", "only_here")
    monkeypatch.setitem(sys.modules, "only_here", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "misbehave", misbehave)
    with pytest.raises(RuntimeError, match="could not start"):
        list(guarded_map(misbehave, [(0, "a")], 1, 5, 1 << 30))


ORPHANED = """
import sys
sys.path.insert(0, sys.argv[1])
from datasets_scripts.workers import guarded_map
from tests.datasets_scripts.workloads import misbehave
if __name__ == "__main__":
    for key, result in guarded_map(misbehave, [(0, "a"), (1, "spin")], 1, 600, 1 << 30):
        print(result, flush=True)
"""


def test_children_end_with_their_parent(tmp_path):
    (tmp_path / "script.py").write_text(ORPHANED)
    command = [sys.executable, str(tmp_path / "script.py"), str(REPOSITORY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_run_here_or_in_processes(workers):
    results = list(run_tasks(_square_and_pid, range(5), workers=workers))
    assert sorted(square for square, _ in results) == [0, 1, 4, 9, 16]
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


def _square_and_pid(number):
    return number**2, os.getpid()
