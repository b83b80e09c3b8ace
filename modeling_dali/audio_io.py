"""Reading the sound of audio and video files, and the middle picture of videos."""

import os
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
from av.error import FFmpegError
from PIL import Image


class UnreadableFileError(ValueError):
    """A file that holds no sound (or picture) that can be read; the message says which file and why."""


def load_audio(source: str | os.PathLike | BinaryIO) -> tuple[np.ndarray, int]:
    """
    Reads all sound of a file.

    Args:
        source: Path or open binary file: wav, flac, ogg, mp3 (by soundfile), m4a, mp4, webm, mkv, ... (by PyAV).

    Returns:
        The waveform [channels, samples], float32 in [-1, 1], and its sampling rate in Hz.

    Raises:
        UnreadableFileError: if there is no such file, it is no sound or video file, has no sound track, or its sound
            cannot be decoded.
    """
    _check_is_file(source)
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
        waveform = samples.T
    except soundfile.LibsndfileError:
        if hasattr(source, "seek"):
            source.seek(0)
        waveform, rate = _decode_audio(source)
    if waveform.shape[1] == 0:
        raise UnreadableFileError(f"{_name(source)}: the sound has a length of zero.")
    return waveform, rate


def load_middle_frame(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """
    The picture in the middle of a video.

    Raises:
        UnreadableFileError: if there is no such file, or no picture in it.
    """
    _check_is_file(source)
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise UnreadableFileError(f"{_name(source)}: the file has no video track.")
            stream = container.streams.video[0]
            if container.duration:
                container.seek(container.duration // 2)
            for frame in container.decode(stream):
                return frame.to_image()
    except (FFmpegError, OSError) as error:
        raise UnreadableFileError(f"{_name(source)}: no picture can be decoded ({error}).") from error
    raise UnreadableFileError(f"{_name(source)}: the video track has no frame.")


def _decode_audio(source) -> tuple[np.ndarray, int]:
    try:
        with av.open(source) as container:
            if not container.streams.audio:
                raise UnreadableFileError(f"{_name(source)}: the file has no sound track.")
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp")  # planar float32, rate and channels as they are
            frames = [part for frame in container.decode(stream) for part in resampler.resample(frame)]
            frames += resampler.resample(None)
            rate = stream.rate
    except (FFmpegError, OSError) as error:
        raise UnreadableFileError(
            f"{_name(source)}: not a sound or video file that can be decoded ({error})."
        ) from error
    if not frames:
        raise UnreadableFileError(f"{_name(source)}: the sound has a length of zero.")
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), rate


def _check_is_file(source) -> None:
    if hasattr(source, "read"):
        return
    path = Path(source)
    if path.is_dir():
        raise UnreadableFileError(f"{path}: this is a folder, not a file.")
    if not path.exists():
        raise UnreadableFileError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise UnreadableFileError(f"{path}: the file is empty.")


def _name(source) -> str:
    return str(getattr(source, "name", "the given bytes")) if hasattr(source, "read") else str(source)
