"""Alignment losses against the per-pair loop they replace: time, memory, growth.

    python benchmarks/bench_losses.py                    # everything, about four minutes on two cores
    python benchmarks/bench_losses.py --quick            # times only
    python benchmarks/bench_losses.py --problems 1000    # exact transport of random problems against ot.emd

Each round runs every variant once, so that whatever else the machine does meets all of them; figures are medians over
rounds after a warm-up, of the time on the clock and of the processor time of all threads. Time is forward and backward
at B = 8, n = 512, m = 576, d = 1024, divided by B. Image tokens need no gradient, as in training.

Memory is the peak of the resident set above what it is with the tokens in place, each case in a process of its own;
the gradient of the audio tokens is part of it. There malloc is told to give large blocks back at once
(MALLOC_MMAP_THRESHOLD_), so that the figure is what is in use: left alone, glibc keeps what each solver thread has
freed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import ot
import torch
import torch.nn.functional as F

from tests.trainers.losses.transport_problems import TOKENS, WEIGHTS, checked_solution, random_problem
from trainers.losses import attentive_transport, contrastive, exact_solver, mean_tokens, mmd, optimal_transport
from trainers.losses.common import joint_tokens, squared_distances
from trainers.losses.exact_solver import entropic_potentials, solve_exactly

BATCH, N, M, D = 8, 512, 576, 1024


def make_tokens(kind, batch=BATCH, n=N, m=M, d=D):
    """Random tokens: one Gaussian a set, or twenty clusters whose weights differ between the sets."""
    torch.manual_seed(0)
    if kind == "normal":
        return torch.randn(batch, n, d), 0.9 * torch.randn(batch, m, d) + 0.1
    centres = torch.randn(batch, 20, d)
    audio, image = (centres[:, torch.randint(20, (size,))] + 0.3 * torch.randn(batch, size, d) for size in (n, m))
    return audio, 1.1 * image


def loop_exact(audio, image):
    n, m = audio.shape[1], image.shape[1]
    a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    return torch.stack([ot.emd2(a, b, ot.dist(x, y)) for x, y in zip(audio, image, strict=True)])


def loop_mmd(audio, image):
    losses = []
    for x, y in zip(audio, image, strict=True):
        z, n = torch.cat((x, y)), len(x)
        square = z.square().sum(1)
        distance = (square[:, None] + square - 2 * z @ z.T).clamp(min=0)
        bandwidth = distance.detach().sum() / (len(z) ** 2 - len(z))
        kernel = sum(torch.exp(-distance / (bandwidth * 2**k)) for k in range(-2, 3))
        losses.append(kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean())
    return torch.stack(losses)


def loop_contrastive(audio, image):
    x, y = (F.normalize(tokens.mean(1), dim=1) for tokens in (audio, image))
    logits, target = x @ y.T / 0.05, torch.arange(len(x))
    return (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2


def attentive(audio, image):
    """With weights that take a gradient but cost nothing: the scorer is a model, not the loss."""
    weights = (tokens[..., 0].softmax(1).requires_grad_() for tokens in (audio.detach(), image))
    return attentive_transport(audio, image, *weights, 500.0)


def variants():
    """Name -> loss of (audio, image); the plain loop stands before what replaces it."""
    return {
        "loop ot.dist + ot.emd2": loop_exact,
        "exact": optimal_transport,
        "sinkhorn": lambda a, i: optimal_transport(a, i, solver="sinkhorn"),
        "unbalanced": lambda a, i: optimal_transport(a, i, solver="unbalanced"),
        "attentive (exact)": attentive,
        "loop mmd, five exp": loop_mmd,
        "mmd": mmd,
        "loop contrastive": loop_contrastive,
        "contrastive": lambda a, i: contrastive(mean_tokens(a), mean_tokens(i), 20.0),
    }


def step(loss, audio, image):
    audio.grad = None
    loss(audio, image).mean().backward()


class Seconds(NamedTuple):
    wall: float
    processor: float


def medians(functions, rounds):
    """Median times of each function, interleaved, after a warm-up."""
    times = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            if round_number:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: Seconds(*map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


def loss_medians(losses, audio, image, rounds):
    audio = audio.requires_grad_()
    return medians({name: partial(step, loss, audio, image) for name, loss in losses.items()}, rounds)


def print_table(seconds, first_column, divisor=1):
    """Times, and how many times as fast as the last plain way above."""
    print(f"{first_column:32}{'ms':>9}{'x plain':>9}{'ms of processor':>18}{'x plain':>9}")
    plain = None
    for name, value in seconds.items():
        if name.startswith(("loop", "ot.emd")):
            plain = value
        columns = (
            f"{1e3 * own / divisor:{width}.2f}{reference / own:9.2f}"
            for own, reference, width in zip(value, plain, (9, 18), strict=True)
        )
        print(f"{name:32}" + "".join(columns))


def print_times(kind, rounds):
    audio, image = make_tokens(kind)
    print(f"\n{kind} tokens, B={BATCH} n={N} m={M} d={D}, {torch.get_num_threads()} threads, a pair\n")
    print_table(loss_medians(variants(), audio, image, rounds), "loss", BATCH)


def print_solver(kind, rounds):
    """The exact solver without cost matrix and gradients, on one thread, against POT's on all arcs."""
    audio, image = make_tokens(kind, 1)
    joint, _ = joint_tokens(audio, image, None, None, torch.float32)
    cost = squared_distances(joint[:, :N], joint[:, N:])
    weights = {"uniform": (torch.full((1, N), 1 / N), torch.full((1, M), 1 / M))}
    weights["attentive"] = tuple(torch.softmax(0.5 * torch.randn(1, size), 1) for size in (N, M))
    functions = {}
    for name, (a, b) in weights.items():
        arrays = *(w[0].double().numpy() for w in (a, b)), cost[0].numpy()
        functions[f"ot.emd, {name}"] = partial(ot.emd, *arrays, numItermax=10**7, check_marginals=False)
        functions[f"shortlists, {name}"] = partial(
            lambda a, b, arrays: solve_exactly(*arrays, *entropic_potentials(cost, a, b)), a, b, arrays
        )
    print(f"\nexact solver alone, {kind} tokens, one pair, 1 thread\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print_table(medians(functions, rounds), "solver")
    torch.set_num_threads(threads)


def print_problems(count):
    """Random problems of 1 to 600 tokens a side, half of them with shortlists at any size; raises if one is wrong."""
    generator = np.random.default_rng(0)
    min_arcs, failed, slowest = exact_solver.MIN_ARCS, [], 0.0
    for seed in range(count):
        exact_solver.MIN_ARCS = int(generator.choice([0, min_arcs]))
        kind = str(generator.choice(TOKENS)), str(generator.choice(WEIGHTS)), 10.0 ** generator.integers(-6, 7)
        problem = random_problem(seed, 600, *kind)
        start = time.process_time()
        if checked_solution(*problem).shortlist_failed:
            failed.append((seed, *kind, problem[2].shape))
        slowest = max(slowest, time.process_time() - start)
    print(f"{count} random problems: all optimal, {len(failed)} of them by the simplex on all arcs")
    print(f"slowest {slowest:.2f} s of processor time, with the simplex on all arcs that checks it")
    for problem in failed:
        print("  no shortlist did:", *problem)


def print_accuracy(kind):
    """The entropic plan against the exact one."""
    audio, image = (tokens.requires_grad_() for tokens in make_tokens(kind))
    results = {}
    for solver in ("exact", "sinkhorn"):
        result = optimal_transport(audio, image, solver=solver, return_plan=True)
        gradients = torch.autograd.grad(result.loss.sum(), (audio, image))
        results[solver] = result, [g.flatten(1) for g in gradients]
    (exact, exact_grads), (near, near_grads) = results["exact"], results["sinkhorn"]
    excess = (near.loss / exact.loss - 1).abs().max().item()
    cosine = [F.cosine_similarity(x, y).min().item() for x, y in zip(exact_grads, near_grads, strict=True)]
    print(
        f"sinkhorn against exact, {kind} tokens: cost {100 * excess:.2f} % off, gradient cosine "
        f"{cosine[0]:.4f} (audio) {cosine[1]:.4f} (image), marginal error {near.marginal_error.max().item():.1e}"
    )


def print_growth(rounds):
    losses = {name: loss for name, loss in variants().items() if name in ("exact", "sinkhorn", "mmd")}
    print(f"\nms a step (not a pair) as one size grows\n\n{'':24}" + "".join(f"{name:>12}" for name in losses))
    cases = [{"batch": b} for b in (1, 2, 4, 8, 16)]
    cases += [{"n": n} for n in (128, 256, 512, 1024)] + [{"m": m} for m in (144, 288, 576, 1152)]
    for case in cases:
        seconds = loss_medians(losses, *make_tokens("normal", **case), rounds)
        label = ", ".join(f"{'B' if name == 'batch' else name} = {value}" for name, value in case.items())
        print(f"{label:24}" + "".join(f"{1e3 * value.wall:12.1f}" for value in seconds.values()))


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure_memory(name, batch):
    """Print the peak MiB of one step above the resident set before it."""
    loss = variants()[name]
    small = make_tokens("normal", 2, 16, 16)
    step(loss, small[0].requires_grad_(), small[1])  # libraries and thread pools
    audio, image = make_tokens("normal", batch)
    audio.requires_grad_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(loss, audio, image)
    print(resident("VmHWM") - before)


def print_memory():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    tokens = (N + M) * D * BATCH * 4 / 2**20
    print(f"\npeak MiB above the tokens; the tokens of B={BATCH} are {tokens:.0f} MiB\n")
    print(f"{'loss':32}{'B=1':>8}{f'B={BATCH}':>8}   (B={BATCH} - tokens) / B=1")
    for name in variants():
        command = [sys.executable, __file__, "--memory-of", name]
        one, many = (
            float(subprocess.run([*command, str(batch)], check=True, capture_output=True, text=True, env=env).stdout)
            for batch in (1, BATCH)
        )
        print(f"{name:32}{one:8.1f}{many:8.1f}   {(many - tokens) / one:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="times only")
    parser.add_argument("--problems", type=int, default=0, help="so many random problems instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=2, metavar=("LOSS", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # ot.emd2 and Sinkhorn warn on stderr once a call
    if options.memory_of:
        return measure_memory(options.memory_of[0], int(options.memory_of[1]))
    if options.problems:
        return print_problems(options.problems)
    for kind in ("normal", "clustered"):
        print_times(kind, options.rounds)
        print_solver(kind, options.rounds)
    if not options.quick:
        print()
        print_accuracy("normal")
        print_accuracy("clustered")
        print_memory()
        print_growth(3)


if __name__ == "__main__":
    main()
