"""What a run will take, before it starts: rows, steps, memory and disk of each stage, and what is missing.

Memory is not guessed. Each stage's model is built without storage (torch's fake tensors), one step of it is run on a
batch of the real shapes, and what would be allocated is counted.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, LlavaForConditionalGeneration

from modeling_dali import DaliForConditionalGeneration

GIB = 2**30


@dataclass
class StagePlan:
    """
    What a stage will take.

    Attributes:
        name (`str`): Of the stage.
        rows (`int`, *optional*): Clips or pictures; None where they are not there to be counted yet.
        steps (`int`, *optional*): Optimizer steps, or batches.
        memory (`float`): GiB of the device, or of the process on a CPU.
        disk (`float`): GiB that the stage writes and keeps.
        missing (`list[str]`): What has to be there first and is not.
    """

    name: str
    rows: int | None
    steps: int | None
    memory: float
    disk: float
    missing: list[str]


class CountedMemory(TorchDispatchMode):
    """
    Counts the bytes of all tensors that are alive, fake or real.

    Attributes:
        now (`int`): Bytes alive.
        peak (`int`): The most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Counts what an operation gives."""
        found = function(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return found


def step_memory(build: Callable[[], Any], step: Callable[[Any], Any]) -> int:
    """
    Bytes that one step needs at most, the weights included. Nothing is allocated.

    Args:
        build (`Callable`): Makes the model, and whatever else lives through the step.
        step (`Callable`): Runs it; a training step calls `backward` itself.

    Returns:
        `int`: the peak of two steps in a row, since optimizer states and gradients outlive the first.
    """
    with FakeTensorMode(), CountedMemory() as counted:
        built = build()
        for _ in range(2):
            step(built)
    return counted.peak
