"""Where work runs: guarded child processes for hostile files, and shard tasks on local processes or on Ray.

- `guarded_map` calls a function on items in child processes with a limit on time and memory for each item; a child
  that hangs, crashes or eats too much is replaced, and its item gets a `Casualty` for a result,
- `run_tasks` calls a function on tasks (a shard each, say), in this process, in several, or on a Ray cluster.
"""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, Literal

import psutil
from pebble import ProcessExpired, ProcessPool

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Casualty:
    """The result of an item whose child process did not survive it.

    Attributes:
        reason: "timeout", "out_of_memory" or "crashed".
        detail: what ended it.
    """

    reason: str
    detail: str


def guarded_map(
    function: Callable[[Any], Any], items: Iterable[tuple[Any, Any]], workers: int, timeout: float, memory: int
) -> Iterator[tuple[Any, Any]]:
    """Calls a function on every item in child processes, each call within a limit on time and memory.

    Args:
        function: importable by name; takes an item, and returns or raises what can be pickled.
        items: (key, item) pairs; no more are taken than twice the number of children.
        workers: number of children.
        timeout: seconds for one call.
        memory: bytes that a child may allocate beyond what it starts with (Linux; macOS does not enforce it).

    Yields:
        (key, result) pairs as they come; a result may be a `Casualty`.

    Raises:
        ValueError: if there is no worker.
        RuntimeError: if the children cannot start.
        Exception: what the function raised.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    with ProcessPool(workers, initializer=_limit, initargs=(memory,), context=get_context("spawn")) as pool:
        try:
            for (key, _), future in _completed(
                lambda pair: pool.schedule(function, (pair[1],), timeout=timeout), items, 2 * workers
            ):
                yield key, _result(future, timeout, memory)
        finally:
            pool.stop()


def _limit(memory: int) -> None:
    """Prepares a child: its memory is limited, and it ends by itself when it is told to or its parent is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it wherever it is, in C code too
    used = getattr(psutil.Process().memory_info(), "data", 0)
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _result(future: Future, timeout: float, memory: int) -> Any:
    try:
        return future.result()
    except TimeoutError:
        return Casualty("timeout", f"stopped after {timeout:g} s")
    except MemoryError:
        return Casualty("out_of_memory", f"more than {memory >> 20} MiB")
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGKILL:
            return Casualty("out_of_memory", "killed by the system")
        return Casualty("crashed", f"the process ended with code {error.exitcode}")
    except BrokenProcessPool as error:
        raise RuntimeError("the worker processes could not start: see their messages above") from error


def _completed(submit: Callable[[Any], Future], items: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Future]]:
    """Submits items, up to `ahead` at a time; yields each with its future when that is done."""
    source = iter(items)
    pending: dict[Future, Any] = {}
    while True:
        pending |= {submit(item): item for item in islice(source, ahead - len(pending))}
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            yield pending.pop(future), future


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    engine: Engine = "local",
    workers: int = 1,
    gpus: float = 0,
) -> Iterator[Any]:
    """Calls a function on every task, here or on a cluster; for work that a whole shard makes worthwhile.

    Tasks must not depend on each other, and should write their own output (whole, to where all machines can read it)
    and return something small. A function that loads a model should be an object that does so when it is first
    called: each worker then keeps its own.

    Args:
        function: can be pickled; takes a task.
        tasks: can be pickled; taken lazily, some ahead of the workers.
        engine: "local" runs in this process if `workers` is 1, else in as many processes; "ray" runs on the Ray
            cluster that this process is connected to, or on a new local one.
        workers: number of processes, or of Ray actors, which take a CPU each.
        gpus: GPUs that each Ray actor asks for.

    Yields:
        Results, in the order in which they come.

    Raises:
        ImportError: if Ray is asked for and not installed.
        Exception: what the function raised.
    """
    if engine == "ray":
        yield from _run_on_ray(function, tasks, workers, gpus)
    elif workers == 1:
        yield from map(function, tasks)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for _, future in _completed(lambda task: pool.submit(function, task), tasks, 2 * workers):
                yield future.result()


def _run_on_ray(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, gpus: float) -> Iterator[Any]:
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'dali-audio[cluster]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        cpus = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(include_dashboard=False, log_to_driver=False, num_cpus=cpus)
    try:
        actor = ray.remote(_Worker).options(num_cpus=1, num_gpus=gpus)
        pool = ActorPool([actor.remote(function) for _ in range(workers)])
        for task in tasks:
            if not pool.has_free():
                yield pool.get_next_unordered()
            pool.submit(lambda worker, task: worker.run.remote(task), task)
        while pool.has_next():
            yield pool.get_next_unordered()
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """A Ray actor, which keeps a function and its model."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def run(self, task: Any) -> Any:
        return self.function(task)
