"""Videos whose pictures carry their number and whose sound carries its time, so that a test can tell what it got."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COLUMNS, ROWS, BLOCK = 4, 4, 16  # each picture shows its number as 16 black or white blocks
PERIOD = 7.3  # seconds after which the sound repeats


def sound(times: np.ndarray) -> np.ndarray:
    """A chirp from 200 to 2000 Hz over and over, by its times in seconds."""
    t = np.mod(times, PERIOD)
    return 0.4 * np.sin(2 * np.pi * (200 * t + 900 / PERIOD * t**2))


def lag(waveform: np.ndarray, start: float, rate: int = 16_000) -> float:
    """By how many seconds the waveform comes later than the sound from `start` on would."""
    times = start + np.arange(len(waveform)) / rate
    expected = sound(times)
    size = 2 ** int(np.ceil(np.log2(2 * len(waveform))))
    correlation = np.fft.irfft(np.fft.rfft(waveform, size) * np.conj(np.fft.rfft(expected, size)), size)
    reach = rate // 2
    window = np.concatenate([correlation[-reach:], correlation[: reach + 1]])
    best = int(np.argmax(window))
    strength = window[best] / (np.linalg.norm(waveform) * np.linalg.norm(expected) + 1e-9)
    assert strength > 0.7, f"not the sound that was written (correlation {strength:.2f})"
    return (best - reach) / rate


def picture(number: int) -> np.ndarray:
    bits = (number >> np.arange(COLUMNS * ROWS)) & 1
    blocks = np.where(bits.reshape(ROWS, COLUMNS), 235, 20).astype(np.uint8)
    plane = np.kron(blocks, np.ones((BLOCK, BLOCK), np.uint8))
    return np.repeat(plane[:, :, None], 3, axis=2)


def number(image) -> int:
    """Reads the number off a picture, whatever its size."""
    grey = np.asarray(image.convert("L"), dtype=float)
    height, width = grey.shape
    rows = ((np.arange(ROWS) + 0.5) * height / ROWS).astype(int)
    columns = ((np.arange(COLUMNS) + 0.5) * width / COLUMNS).astype(int)
    bits = (grey[np.ix_(rows, columns)] > 128).reshape(-1)
    return int((bits << np.arange(COLUMNS * ROWS)).sum())


def make_video(
    path: Path,
    seconds: float = 10.0,
    fps: float = 10.0,
    video: str | None = "libx264",
    audio: str | None = "aac",
    rate: int = 44_100,
    layout: str = "stereo",
    rotation: int = 0,
    times: np.ndarray | None = None,
    gop: int = 25,
    amplitude: float = 1.0,
    audio_seconds: float | None = None,
    options: dict | None = None,
) -> np.ndarray:
    """Writes a video; picture i shows the number i. Gives the times of the pictures."""
    if times is None:
        times = np.arange(round(seconds * fps)) / fps
    with av.open(str(path), "w", options=options or {}) as container:
        if video:
            stream = container.add_stream(video, rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = (
                COLUMNS * BLOCK,
                ROWS * BLOCK,
                "rgb24" if video == "png" else "yuv420p",
            )
            stream.codec_context.gop_size = gop
            # AVI counts frames, all others may tell time in milliseconds.
            stream.codec_context.time_base = (
                1 / stream.codec_context.rate if ".avi" in str(path) else Fraction(1, 1000)
            )
            if video == "libx264":
                stream.options = {"preset": "veryfast"}
            elif video == "libvpx-vp9":
                stream.options = {"deadline": "realtime", "cpu-used": "8"}
            if rotation:
                stream.set_display_rotation(rotation)
        if audio:
            track = container.add_stream(audio, rate=rate, layout=layout)
        packets = []
        if video:
            for i, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(picture(i), "rgb24").reformat(format=stream.pix_fmt)
                frame.time_base = stream.codec_context.time_base
                frame.pts = round(Fraction(time) / frame.time_base)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if audio:
            total = round((audio_seconds or seconds) * rate)
            resampler = av.AudioResampler(track.format, track.layout, rate, frame_size=track.frame_size or 1024)
            samples = (amplitude * sound(np.arange(total) / rate)).astype(np.float32)
            for first in range(0, total, 1 << 16):
                piece = np.tile(samples[first : first + (1 << 16)], (track.layout.nb_channels, 1))
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "fltp", layout)
                frame.rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
                for part in resampler.resample(frame):
                    packets += track.encode(part)
            for part in resampler.resample(None):
                packets += track.encode(part)
            packets += track.encode(None)
        container.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))  # as players want them
    return times


def clock(path: Path) -> tuple[np.ndarray, float]:
    """By plain decoding from the beginning: when each picture is shown, and by how much the sound comes late.

    Containers without edit lists store both tracks later than they were written.
    """
    with av.open(str(path)) as container:
        origin = max(0, container.start_time) / av.time_base
        pictures = {number(frame.to_image()): frame.time - origin for frame in container.decode(video=0)}
    times = np.array([pictures[i] for i in range(max(pictures) + 1)])
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("s16", "mono", container.streams.audio[0].rate)
        samples = np.zeros(0)
        for frame in container.decode(audio=0):
            first = round((frame.time - origin) * frame.rate)
            piece = np.concatenate([part.to_ndarray()[0] for part in resampler.resample(frame)])
            samples = np.concatenate([samples, np.zeros(max(0, first - len(samples))), piece])
    return times, lag(samples / 32768, 0, frame.rate)
