"""Search over a large sound library against the bare matrix product and top-k, and FAISS beside them.

    python benchmarks/bench_search.py [--files 1000000] [--width 512] [--rounds 9]

Saves a random library (2 GB for a million files), loads it as `vipant search` does, and finds the top 10 for single
queries. Each round runs every way once; figures are medians over rounds after a warm-up. Loading is timed on an index
whose files the operating system has just written, thus with a warm cache.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch

from modeling_vipant.library import TABLE, SoundLibrary


def make_library(files: int, width: int) -> SoundLibrary:
    """Random unit vectors with a table of plausible paths."""
    embeddings = torch.nn.functional.normalize(torch.randn(files, width), dim=1).numpy()
    numbers = np.arange(files)
    columns = [
        pa.array([f"folder-{i // 1000:05d}/sound-{i:08d}.wav" for i in numbers]),
        pa.array(numbers + 44),
        pa.array(numbers + 1_700_000_000_000_000_000),
        pa.array(np.full(files, 10.0)),
    ]
    return SoundLibrary(embeddings, pa.Table.from_arrays(columns, schema=TABLE), "random", "0")


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        library = make_library(args.files, args.width)
        library.save(Path(folder))
        bare = torch.from_numpy(library.embeddings)
        loads = [timed(lambda: SoundLibrary.load(Path(folder))) for _ in range(args.rounds)]
        print(f"load: {statistics.median(loads):.3f} s (worst {max(loads):.3f} s)")

        library = SoundLibrary.load(Path(folder))
        ways = {
            "matrix product + top-k": lambda query: (bare @ query).topk(10),
            "SoundLibrary.search": lambda query: library.search(query, 10),
        }
        try:
            import faiss

            index = faiss.IndexFlatIP(args.width)
            index.add(bare.numpy())
            faiss.omp_set_num_threads(torch.get_num_threads())
            ways["faiss.IndexFlatIP"] = lambda query: index.search(query[None].numpy(), 10)
        except ImportError:
            print("faiss is not installed: left out")
        first = timed(lambda: library.search(bare[0], 10))
        print(f"first search, which maps the file into memory: {first:.3f} s")

        seconds = {name: [] for name in ways}
        for i in range(args.rounds + 1):
            query = torch.nn.functional.normalize(bare[i] + 0.05 * torch.randn(args.width), dim=0)
            for name, way in ways.items():
                seconds[name].append(timed(lambda way=way, query=query: way(query)))
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        ratios = {
            name: statistics.median(
                a / b for a, b in zip(times[1:], seconds["matrix product + top-k"][1:], strict=True)
            )
            for name, times in seconds.items()
        }
        for name, median in medians.items():
            print(f"{name:24s} {1000 * median:8.1f} ms  {ratios[name]:.2f}x")


if __name__ == "__main__":
    main()
