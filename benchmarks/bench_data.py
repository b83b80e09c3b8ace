"""How fast clips are prepared and streamed, and what grows with their number.

    python benchmarks/bench_data.py [VIDEO ...] [--records 100000]

Preparing is compared with the plain way: one ffmpeg process a clip for the sound and one for the frames, both with
the same output (mono 16 kHz FLAC; ten JPEG frames, shorter side 336). Everything of a comparison is pinned to one
CPU core and taken in turns in one run, after a warm-up; medians. Streaming is compared with `datasets`. Without ffmpeg
or videos, clips are generated and our figures stand alone.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets_scripts import prepare as prepare_module
from datasets_scripts.clips import ClipRequest
from datasets_scripts.prepare import prepare
from datasets_scripts.records import Limits, Settings
from datasets_scripts.shards import open_shards
from tests.datasets_scripts.workloads import small_record

SIZES = ((320, 240), (640, 360), (1280, 720))


def make_clip(path: Path, width: int, height: int) -> Path:
    """Ten seconds of moving texture at 25 frames a second and noise, as h264 and AAC with keyframes every 5 s."""
    generator = np.random.default_rng(0)
    texture = np.kron(generator.integers(0, 255, (height // 8 + 64, width // 8 + 64, 3)), np.ones((8, 8, 1))).astype(
        np.uint8
    )
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.gop_size = 125
        audio = container.add_stream("aac", rate=44_100, layout="stereo")
        packets = []
        for i in range(250):
            view = texture[i : i + height, 2 * i : 2 * i + width]
            packets += video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(view), "rgb24"))
        packets += video.encode(None)
        samples = generator.uniform(-0.3, 0.3, (2, 441_000)).astype(np.float32)
        for first in range(0, 441_000, 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples[:, first : first + 1024]), "fltp", "stereo"
            )
            frame.rate, frame.pts, frame.time_base = 44_100, first, Fraction(1, 44_100)
            packets += audio.encode(frame)
        packets += audio.encode(None)
        container.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))
    return path


def with_ffmpeg(videos: list[Path], folder: Path) -> None:
    """The plain way: two processes a clip."""
    size = "scale=w='if(gt(iw,ih),-2,min(336,iw))':h='if(gt(iw,ih),min(336,ih),-2)'"
    for i, video in enumerate(videos):
        read = ["ffmpeg", "-v", "error", "-y", "-i", str(video), "-t", "10"]
        subprocess.run([*read, "-vn", "-ac", "1", "-ar", "16000", str(folder / f"{i}.flac")], check=True)
        frames = ["-an", "-vf", f"fps=1,{size}", "-frames:v", "10", "-q:v", "2", str(folder / f"{i}.%02d.jpg")]
        subprocess.run([*read, *frames], check=True)


def with_prepare(videos: list[Path], folder: Path) -> None:
    """Ours, with a worker a core."""
    requests = [ClipRequest(str(i), str(video), "/", end=10.0) for i, video in enumerate(videos)]
    workers = len(os.sched_getaffinity(0))
    manifest = prepare(lambda: requests, folder, Settings(), Limits(), workers, progress=False)
    assert manifest["rows"] == len(videos), manifest["failures"]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def processor_seconds(call: Callable[[], object]) -> float:
    """What a call takes of the processor, in this process and in its children: other programs do not disturb it."""
    before = os.times()
    call()
    return sum(after - then for after, then in zip(os.times()[:4], before[:4], strict=True))


def compare_preparing(name: str, video: Path, count: int, rounds: int) -> None:
    """Prints clips per second on all cores, and processor time a clip; ours and ffmpeg's, in turns."""
    ways = {"ours": with_prepare}
    if shutil.which("ffmpeg"):
        ways["ffmpeg"] = with_ffmpeg
    rates: dict[str, list[float]] = {way: [] for way in ways}
    costs: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):  # the first is the warm-up
        for way, call in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                cost = processor_seconds(lambda: call([video] * count, Path(folder)))  # noqa: B023
                if round_:
                    rates[way].append(count / (time.perf_counter() - started))
                    costs[way].append(cost / count)
    rate = {way: statistics.median(values) for way, values in rates.items()}
    cost = {way: statistics.median(values) for way, values in costs.items()}
    for way in ways:
        print(f"{name:>28} {way:>7}: {rate[way]:6.2f} clips/s, {cost[way]:6.3f} s of a processor a clip")
    if "ffmpeg" in ways:
        print(
            f"{name:>28}   ratio: {rate['ours'] / rate['ffmpeg']:6.2f} of clips/s, "
            f"{cost['ffmpeg'] / cost['ours']:6.2f} of processor time"
        )


def peak_while(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call takes, and MiB that this process has at most while it runs (sampled ten times a second)."""
    import threading

    process, done = psutil.Process(), threading.Event()
    most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        duration = seconds(call)
    finally:
        done.set()
        thread.join()
    return duration, most / 2**20


def exhaust(rows: object) -> int:
    return sum(1 for _ in rows)  # type: ignore[attr-defined]


def growth(records: int, folder: Path) -> None:
    """Prints time and memory of preparing and of streaming over more and more records, without decoding."""
    from datasets_scripts.streaming import ShardStream  # brings torch, which the children would import, too

    read_record, prepare_module.read_record = prepare_module.read_record, small_record
    print(f"records without decoding{'prepare':>22}{'memory':>12}{'streaming':>18}{'memory':>12}")
    for count in (records // 100, records // 10, records):
        output = folder / str(count)

        def requests(count: int = count) -> itertools.chain:
            return (ClipRequest(f"{i:08d}x", "", "") for i in range(count))  # type: ignore[return-value]

        taken, memory = peak_while(lambda: prepare(requests, output, Settings(), Limits(), 2, progress=False))  # noqa: B023
        streamed, held = peak_while(lambda: exhaust(ShardStream(output)))  # noqa: B023
        print(f"{count:>24}{count / taken:>16.0f} /s{memory:>8.0f} MiB{count / streamed:>15.0f} /s{held:>8.0f} MiB")
    prepare_module.read_record = read_record
    print()


def compare_streaming(video: Path, folder: Path, rounds: int) -> None:
    """Prints rows per second of real records, ours and those of `datasets`, both shuffled with a buffer of 256."""
    from datasets_scripts.streaming import ShardStream

    requests = [ClipRequest(str(i), str(video), "/", end=10.0) for i in range(256)]
    prepare(lambda: requests, folder, Settings(shard_size=64), Limits(), progress=False)
    ways = {
        "ours": lambda: exhaust(ShardStream(folder)),
        "datasets": lambda: exhaust(open_shards(folder, streaming=True).shuffle(seed=0, buffer_size=256)),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, call in ways.items():
            duration = seconds(call)
            if round_:
                taken[way].append(len(requests) / duration)
    rates = {way: statistics.median(values) for way, values in taken.items()}
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir()) / len(requests)
    print(f"\nstreaming, {size / 1024:.0f} KiB a record: ours {rates['ours']:.0f} rows/s", end="")
    print(f", datasets {rates['datasets']:.0f}, ratio {rates['ours'] / rates['datasets']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=16, help="clips in one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=100_000, help="for the growth; 0 leaves it out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generated = [make_clip(folder / f"{w}x{h}.mp4", w, h) for w, h in SIZES]
        if not shutil.which("ffmpeg"):
            print("ffmpeg is not installed: our figures stand alone")
        if options.records:
            growth(options.records, folder / "growth")
        for video in [*generated, *(video.resolve() for video in options.videos)]:
            compare_preparing(video.name, video, options.count, options.rounds)
        compare_streaming(generated[0], folder / "streaming", options.rounds)


if __name__ == "__main__":
    main()
