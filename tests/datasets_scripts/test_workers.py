"""Children that hang, eat or crash cost their own item only."""

import os
import sys
import time

import psutil
import pytest

from datasets_scripts.workers import Casualty, GuardedPool, run_tasks
from tests.datasets_scripts.workloads import misbehave


def test_every_item_gets_a_result_whatever_its_child_does():
    items = ["a", "hang", "eat", "b", "crash", "spin", "c"]
    started = time.monotonic()
    with GuardedPool(misbehave, workers=2, timeout=1, memory=1 << 30) as pool:
        results = dict(pool.map(zip(items, items, strict=True)))
    assert time.monotonic() - started < 15
    reasons = {item: result.reason for item, result in results.items() if isinstance(result, Casualty)}
    assert reasons == {"hang": "timeout", "spin": "timeout", "eat": "out_of_memory", "crash": "crashed"}
    assert [results[item] for item in "abc"] == list("abc")
    assert not [child for child in psutil.Process().children() if "workers import _serve" in " ".join(child.cmdline())]


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i, "x"

    with GuardedPool(misbehave, workers=2, timeout=5, memory=1 << 30) as pool:
        results = pool.map(items())
        next(results)
        assert len(taken) <= 3


def test_an_error_of_the_function_reaches_the_caller():
    with GuardedPool(misbehave, 1, 5, 1 << 30) as pool, pytest.raises(ValueError, match="of this item"):
        list(pool.map([(0, "raise")]))


def test_children_that_cannot_start_are_no_casualties(monkeypatch):
    monkeypatch.setattr(misbehave, "__module__", "only_here")
    monkeypatch.setitem(sys.modules, "only_here", sys.modules[__name__])
    with GuardedPool(misbehave, 1, 5, 1 << 30) as pool, pytest.raises(RuntimeError, match="could not start"):
        list(pool.map([(0, "a")]))


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_run_here_or_in_processes(workers):
    results = list(run_tasks(_square_and_pid, range(5), workers=workers))
    assert sorted(square for square, _ in results) == [0, 1, 4, 9, 16]
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


def _square_and_pid(number):
    return number**2, os.getpid()
