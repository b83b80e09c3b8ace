"""The one way in for sound: whatever holds it becomes one mono waveform, at one rate, or a `ClipError` with a reason.

- `read_audio` takes a path, a URL, bytes, an open file, an array or a decoder; video files give their sound,
- `read_batch` takes everything that a feature extractor or a processor may be called with,
- `read_image` and `read_middle_frame` give pictures, the latter out of the middle of a video.

Files are decoded by FFmpeg, block by block. What a header says of the length is compared with what was decoded, and
never decides how much memory is taken. Channels are mixed to their mean, in floating point.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import av
import numpy as np
import soxr
from PIL import Image, ImageOps

MAX_SECONDS = 3600.0
MAX_SAMPLES = 1 << 27  # of one clip, a channel: 512 MiB
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz
MAX_AMPLITUDE = 2.0**31  # full scale of the widest PCM; far above it, power spectra overflow
MAX_CHANNELS = 32  # an array's axis that is longer than this holds samples, not channels
MAX_PIXELS = 8192 * 8192  # of a picture, or of one coded frame
MAX_SIDES = 100  # how much longer than the other a picture's side may be: processors scale the shorter one up
TOLERANCE = 0.5  # seconds that a track may fall short of the length that is asked or declared: encoders round

REASONS = {
    "missing": "no such file",
    "outside_source": "the path or link leads out of the source folder",
    "not_a_file": "a folder, pipe, socket or device",
    "empty": "zero bytes, or zero seconds",
    "bad_index": "a line of the index cannot be read",
    "bad_samples": "samples that cannot be used",
    "bad_rate": f"a sampling rate outside {MIN_RATE:,} to {MAX_RATE:,} Hz",
    "damaged": "not a media file, or its data cannot be decoded",
    "truncated": "data ends before the length that the file declares",
    "too_short": "the file, or one of its tracks, is shorter than the asked clip",
    "no_audio": "no audio track",
    "no_video": "no video track",
    "unsupported_codec": "no decoder for a track",
    "silent": "sound that is silence throughout",
    "too_large": "longer or larger than the limits",
    "timeout": "not decoded within the time limit",
    "out_of_memory": "not decoded within the memory limit",
    "crashed": "the decoder crashed",
}

# Containers that hold media themselves. Playlists (hls, concat, dash, sdp) would let a file name other files or hosts.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,wav,w64,mp3,flac,aac,aiff,au,caf,mxf,ac3,amr,gif,"
    "rm,swf,nut,mpegvideo,ivf"
)
_WITHOUT_LENGTH = {"mp3", "aac", "ac3", "amr"}  # bare frames in a row: their length is FFmpeg's estimate
_TO_THE_SAMPLE = {"ogg", "mov,mp4,m4a,3gp,3g2,mj2"}  # containers that tell where their sound ends to the sample
_BLOCK = 0.2  # seconds: more than any codec's block of samples
_CONTIGUOUS = 0.01  # seconds: smaller steps between audio frames are rounding of timestamps, larger ones are gaps


class ClipError(ValueError):
    """A clip that cannot be read as asked.

    Args:
        reason (`str`): A key of `REASONS`.
        detail (`str`, *optional*): What was found.
        source (`str`, *optional*): What it was found in: a file's name, or "Clip 3".
    """

    def __init__(self, reason: str, detail: str = "", source: str = ""):
        super().__init__(reason, detail, source)  # all of them, so that it can be pickled
        self.reason = reason
        self.detail = detail
        self.source = source

    def __str__(self) -> str:
        message = f"{self.reason}: {self.detail or REASONS[self.reason]}"
        return f"{self.source}: {message}" if self.source else message


# ---------------------------------------------------------------------------------------------------------------------
# Sound of every kind


def read_audio(
    source: Any, sampling_rate: int | None = None, target_rate: int | None = None, name: str = ""
) -> tuple[np.ndarray, int]:
    """Reads all sound of a clip.

    Args:
        source: A path, a URL (or `data:` URI), bytes, an open binary file; a numpy array, torch tensor or list of
            samples, `[samples]`, `[channels, samples]` or `[samples, channels]`, floating point in [-1, 1] or integer
            PCM (uint8, int16, int32); `{"array", "sampling_rate"}`, `{"bytes", "path"}`; or a torchcodec
            `AudioDecoder`. Every container and codec that FFmpeg knows, videos among them.
        sampling_rate (`int`, *optional*): Of an array, in Hz. Everything else knows its own.
        target_rate (`int`, *optional*): What the sound is resampled to, in Hz; by default it keeps its rate. An array
            without a `sampling_rate` is taken to be at this rate.
        name (`str`, *optional*): What an array is called in messages.

    Returns:
        The mean of all channels, float32 `[samples]`, and its sampling rate in Hz. A track that begins later than its
        file is silent until then.

    Raises:
        ClipError: If the clip cannot be read; its `reason` is a key of `REASONS`.
    """
    try:
        waveform, rate = _read(source, sampling_rate, target_rate)
        check_samples(waveform)
        if target_rate is not None and rate != target_rate:
            check_rate(target_rate)
            waveform, rate = soxr.resample(waveform, rate, target_rate), target_rate
        return waveform, rate
    except ClipError as error:
        raise ClipError(error.reason, error.detail, error.source or _name(source) or name) from error.__cause__
    except MemoryError as error:
        raise ClipError("out_of_memory", source=_name(source) or name) from error


def read_batch(audio: Any, sampling_rate: Any = None, target_rate: int | None = None) -> list[np.ndarray]:
    """Reads every clip of a call.

    Args:
        audio: One clip or a list of clips, each as [`read_audio`] takes it. A two-dimensional array that stands alone
            is a batch of mono clips `[B, samples]`.
        sampling_rate: Of arrays, in Hz; one for all clips or one for each.
        target_rate (`int`, *optional*): As in [`read_audio`].

    Returns:
        Waveforms `[samples]`, float32.

    Raises:
        ClipError: For the first clip that cannot be read; the message names it.
        ValueError: If there is no clip, or rates and clips differ in number.
    """
    clips = split_batch(audio)
    rates = list(sampling_rate) if isinstance(sampling_rate, (list, tuple)) else [sampling_rate] * len(clips)
    if len(rates) != len(clips):
        raise ValueError(f"{len(rates)} sampling rates were given for {len(clips)} clips.")
    pairs = enumerate(zip(clips, rates, strict=True))
    return [read_audio(clip, rate, target_rate, f"Clip {index}")[0] for index, (clip, rate) in pairs]


def split_batch(audio: Any) -> list:
    """One clip, a batch `[B, samples]`, or a list (of lists) of clips, as a list of clips."""
    if _is_array(audio):
        if audio.ndim not in (1, 2):
            raise ValueError(
                f"Audio of shape {tuple(audio.shape)} was given: one array holds a clip [samples] or a batch of mono "
                "clips [B, samples]. Give clips with several channels as a list of [channels, samples] arrays."
            )
        return [audio] if audio.ndim == 1 else list(audio)
    if not isinstance(audio, (list, tuple)):
        return [audio]
    if len(audio) == 0:
        raise ValueError("The list of clips is empty.")
    if _is_number(audio[0]):
        return [audio]
    nested = all(isinstance(item, (list, tuple)) and item and not _is_number(item[0]) for item in audio)
    return [clip for item in audio for clip in item] if nested else list(audio)


def list_sounds(audio: Any) -> list | None:
    """The sounds of a processor's call, unread; an array that stands alone is one sound, `[channels, samples]` too."""
    if audio is None:
        return None
    return [audio] if _is_array(audio) and audio.ndim == 2 else split_batch(audio)


def check_rate(rate: Any) -> None:
    """Raises a `ClipError` for a sampling rate that is no number of Hz within the limits."""
    if not (_is_number(rate) and MIN_RATE <= rate <= MAX_RATE):
        raise ClipError("bad_rate", f"{rate} Hz is not within {MIN_RATE:,} to {MAX_RATE:,} Hz")


def mix(channels: Any) -> np.ndarray:
    """The mean of float32 channels, each `[samples]`; added up one by one, so that memory layout changes no bit."""
    if len(channels) == 1:
        return np.ascontiguousarray(channels[0])
    total = channels[0] + channels[1]
    for channel in channels[2:]:
        total += channel
    return total / np.float32(len(channels))


def _read(source: Any, sampling_rate: int | None, target_rate: int | None) -> tuple[np.ndarray, int]:
    """Mono samples and their rate, unchecked."""
    if isinstance(source, dict):
        if source.get("array") is not None:
            return _read(source["array"], source.get("sampling_rate", sampling_rate), target_rate)
        source = source["bytes"] if source.get("bytes") is not None else source.get("path", source.get("url"))
    if source is None:
        raise ClipError("missing", "there is no sound")
    if isinstance(source, (str, os.PathLike, bytes, bytearray)) or hasattr(source, "read"):
        return _decode(source)
    if hasattr(source, "get_all_samples"):  # torchcodec's AudioDecoder
        source = source.get_all_samples()
    if hasattr(source, "sample_rate"):  # torchcodec's AudioSamples
        source, sampling_rate = source.data, source.sample_rate
    if sampling_rate is None:
        if target_rate is None:
            raise ClipError("bad_rate", "an array needs its `sampling_rate`")
        warnings.warn(
            f"No `sampling_rate` was given: {target_rate} Hz is assumed. A wrong rate gives wrong features.",
            stacklevel=4,
        )
        sampling_rate = target_rate
    check_rate(sampling_rate)
    return _mono(_to_float32(source)), sampling_rate


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "ndim")  # torch's, without importing it


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) or (_is_array(value) and value.ndim == 0)


def _to_float32(samples: Any) -> np.ndarray:
    """Samples as float32, integer PCM scaled to [-1, 1]."""
    if _is_tensor(samples):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    try:
        samples = np.asarray(samples)
    except ValueError as error:
        raise ClipError("bad_samples", f"not a rectangular array of numbers: {error}") from None
    if samples.size == 0:
        raise ClipError("empty", "there are no samples")
    if np.issubdtype(samples.dtype, np.floating):
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return samples.astype(np.float32)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype in (np.int16, np.int32):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    raise ClipError(
        "bad_samples",
        f"samples of type {samples.dtype}, whose scale is unknown: give floating point in [-1, 1] or integer PCM as "
        "uint8, int16 or int32",
    )


def _mono(samples: np.ndarray) -> np.ndarray:
    """`[samples]`, `[channels, samples]` or `[samples, channels]` mixed down."""
    if samples.ndim == 1:
        return samples
    if samples.ndim == 2 and samples.shape[0] <= MAX_CHANNELS:
        return mix(samples)
    if samples.ndim == 2 and samples.shape[1] <= MAX_CHANNELS:
        return mix(samples.T)
    raise ClipError(
        "bad_samples",
        f"the shape {samples.shape}: [samples], [channels, samples] or [samples, channels] with at most "
        f"{MAX_CHANNELS} channels is needed",
    )


def check_samples(waveform: np.ndarray) -> None:
    """Raises a `ClipError` for samples that are missing, not finite, or so large that features would overflow."""
    if waveform.size == 0:
        raise ClipError("empty", "there are no samples")
    low, high = waveform.min(), waveform.max()
    if low >= -MAX_AMPLITUDE and high <= MAX_AMPLITUDE:  # comparisons with NaN are false
        return
    wrong = ~np.isfinite(waveform)
    if wrong.any():
        detail = f"{np.count_nonzero(wrong)} samples are NaN or infinite, the first is number {wrong.argmax()}"
    else:
        detail = f"samples reach {max(-low, high):.3g}, where full scale is 1"
    raise ClipError("bad_samples", f"{detail}: repair or drop the clip")


def _name(source: Any) -> str:
    """What a message calls a source; nothing for arrays and bytes."""
    if isinstance(source, dict):
        source = source.get("path") or source.get("url")
    if hasattr(source, "read"):
        source = getattr(source, "name", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _decode(source: Any) -> tuple[np.ndarray, int]:
    with open_media(source) as container:
        stream = first_stream(container.streams.audio, "no_audio")
        origin = origin_of(container)
        declared = declared_end(stream, container, origin)
        track = Track(stream, origin)
        for packet in container.demux(stream):
            for frame in packet.decode():
                track.add(frame)
        check_reach(track.end, float("inf"), declared, "sound")
        return track.waveform(), track.rate


@contextmanager
def open_media(source: Any) -> Iterator[Any]:
    """Opens a media file of a known container; whatever goes wrong inside the block becomes a `ClipError`.

    Args:
        source: A path, a URL that fsspec knows, bytes, or an open binary file.
    """
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "fflags": "+genpts"}
    try:
        with ExitStack() as stack:
            file = _openable(source, stack)
            yield stack.enter_context(av.open(file, options=options, metadata_errors="replace"))
    except FileNotFoundError as error:
        raise ClipError("missing") from error
    except (av.error.DecoderNotFoundError, av.codec.codec.UnknownCodecError) as error:
        raise ClipError("unsupported_codec", str(error)) from error
    except MemoryError as error:
        raise ClipError("out_of_memory") from error
    except (av.FFmpegError, OSError) as error:
        raise ClipError("damaged", getattr(error, "strerror", None) or str(error)) from error


def _openable(source: Any, stack: ExitStack) -> Any:
    """What FFmpeg gets to open: a file object, or an absolute path, in which it sees no protocol."""
    if isinstance(source, (bytes, bytearray)):
        if not source:
            raise ClipError("empty", "zero bytes")
        return io.BytesIO(source)
    if isinstance(source, io.TextIOBase):
        raise ClipError("damaged", "the file was opened as text: open it in mode 'rb'")
    if hasattr(source, "read"):
        source.seek(0)
        return source
    if isinstance(source, str) and ("://" in source or source.startswith("data:")):
        import fsspec

        try:
            return stack.enter_context(fsspec.open(source, "rb"))
        except (ImportError, ValueError) as error:  # a protocol that fsspec does not know, or not without a package
            raise ClipError("missing", str(error)) from error
    path = os.path.abspath(source)  # noqa: PTH100  (a Path would be made for this alone)
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        raise ClipError("not_a_file")
    if not status.st_size:
        raise ClipError("empty", "zero bytes")
    return path


def first_stream(streams: Sequence[Any], reason: str) -> Any:
    """The first stream that is no cover art; without one, a `ClipError` for `reason`."""
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


def origin_of(container: Any) -> float:
    """When a file begins, in seconds of its own clock."""
    return max(0, container.start_time or 0) / av.time_base


def declared_end(stream: Any, container: Any, origin: float) -> float:
    """The end of a track by the file's own word, in seconds from its origin; infinite if it says nothing."""
    if container.format.name in _WITHOUT_LENGTH:
        return float("inf")
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - origin
    if tag := stream.metadata.get("DURATION"):  # Matroska's, such as 00:00:10.021000000
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - origin
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return float("inf")


def check_reach(reach: float, length: float, declared: float, what: str) -> None:
    """Compares what a track held, in seconds from the clip's start, with the clip and with the file's own word."""
    if reach >= min(length, declared) - TOLERANCE:
        return
    if np.isfinite(declared):
        raise ClipError("truncated", f"{what} ends after {max(reach, 0):.3f} s, declared are {declared:.3f} s")
    if np.isfinite(length):
        raise ClipError("too_short", f"{what} ends after {max(reach, 0):.3f} s of {length:.3f} s")


class Track:
    """Decoded sound of a file or of a segment of it, mixed down and placed by its timestamps.

    Args:
        stream: The track of an open container.
        start (`float`): Start of the segment, in seconds of the file's clock.
        length (`float`, *optional*): Length of the segment, in seconds; by default to the end.
    """

    def __init__(self, stream: Any, start: float, length: float = float("inf")):
        self.start, self.length = start, length
        self._declared = float("inf")  # its end to the sample, where the container knows it
        if stream.container.format.name in _TO_THE_SAMPLE and stream.duration:
            self._declared = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start
        self._rounding = _CONTIGUOUS
        self._first: int | None = None
        if stream.codec_context.name == "vorbis" and stream.container.format.name == "ogg":
            # FFmpeg's stamps are up to a block wrong here: after the first page, and throughout files of a single one,
            # whose end it cuts by as much. So it cuts nothing: the first block is a lead-in, the second begins the
            # sound, and the others follow it.
            stream.codec_context.flags2 |= av.codec.context.Flags2.skip_manual
            self._rounding = _BLOCK
            self._first = stream.start_time
        self.rate = 0
        self.end = 0.0  # of the sound so far, in seconds from the segment's start
        self._samples = np.zeros(0, np.float32)
        self._cursor: int | None = None
        self._packer = av.AudioResampler(format="flt")  # channels side by side: planes beyond the eighth crash PyAV

    def add(self, frame: av.AudioFrame) -> None:
        """Takes the next decoded frame; raises a `ClipError` if it does not go with those before, or is too much."""
        if not self.rate:
            check_rate(frame.sample_rate)
            self.rate = frame.sample_rate
            if self._first is not None and frame.pts is not None:
                late = float((frame.pts + frame.samples - self._first) * frame.time_base)
                self.start += late if late < _BLOCK else 0.0
        offset = self._offset(frame)
        frame.pts = None  # the resampler would fill gaps its own way
        try:
            pieces = self._packer.resample(frame)
        except ValueError as error:
            raise ClipError("damaged", f"the sound changes its format on the way: {error}") from error
        for piece in pieces:
            samples = mix(piece.to_ndarray().reshape(piece.samples, -1).T)
            self._write(offset, samples)
            offset += len(samples)
        self._cursor = offset
        self.end = max(self.end, min(offset / self.rate, self.length))

    def waveform(self) -> np.ndarray:
        """The sound so far, float32 `[samples]`, without what the encoder put behind it to fill its last block."""
        end = self._declared if self._declared < self.end < self._declared + _BLOCK else self.end
        self._reserve(total := round(end * self.rate))
        return self._samples[:total]

    def _offset(self, frame: av.AudioFrame) -> int:
        """Where a frame belongs, in samples from the segment's start."""
        if frame.pts is None:
            return self._cursor or 0
        offset = round((float(frame.pts * frame.time_base) - self.start) * self.rate)
        if self._cursor is not None and abs(offset - self._cursor) <= self._rounding * self.rate:
            return self._cursor
        return offset

    def _write(self, offset: int, samples: np.ndarray) -> None:
        last = offset + len(samples)
        if self.length != float("inf"):
            last = min(last, round(self.length * self.rate))
        first = max(offset, 0)
        if first < last:
            self._reserve(last)
            self._samples[first:last] = samples[first - offset : last - offset]

    def _reserve(self, count: int) -> None:
        if count > min(MAX_SAMPLES, MAX_SECONDS * self.rate):
            raise ClipError(
                "too_large",
                f"more than {min(MAX_SECONDS, MAX_SAMPLES / self.rate) / 60:.0f} minutes of sound: cut it into parts",
            )
        if count > len(self._samples):
            # By an eighth more than needed: the buffer is moved rarely, and memory stays near what was decoded.
            self._samples.resize(count + max(count // 8, 1 << 18), refcheck=False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def read_image(source: Any) -> Image.Image:
    """A picture, upright and in RGB.

    Args:
        source: A path, bytes, an open file, `{"bytes", "path"}` or a PIL image. Sixteen bits and floating point in
            [0, 1] become eight bits.

    Raises:
        ClipError: If it cannot be read.
    """
    name = _name(source)
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ClipError("missing", "there is no picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, (bytes, bytearray)):
                source = io.BytesIO(source)
            image = source if isinstance(source, Image.Image) else Image.open(source)
        if max(image.size) > MAX_SIDES * min(image.size) or image.width * image.height > MAX_PIXELS:
            raise ClipError("too_large", f"a picture of {image.width} x {image.height} pixels", name)
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image, np.float64) / (1.0 if image.mode == "F" else 65535.0)
            if not (values.min() >= 0 and values.max() <= 1):
                raise ClipError("bad_samples", f"grey values from {values.min():.3g} to {values.max():.3g}", name)
            image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
        return image.convert("RGB")
    except ClipError:
        raise
    except FileNotFoundError as error:
        raise ClipError("missing", source=name) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError) as error:
        raise ClipError("too_large", source=name) from error
    except Exception as error:  # Pillow's decoders raise errors of every kind for broken files
        raise ClipError("damaged", str(error), name) from error


def read_middle_frame(source: Any) -> Image.Image:
    """The picture in the middle of a video, upright.

    Args:
        source: As [`open_media`] takes it.

    Raises:
        ClipError: If there is none, or it cannot be decoded.
    """
    try:
        with open_media(source) as container:
            stream = first_stream(container.streams.video, "no_video")
            middle = origin_of(container) + (container.duration or 0) / av.time_base / 2
            container.seek(int(middle * av.time_base))  # to the key frame before
            last = None
            for frame in container.decode(stream):
                last = frame
                if frame.time is None or frame.time >= middle:
                    break
            if last is None:
                raise ClipError("empty", "the video track has no frame")
            return upright(last)
    except ClipError as error:
        raise ClipError(error.reason, error.detail, error.source or _name(source)) from error.__cause__


def upright(frame: Any, frame_size: int | None = None) -> Image.Image:
    """A decoded frame in RGB, its shorter side reduced to `frame_size` pixels, rotated as its display matrix says."""
    width, height, rotation = frame.width, frame.height, frame.rotation
    if frame_size and min(width, height) > frame_size:
        scale = frame_size / min(width, height)
        width, height = round(width * scale), round(height * scale)
        if frame.format.name in ("yuv420p", "yuvj420p"):  # planes scale four times as fast as RGB
            frame = frame.reformat(width, height, interpolation="BICUBIC")
    pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(rotation / 90))))
