"""Two processes of one thread against one process of two threads, for steps as small as those of the sounding world.

    python benchmarks/bench_processes.py

Alignment by exact transport with the demonstration's sizes (64 audio tokens of width 96, 36 image tokens of width 128,
batches of 32) on random data: forward, backward, Adam. Medians of steps after a warm-up, both sides in turn.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_dali import DaliAudioConfig, DaliAudioModel
from trainers.losses import optimal_transport
from trainers.processes import run_in_processes

BATCH, STEPS, WARM_UP, ROUNDS = 32, 30, 5, 3


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.tower = DaliAudioModel(DaliAudioConfig(num_frames=256, num_mel_bins=64, patch_size=16, **sizes))
        self.projection = torch.nn.Linear(96, 128)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(self.tower(features).last_hidden_state)


def step_seconds(model: torch.nn.Module, batch: int) -> float:
    features, image = torch.randn(batch, 256, 64), torch.randn(batch, 36, 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        optimal_transport(model(features), image).mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def in_one_of_two(report) -> None:
    torch.distributed.init_process_group("gloo")
    report(step_seconds(DistributedDataParallel(Encoder()), BATCH // 2))


def main() -> None:
    torch.set_num_threads(2)
    threads: list[float] = []
    processes: list[float] = []
    for _ in range(ROUNDS):
        threads.append(step_seconds(Encoder(), BATCH))
        run_in_processes(in_one_of_two, (), 2, processes.append)
    one, two = statistics.median(threads), statistics.median(processes)
    print(f"one process, two threads:  {1e3 * one:.0f} ms a step of {BATCH}")
    print(f"two processes, one thread: {1e3 * two:.0f} ms, {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
