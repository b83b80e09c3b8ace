"""Processes of one group: what they share, what they report, and how they fail."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from trainers.processes import SMALL, run_in_processes, writing_threads


def add_up(value: float, report) -> None:
    torch.distributed.init_process_group("gloo")
    total = torch.tensor([value * (torch.distributed.get_rank() + 1)])
    torch.distributed.all_reduce(total)
    report(float(total), torch.get_num_threads())


def share_a_model(folder: Path, report) -> None:
    gc.disable()  # chance takes no part in what is gone
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    alive, note, destroy = weakref.ref(model), folder / os.environ["RANK"], torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: (note.write_text(f"{alive()}"), destroy())


def fail_in_the_second(report) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the second one fails")
    torch.distributed.init_process_group("gloo")  # waits for the second, which never comes


def test_processes_form_one_group_and_the_first_reports():
    reports = []
    run_in_processes(add_up, (2.0,), 2, lambda *values: reports.append(values))
    assert reports == [(6.0, 1)]
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()


def test_a_shared_model_is_gone_before_its_group(tmp_path):
    """Else it holds the group to the process's end, whose threads then abort it, one time in six."""
    run_in_processes(share_a_model, (tmp_path,), 2, print)
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["None", "None"]


def test_an_error_in_any_of_them_ends_all_and_is_raised_here():
    with pytest.raises(ProcessRaisedException, match="the second one fails"):
        run_in_processes(fail_in_the_second, (), 2, print)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_models_write_on_one_thread(two_threads):
    with writing_threads(torch.nn.Linear(2, 2)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_large_models_keep_their_threads(two_threads):
    with torch.device("meta"):
        model = torch.nn.Linear(SMALL, 1)
    with writing_threads(model):
        assert torch.get_num_threads() == 2


def test_the_environment_has_the_last_word_on_threads(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with writing_threads(torch.nn.Linear(2, 2)):
        assert torch.get_num_threads() == 2
