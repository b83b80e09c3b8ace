"""Sound and frames of one clip, out of a video or audio file, in one pass over its packets.

- `read_clip` seeks to a segment and gives mono sound at one rate and the frames nearest to the asked times,
- `encode_sound` and `encode_jpeg` give the bytes that shards hold.

Everything that can be wrong with a file is a `ClipError` with one of `REASONS`.
"""

import io
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr
from PIL import Image

if TYPE_CHECKING:
    from modeling_dali import audio_io
else:  # by its path: a module of `modeling_dali` brings torch and transformers, 450 MB in every process that decodes
    _spec = spec_from_file_location("audio_io", Path(__file__).parents[1] / "modeling_dali" / "audio_io.py")
    audio_io = module_from_spec(_spec)
    _spec.loader.exec_module(audio_io)

ClipError, check_rate = audio_io.ClipError, audio_io.check_rate
SAMPLING_RATE = 16_000
MAX_VIDEO_BYTES = 512 << 20  # of compressed video in one clip
SILENCE = 1e-4  # peak of full scale, about three steps of 16 bits

_PREROLL = 0.25  # seconds of sound decoded before the start: audio frames overlap, and the first after a seek is wrong
_INTERLEAVING = 10.0  # seconds by which one track may lag behind the other inside a file


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
        sampling_rate: in Hz; None keeps the file's. Channels are mixed to their mean.
        allow_short: takes what there is of a segment that ends after the file does; otherwise that is an error.

    Returns:
        The clip.

    Raises:
        ClipError: if the file cannot be read as asked.
        ValueError: if the arguments make no sense.
    """
    if not start >= 0 or (end is not None and not end > start) or frames < 0:
        raise ValueError(f"expected 0 <= start < end and frames >= 0, got {start=}, {end=}, {frames=}")
    with audio_io.open_media(source) as container:
        audio = audio_io.first_stream(container.streams.audio, "no_audio")
        video = audio_io.first_stream(container.streams.video, "no_video") if frames else None
        origin = audio_io.origin_of(container)
        declared = {stream: audio_io.declared_end(stream, container, origin) for stream in (audio, video) if stream}
        end = _clip_end(start, end, declared, allow_short)
        packets, track = _demux(container, audio, video, start, end, origin)
        end = start + track.end if np.isinf(end) else end  # a live recording, whose length none has noted
        audio_io.check_reach(track.end, end - start, declared[audio] - start, "sound")
        pictures: list[tuple[float, Image.Image]] = []
        if video:
            last = max((packet.pts + (packet.duration or 0) for packet in packets if _usable(packet)), default=None)
            reach = -start if last is None else float(last * video.time_base) - origin - start
            audio_io.check_reach(reach, end - start, declared[video] - start, "video")
            wanted = [start + origin + i * (end - start) / frames for i in range(frames)]
            pictures = _decode_frames(video, packets, wanted, frame_size)
    waveform = track.waveform()
    audio_io.check_samples(waveform)
    if np.abs(waveform).max() < SILENCE:
        raise ClipError("silent")
    rate = sampling_rate or track.rate
    if rate != track.rate:
        waveform = soxr.resample(waveform, track.rate, rate)
    return Clip(waveform, rate, [image for _, image in pictures], [time - start - origin for time, _ in pictures])


def encode_sound(waveform: np.ndarray, sampling_rate: int = SAMPLING_RATE) -> bytes:
    """Encodes mono sound [samples] as 16-bit FLAC, or as 32-bit floating point WAV where it exceeds full scale."""
    buffer = io.BytesIO()
    if np.abs(waveform).max() > 1:
        soundfile.write(buffer, waveform, sampling_rate, format="WAV", subtype="FLOAT")
    else:
        # What was 16 bits before comes out bit for bit.
        samples = np.rint(waveform * 32768.0).clip(max=32767).astype(np.int16)
        soundfile.write(buffer, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encodes a picture as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _clip_end(start: float, end: float | None, declared: dict[Any, float], allow_short: bool) -> float:
    shortest = min(declared.values())
    if shortest <= 0:
        raise ClipError("empty", "zero seconds")
    if start >= shortest:
        raise ClipError("too_short", f"the clip starts at {start:.3f} s, the file ends at {shortest:.3f} s")
    if end is None:  # sound alone is read to its end, whatever the file says
        return shortest if len(declared) > 1 else float("inf")
    if shortest < end - audio_io.TOLERANCE:
        if not allow_short:
            raise ClipError("too_short", f"the clip ends at {end:.3f} s, the file at {shortest:.3f} s")
        return shortest
    return end


def _demux(
    container: Any, audio: Any, video: Any | None, start: float, end: float, origin: float
) -> tuple[list[Any], audio_io.Track]:
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
) -> tuple[list[Any], audio_io.Track]:
    if start > 0 and seek:
        container.seek(max(0, int((start - _PREROLL + origin) * av.time_base)))
    track = audio_io.Track(audio, start + origin, end - start)
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
            images[frame.pts] = audio_io.upright(frame, frame_size)
