"""Where work runs: guarded child processes for hostile files, and shard tasks on local processes or on Ray Data.

- `GuardedPool` calls a function on items in child processes with a limit on time and memory for each item; a child
  that hangs, crashes or eats too much is replaced, and its item gets a `Casualty` for a result,
- `run_tasks` calls a function on tasks (a shard each, say), in this process, in several, or on a Ray cluster.
"""

import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe
from multiprocessing.connection import wait as wait_readable
from typing import Any, Literal

Engine = Literal["local", "ray"]
_READY = "ready"


@dataclass(frozen=True)
class Casualty:
    """The result of an item whose child process did not survive it.

    Attributes:
        reason: "timeout", "out_of_memory" or "crashed".
        detail: what ended it.
    """

    reason: str
    detail: str


class GuardedPool:
    """Child processes that call one function, each call within a limit on time and memory.

    The kernel holds the limits, so they also end a call that is stuck in C code, even after this process is gone.

    Args:
        function: importable by name; takes an item, and returns or raises what can be pickled.
        workers: number of children.
        timeout: seconds for one call.
        memory: bytes that a child may allocate.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, timeout: float, memory: int):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self._setup = (function, timeout, memory)
        self._children: list[_Child] = []
        self._workers = workers

    def __enter__(self) -> "GuardedPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children:
            child.stop()
        self._children.clear()

    def map(self, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Calls the function on every item; takes no more items than there are children.

        Args:
            items: (key, item) pairs.

        Yields:
            (key, result) pairs as they come; a result may be a `Casualty`.

        Raises:
            Exception: what the function raised.
        """
        source = iter(items)
        busy: dict[Any, tuple[_Child, Any]] = {}  # by connection
        while True:
            while len(busy) < self._workers and (pair := next(source, None)) is not None:
                child = self._idle({child for child, _ in busy.values()})
                child.connection.send(pair[1])
                busy[child.connection] = (child, pair[0])
            if not busy:
                return
            for connection in wait_readable(list(busy)):
                child, key = busy.pop(connection)
                try:
                    result = child.connection.recv()
                    if result == _READY:
                        child.ready = True
                        busy[child.connection] = (child, key)
                        continue
                except (EOFError, ConnectionError):
                    result = child.casualty()
                    self._children.remove(child)
                if isinstance(result, Exception):
                    raise result
                yield key, result

    def _idle(self, busy: "set[_Child]") -> "_Child":
        for child in self._children:
            if child not in busy and child.process.poll() is None:
                return child
        self._children.append(_Child(*self._setup))
        return self._children[-1]


class _Child:
    """A process that runs `_serve`. A plain interpreter, not a fork: it holds nothing but what the function needs."""

    def __init__(self, function: Callable[[Any], Any], timeout: float, memory: int):
        self.timeout = timeout
        self.ready = False
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from datasets_scripts.workers import _serve; _serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.connection.send((function, timeout, memory))

    def casualty(self) -> Casualty:
        code = self.process.wait()
        self.connection.close()
        if not self.ready:
            raise RuntimeError(f"a worker process could not start (exit code {code}): see its message above")
        if code == -signal.SIGALRM:
            return Casualty("timeout", f"stopped after {self.timeout:g} s")
        if code == -signal.SIGKILL:
            return Casualty("out_of_memory", "killed by the system")
        return Casualty("crashed", f"the process ended with code {code}")

    def stop(self) -> None:
        self.connection.close()  # the child ends when it finds its pipe closed
        self.process.kill()
        self.process.wait()


def _serve(descriptor: int) -> None:
    """The life of a child: get a function and limits, then answer items until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process wherever it is
    connection = Connection(descriptor)
    try:
        function, timeout, memory = connection.recv()
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection.send(_READY)
        while True:
            item = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                result = function(item)
            except MemoryError:
                result = Casualty("out_of_memory", f"more than {memory >> 20} MiB")
            except Exception as error:
                result = _portable(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)
    except (EOFError, ConnectionError):
        return


def _portable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    engine: Engine = "local",
    workers: int = 1,
    gpus: float = 0,
) -> Iterator[Any]:
    """Calls a function on every task, here or on a cluster; for work that a whole shard makes worthwhile.

    Tasks must not depend on each other, and should write their own output (atomically, to where all machines can
    read it) and return something small. A function that loads a model should be an object that does so when it is
    first called: each worker then keeps its own.

    Args:
        function: can be pickled; takes a task.
        tasks: can be pickled; taken lazily, some ahead of the workers.
        engine: "local" runs in this process if `workers` is 1, else in as many processes; "ray" runs on the Ray
            cluster that this process is connected to, or on a new local one.
        workers: number of processes, or of Ray tasks at a time.
        gpus: GPUs that each Ray worker asks for.

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
            source = iter(tasks)
            pending = {pool.submit(function, task) for task in itertools.islice(source, 2 * workers)}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {pool.submit(function, task) for task in itertools.islice(source, len(done))}
                for future in done:
                    yield future.result()


class _RayCall:
    """Lets a function meet Ray Data's rows; as a class, so that each Ray actor keeps one (and its model)."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        return {"result": pickle.dumps(self.function(pickle.loads(row["task"])))}


def _run_on_ray(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, gpus: float, wave: int = 4096
) -> Iterator[Any]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'dali-audio[cluster]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        ray.init(
            include_dashboard=False, log_to_driver=False, num_cpus=None if "RAY_ADDRESS" in os.environ else workers
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        source = iter(tasks)
        while batch := [{"task": pickle.dumps(task)} for task in itertools.islice(source, wave)]:
            rows = ray.data.from_items(batch, override_num_blocks=len(batch)).map(
                _RayCall,  # type: ignore[arg-type]
                fn_constructor_args=(function,),
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                num_gpus=gpus or None,
            )
            for row in rows.iter_rows():
                yield pickle.loads(row["result"])
    finally:
        if started:
            ray.shutdown()
