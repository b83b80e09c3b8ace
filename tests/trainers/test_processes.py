"""Processes of one group: what they share, what they report, and how they fail."""

import os

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from trainers.processes import run_in_processes


def add_up(value: float, report) -> None:
    torch.distributed.init_process_group("gloo")
    total = torch.tensor([value * (torch.distributed.get_rank() + 1)])
    torch.distributed.all_reduce(total)
    report(float(total), torch.get_num_threads())


def fail_in_the_second(report) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the second one fails")
    torch.distributed.init_process_group("gloo")  # waits for the second, which never comes


def test_processes_form_one_group_and_the_first_reports():
    reports = []
    run_in_processes(add_up, (2.0,), 2, lambda *values: reports.append(values))
    assert reports == [(6.0, 1)]
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()


def test_an_error_in_any_of_them_ends_all_and_is_raised_here():
    with pytest.raises(ProcessRaisedException, match="the second one fails"):
        run_in_processes(fail_in_the_second, (), 2, print)
