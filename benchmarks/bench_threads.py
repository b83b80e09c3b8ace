"""What threads are worth to a small model, alone and beside a program that keeps a core busy.

    python benchmarks/bench_threads.py

Training steps of a language model as small as the sounding world's (width 128, batches of 32 texts of 72 tokens) with
one thread and with as many as there are cores. Medians of steps after a warm-up, both in turn.
"""

import multiprocessing
import os
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, WARM_UP, ROUNDS = 10, 3, 3


def step_seconds(threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ids = torch.randint(400, (32, 72))
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def keep_busy() -> None:
    while True:
        pass


def main() -> None:
    cores = os.cpu_count() or 1
    for beside in ("alone", "beside a busy core"):
        busy = multiprocessing.Process(target=keep_busy, daemon=True)
        if beside != "alone":
            busy.start()
        pairs = [(step_seconds(1), step_seconds(cores)) for _ in range(ROUNDS)]
        one, all_cores = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{beside}: one thread {1e3 * one:.0f} ms a step, {cores} threads {1e3 * all_cores:.0f} ms "
            f"({all_cores / one:.2f} of one thread's)"
        )
        if busy.is_alive():
            busy.terminate()


if __name__ == "__main__":
    main()
