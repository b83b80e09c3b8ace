"""Processes and threads on the cores of one machine; from within a program, what torchrun does for a command.

Small models gain little from threads: two processes of one thread make a step of the demonstration's alignment 1.13
times as fast as two threads do (`benchmarks/bench_processes.py`), and prepare their batches side by side.
"""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import multiprocessing, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

SMALL = 20_000_000  # parameters below which writing a word is too little work to be shared out among threads


@contextmanager
def writing_threads(model: nn.Module) -> Iterator[None]:
    """
    Lets a small model write text on one thread: several gain it nothing, and where another program keeps a core busy,
    each operation waits for the thread on that core. `OMP_NUM_THREADS` in the environment has the last word.

    Args:
        model (`nn.Module`): What writes.
    """
    before = torch.get_num_threads()
    size = sum(parameter.numel() for parameter in model.parameters())
    alone = size < SMALL and before > 1 and "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available()
    if alone:
        logger.info(f"{size / 1e6:.1f} million parameters write on one thread; OMP_NUM_THREADS sets another number.")
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(before)  # training goes on with the threads it began with, to the same bits


def run_in_processes(function: Callable, arguments: tuple, processes: int, on_report: Callable[..., Any]) -> None:
    """
    Runs a function in several processes of one `torch.distributed` group; they end with this process.

    Args:
        function: Is called with `arguments` and, last, a function `report(*values)`; what the first process reports
            goes to `on_report`, what the others report is dropped. Function and arguments must be picklable.
        arguments: Arguments of the function.
        processes: Number of processes.
        on_report: Called here with each report.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if one of them fails; holds its traceback. The others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reports = multiprocessing.get_context("spawn").SimpleQueue()
    running = multiprocessing.start_processes(
        _enter, (function, arguments, processes, port, reports), processes, join=False, start_method="spawn"
    )
    done = False
    while not done:
        done = running.join(timeout=0.2)
        while not reports.empty():
            on_report(*reports.get())


def leave_group() -> None:
    """
    Ends this process's part in its group, if it is in one: what a training program does last.

    A model shared by the group holds it, in a cycle; a group that outlives this aborts the process at its end now and
    then. So models are collected first: call this where nothing refers to a trainer any more.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _enter(rank: int, function: Callable, arguments: tuple, processes: int, port: int, reports) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # without it, each would train for itself
    torch.set_num_threads(1)

    def report(*values) -> None:
        if rank == 0:
            reports.put(values)

    try:
        function(*arguments, report)
    finally:
        leave_group()
