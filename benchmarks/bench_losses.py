"""Alignment losses against the per-pair loop they replace: time, memory, growth.

    python benchmarks/bench_losses.py            # everything, about three minutes on two cores
    python benchmarks/bench_losses.py --quick    # time per pair only

Each round runs every variant once, so that whatever else the machine does meets all of them; figures are medians over
rounds after a warm-up. Time is forward and backward at B = 8, n = 512, m = 576, d = 1024, divided by B. Image tokens
need no gradient, as in training. Memory is the peak of the resident set above what it is with the tokens in place,
each case in a process of its own; the gradient of the audio tokens is part of it. There malloc is told to give large
blocks back at once (MALLOC_MMAP_THRESHOLD_), so that the figure is what is in use: left alone, glibc keeps what each
solver thread has freed, and B = 8 of `exact` shows 70 to 110 MiB where 31 are in use.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ot
import torch
import torch.nn.functional as F

from trainers.losses import attentive_transport, contrastive, mean_tokens, mmd, optimal_transport

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


def medians(losses, audio, image, rounds):
    """Median seconds of each loss, interleaved."""
    audio = audio.requires_grad_()
    for loss in losses.values():
        step(loss, audio, image)
    times = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, audio, image)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def print_times(kind, rounds):
    audio, image = make_tokens(kind)
    seconds = medians(variants(), audio, image, rounds)
    reference = None
    print(f"\n{kind} tokens, B={BATCH} n={N} m={M} d={D}, {torch.get_num_threads()} threads\n")
    print(f"{'loss':32}{'ms a pair':>10}{'x loop':>9}")
    for name, value in seconds.items():
        if name.startswith("loop"):
            reference = value
        print(f"{name:32}{1e3 * value / BATCH:10.2f}{reference / value:9.2f}")
    print(f"sinkhorn takes {seconds['sinkhorn'] / seconds['exact']:.2f} of the time of exact")


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
        seconds = medians(losses, *make_tokens("normal", **case), rounds)
        label = ", ".join(f"{'B' if name == 'batch' else name} = {value}" for name, value in case.items())
        print(f"{label:24}" + "".join(f"{1e3 * value:12.1f}" for value in seconds.values()))


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
    parser.add_argument("--quick", action="store_true", help="time per pair only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=2, metavar=("LOSS", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # ot.emd2 and Sinkhorn warn on stderr once a call
    if options.memory_of:
        return measure_memory(options.memory_of[0], int(options.memory_of[1]))
    print_times("normal", options.rounds)
    if not options.quick:
        print_times("clustered", options.rounds)
        print()
        print_accuracy("normal")
        print_accuracy("clustered")
        print_memory()
        print_growth(3)


if __name__ == "__main__":
    main()
