"""Sound and frames of one clip, out of a video or audio file, in one pass over its packets.

- `read_clip` seeks to a segment and gives mono sound at one rate and the frames nearest to the asked times,
- `read_audio` gives the whole sound of a file at its own rate,
- `encode_flac` and `encode_jpeg` give the bytes that shards hold.

Everything that can be wrong with a file is a `ClipError` with one of `REASONS`.
"""

import io
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from PIL import Image

SAMPLING_RATE = 16_000
TOLERANCE = 0.5  # seconds that a track may fall short of the asked end: cutters and encoders round
MAX_PIXELS = 8192 * 8192  # of one coded frame
MAX_VIDEO_BYTES = 512 << 20  # of compressed video in one clip
SILENCE = 1e-4  # peak of full scale, about three steps of 16 bits

REASONS = {
    "missing": "no such file",
    "outside_source": "the path or link leads out of the source folder",
    "not_a_file": "a folder, pipe, socket or device",
    "empty": "zero bytes, or zero seconds",
    "bad_index": "a line of the index cannot be read",
    "damaged": "not a media file, or its data cannot be decoded",
    "truncated": "data ends before the length that the file declares",
    "too_short": "the file, or one of its tracks, is shorter than the asked clip",
    "no_audio": "no audio track",
    "no_video": "no video track",
    "unsupported_codec": "no decoder for a track",
    "silent": "sound that is silence throughout",
    "too_large": "frames, or the clip's data, beyond the limits",
    "timeout": "not decoded within the time limit",
    "out_of_memory": "not decoded within the memory limit",
    "crashed": "the decoder crashed",
}

# Containers that hold media themselves. Playlists (hls, concat, dash, sdp) would let a file name other files or hosts.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,wav,w64,mp3,flac,aac,aiff,au,caf,mxf,ac3,amr,gif,"
    "rm,swf,nut,mpegvideo,ivf"
)
_PREROLL = 0.25  # seconds of sound decoded before the start: audio frames overlap, and the first after a seek is wrong
_CONTIGUOUS = 0.01  # seconds: smaller steps between audio frames are rounding of timestamps, larger ones are gaps
_INTERLEAVING = 10.0  # seconds by which one track may lag behind the other inside a file


class ClipError(ValueError):
    """A clip that cannot be read as asked.

    Args:
        reason: a key of `REASONS`.
        detail: what was found, for a reader of `failures.jsonl`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail or REASONS[self.reason]}"


@dataclass
class Clip:
    """What `read_clip` gives.

    Attributes:
        waveform: mono sound, float32 [samples], in [-1, 1] but for overshoot of lossy codecs.
        sampling_rate: of the waveform, in Hz.
        frames: upright RGB pictures, in order of time.
        frame_times: when each frame is shown, in seconds from the clip's start.
    """

    waveform: np.ndarray
    sampling_rate: int
    frames: list[Image.Image]
    frame_times: list[float]


def read_clip(
    source: str | os.PathLike | bytes,
    start: float = 0.0,
    end: float | None = None,
    frames: int = 10,
    frame_size: int | None = 336,
    sampling_rate: int | None = SAMPLING_RATE,
    allow_short: bool = False,
) -> Clip:
    """Reads a segment of a media file: its sound and evenly spaced frames.

    The file is demuxed once. Frames are picked from the packets' timestamps, and only what they need is decoded.

    Args:
        source: path, fsspec URL, or the file's bytes.
        start: of the segment, in seconds.
        end: of the segment, in seconds; None for the end of the file.
        frames: how many; frame i is the one nearest to `start + i * length / frames`. 0 needs no video track.
        frame_size: the shorter side of larger frames is reduced to this many pixels; None keeps their size.
        sampling_rate: in Hz; None keeps the file's. All channels are mixed down as `ffmpeg -ac 1` does.
        allow_short: takes what there is of a segment that ends after the file does; otherwise that is an error.

    Returns:
        The clip.

    Raises:
        ClipError: if the file cannot be read as asked.
        ValueError: if the arguments make no sense.
    """
    if not start >= 0 or (end is not None and not end > start) or frames < 0:
        raise ValueError(f"expected 0 <= start < end and frames >= 0, got {start=}, {end=}, {frames=}")
    with _open(source) as container:
        audio = _first(container.streams.audio, "no_audio")
        video = _first(container.streams.video, "no_video") if frames else None
        origin = max(0, container.start_time or 0) / av.time_base
        declared = {stream: _declared_end(stream, container, origin) for stream in (audio, video) if stream}
        end = _clip_end(start, end, declared, allow_short)
        packets, track = _demux(container, audio, video, start, end, origin)
        end = start + track.end if np.isinf(end) else end  # a live recording, whose length none has noted
        _check_reach(track.end, end - start, declared[audio] - start, "sound")
        pictures: list[tuple[float, Image.Image]] = []
        if video:
            last = max((packet.pts + (packet.duration or 0) for packet in packets if _usable(packet)), default=None)
            reach = -start if last is None else float(last * video.time_base) - origin - start
            _check_reach(reach, end - start, declared[video] - start, "video")
            wanted = [start + origin + i * (end - start) / frames for i in range(frames)]
            pictures = _decode_frames(video, packets, wanted, frame_size)
    waveform = track.waveform()
    if not len(waveform):
        raise ClipError("empty", "the audio track holds no sample in this segment")
    if not np.isfinite(waveform).all():
        raise ClipError("damaged", "the sound has samples that are not finite")
    if np.abs(waveform).max() < SILENCE:
        raise ClipError("silent")
    rate = sampling_rate or track.rate
    if rate != track.rate:
        waveform = soxr.resample(waveform, track.rate, rate)
    return Clip(waveform, rate, [image for _, image in pictures], [time - start - origin for time, _ in pictures])


def read_audio(source: str | os.PathLike | bytes) -> tuple[np.ndarray, int]:
    """Reads the whole sound of an audio or video file.

    Args:
        source: path, fsspec URL, or the file's bytes.

    Returns:
        Mono waveform, float32 [samples], and its sampling rate in Hz.

    Raises:
        ClipError: if it cannot be read.
    """
    clip = read_clip(source, frames=0, sampling_rate=None)
    return clip.waveform, clip.sampling_rate


def encode_flac(waveform: np.ndarray, sampling_rate: int = SAMPLING_RATE) -> bytes:
    """Encodes mono sound [samples], clipped to [-1, 1], as 16-bit FLAC."""
    buffer = io.BytesIO()
    samples = np.rint(np.clip(waveform, -1.0, 1.0) * 32767).astype(np.int16)
    soundfile.write(buffer, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encodes a picture as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@contextmanager
def _open(source: str | os.PathLike | bytes) -> Iterator[Any]:
    """Opens a media file of a known container; whatever goes wrong inside the block becomes a `ClipError`."""
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "fflags": "+genpts"}
    try:
        if isinstance(source, bytes):
            if not source:
                raise ClipError("empty", "zero bytes")
            with av.open(io.BytesIO(source), options=options) as container:
                yield container
        elif "://" in (path := os.fspath(source)):
            import fsspec

            with fsspec.open(path, "rb") as file, av.open(file, options=options) as container:
                yield container
        else:
            with av.open(_regular_file(path), options=options) as container:
                yield container
    except FileNotFoundError as error:
        raise ClipError("missing", str(source)) from error
    except (av.error.DecoderNotFoundError, av.codec.codec.UnknownCodecError) as error:
        raise ClipError("unsupported_codec", str(error)) from error
    except MemoryError as error:
        raise ClipError("out_of_memory") from error
    except (av.FFmpegError, OSError) as error:
        raise ClipError("damaged", getattr(error, "strerror", None) or str(error)) from error


def _regular_file(path: str) -> str:
    status = os.stat(path)  # noqa: PTH116  (a Path would be made for this alone)
    if not stat.S_ISREG(status.st_mode):
        raise ClipError("not_a_file", path)
    if not status.st_size:
        raise ClipError("empty", "zero bytes")
    return os.path.abspath(path)  # noqa: PTH100  (absolute, so that ffmpeg sees no protocol in its name)


def _first(streams: Sequence[Any], reason: str) -> Any:
    for stream in streams:
        if stream.disposition & stream.disposition.attached_pic:  # cover art of a music file
            continue
        if stream.codec_context is None:
            raise ClipError("unsupported_codec", f"{stream.type} track {stream.index}")
        if stream.type == "video":
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise ClipError("too_large", f"frames of {width} x {height} pixels")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes that change on the way
        stream.codec_context.thread_count = 1  # one process a core reads clips: more threads would only fight
        return stream
    raise ClipError(reason)


def _declared_end(stream: Any, container: Any, origin: float) -> float:
    """The end of a track by the file's own word, in seconds; infinite if it says nothing."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - origin
    return container.duration / av.time_base if container.duration else float("inf")


def _clip_end(start: float, end: float | None, declared: dict[Any, float], allow_short: bool) -> float:
    shortest = min(declared.values())
    if shortest <= 0:
        raise ClipError("empty", "zero seconds")
    if start >= shortest:
        raise ClipError("too_short", f"the clip starts at {start:.3f} s, the file ends at {shortest:.3f} s")
    if end is None:
        return shortest
    if shortest < end - TOLERANCE:
        if not allow_short:
            raise ClipError("too_short", f"the clip ends at {end:.3f} s, the file at {shortest:.3f} s")
        return shortest
    return end


def _check_reach(reach: float, length: float, declared: float, what: str) -> None:
    """Compares what a track held, in seconds from the clip's start, with the clip and with the file's own word."""
    if reach >= min(length, declared) - TOLERANCE:
        return
    if np.isfinite(declared):
        raise ClipError("truncated", f"{what} ends after {max(reach, 0):.3f} s, declared are {declared:.3f} s")
    if np.isfinite(length):
        raise ClipError("too_short", f"{what} ends after {max(reach, 0):.3f} s of {length:.3f} s")


class _Track:
    """Decoded sound of a segment, placed by its timestamps."""

    def __init__(self, start: float, length: float):
        self.start, self.length = start, length  # of the segment, in seconds of the file's clock
        self.rate = 0
        self.end = 0.0  # seconds from the segment's start
        self._pieces: list[tuple[int, np.ndarray]] = []  # (sample offset, samples)
        self._cursor: int | None = None
        self._mixer: av.AudioResampler | None = None

    def add(self, frame: av.AudioFrame) -> None:
        if self._mixer is None:
            self.rate = frame.sample_rate
            # Weights of the channels add up to 1 for integers only; 32 bits lose nothing.
            self._mixer = av.AudioResampler(format="s32", layout="mono", rate=self.rate)
        if frame.pts is None:
            offset = self._cursor or 0
        else:
            offset = round((float(frame.pts * frame.time_base) - self.start) * self.rate)
        if self._cursor is not None and abs(offset - self._cursor) <= _CONTIGUOUS * self.rate:
            offset = self._cursor
        frame.pts = None  # the mixer would fill gaps its own way
        try:
            mixed = self._mixer.resample(frame)
        except ValueError as error:
            raise ClipError("damaged", f"the sound changes its format on the way: {error}") from error
        for piece in mixed:
            samples = (piece.to_ndarray()[0] * 2.0**-31).astype(np.float32)
            self._pieces.append((offset, samples))
            offset += len(samples)
        self._cursor = offset
        self.end = max(self.end, min(offset / self.rate, self.length))

    def waveform(self) -> np.ndarray:
        total = round(self.end * self.rate)
        waveform = np.zeros(total, np.float32)
        for offset, samples in self._pieces:
            first, last = max(offset, 0), min(offset + len(samples), total)
            if first < last:
                waveform[first:last] = samples[first - offset : last - offset]
        return waveform


def _demux(
    container: Any, audio: Any, video: Any | None, start: float, end: float, origin: float
) -> tuple[list[Any], _Track]:
    """Collects the video packets of a segment, from a keyframe on, and decodes its sound."""
    packets, track = _demux_from(container, audio, video, start, end, origin)
    keyframes = [packet.pts for packet in packets if packet.is_keyframe]
    late = video and (not keyframes or float(min(keyframes) * video.time_base) > start + origin)
    if start > 0 and (late or track.end == 0):  # the container's index is missing or wrong: read from the beginning
        container.seek(0)
        packets, track = _demux_from(container, audio, video, start, end, origin, seek=False)
    return packets, track


def _demux_from(
    container: Any, audio: Any, video: Any | None, start: float, end: float, origin: float, seek: bool = True
) -> tuple[list[Any], _Track]:
    if start > 0 and seek:
        container.seek(max(0, int((start - _PREROLL + origin) * av.time_base)))
    track = _Track(start + origin, end - start)
    packets: list[Any] = []
    size = 0
    reached = {stream: False for stream in (audio, video) if stream}
    for packet in container.demux(list(reached)):
        stream = packet.stream
        stamp = packet.pts if packet.dts is None else packet.dts  # matroska leaves out some of the latter
        if stamp is None and packet.size:
            raise ClipError("damaged", f"the {stream.type} track has no timestamps")
        time = None if stamp is None else float(stamp * packet.time_base) - origin
        if time is not None:
            reached[stream] = reached[stream] or time >= end
            if all(reached.values()) or time >= end + _INTERLEAVING:
                break
        if stream is audio:
            if time is None or start - _PREROLL <= time < end:  # a packet without time flushes the decoder
                for frame in packet.decode():
                    track.add(frame)
        elif time is not None and packet.pts is not None and time <= end:
            size += packet.size
            if size > MAX_VIDEO_BYTES:
                raise ClipError("too_large", f"more than {MAX_VIDEO_BYTES >> 20} MiB of compressed video")
            if packet.is_keyframe and packet.pts * packet.time_base <= start + origin:
                packets.clear()  # nothing before this keyframe is needed
                size = packet.size
            packets.append(packet)
    return packets, track


def _usable(packet: Any) -> bool:
    return not (packet.is_discard or packet.is_corrupt)  # edit lists mark frames that are decoded but never shown


def _decode_frames(
    video: Any, packets: list[Any], wanted: Sequence[float], frame_size: int | None
) -> list[tuple[float, Image.Image]]:
    """Decodes the frames nearest to the wanted times, and beside them only what they depend on."""
    first_key = next((i for i, packet in enumerate(packets) if packet.is_keyframe), None)
    if first_key is None:
        raise ClipError("damaged", "no keyframe in this segment")
    # What is shown before the first keyframe but comes after it depends on pictures that are not here.
    earliest = packets[first_key].pts
    shown = {packet.pts: i for i, packet in enumerate(packets) if _usable(packet) and packet.pts >= earliest}
    if not shown:
        raise ClipError("empty", "the video track holds no frame in this segment")
    stamps = sorted(shown)
    nearest = [_nearest(stamps, time / float(video.time_base)) for time in wanted]
    images: dict[int, Image.Image] = {}
    codec = video.codec_context
    chosen = sorted(set(nearest), key=shown.__getitem__)  # in order of decoding
    position = -1  # of the last packet that was fed
    for target in chosen:
        if target in images:
            continue
        keyframe = max(i for i in range(shown[target] + 1) if packets[i].is_keyframe and packets[i].pts <= target)
        if keyframe > position:
            codec.flush_buffers()
            position = keyframe - 1
        while target not in images and position + 1 < len(packets):
            position += 1
            packet = packets[position]
            codec.skip_frame = "DEFAULT" if packet.pts in nearest else "NONREF"
            _keep(codec.decode(packet), nearest, images, frame_size)
        if target not in images:  # the last packet is in: what the decoder holds back comes out
            _keep(codec.decode(None), nearest, images, frame_size)
        if target not in images:
            raise ClipError("damaged", f"the frame at {float(target * video.time_base):.3f} s does not decode")
    return [(float(stamp * video.time_base), images[stamp]) for stamp in nearest]


def _nearest(stamps: Sequence[int], time: float) -> int:
    i = bisect_left(stamps, time)
    return min(stamps[max(i - 1, 0) : i + 1], key=lambda stamp: abs(stamp - time))


def _keep(decoded: list[Any], wanted: Sequence[int], images: dict[int, Image.Image], frame_size: int | None) -> None:
    for frame in decoded:
        if frame.pts in wanted and frame.pts not in images:
            if frame.is_corrupt:
                raise ClipError("damaged", f"the frame at {frame.time:.3f} s is corrupt")
            images[frame.pts] = _upright(frame, frame_size)


def _upright(frame: Any, frame_size: int | None) -> Image.Image:
    """Turns a decoded frame into RGB of the asked size, rotated as its display matrix says."""
    width, height = frame.width, frame.height
    if frame_size and min(width, height) > frame_size:
        scale = frame_size / min(width, height)
        width, height = round(width * scale), round(height * scale)
    pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))
