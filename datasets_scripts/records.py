"""One record: what a shard holds of one clip. Runs in child processes, so it imports no more than it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_scripts.clips import ClipRequest, printable
from datasets_scripts.decode import ClipError, check_rate, encode_jpeg, encode_sound, read_clip


@dataclass(frozen=True)
class Settings:
    """What decides the content of the shards.

    Attributes:
        frames: number of frames a clip; 0 for sound alone.
        frame_size: shorter side to which larger frames are reduced, in pixels; None keeps their size.
        jpeg_quality: of the frames.
        shard_size: clips a shard, failures counted in.
        sampling_rate: of the sound, in Hz; None keeps each file's own. The models resample what is not at their rate
            (DALI's 16 kHz, VIP-ANT's 44.1 kHz), but sound above half the rate kept here is lost.
    """

    frames: int = 10
    frame_size: int | None = 336
    jpeg_quality: int = 90
    shard_size: int = 256
    sampling_rate: int | None = 16_000

    def __post_init__(self) -> None:
        """Refuses numbers that make no sense."""
        if self.frames < 0 or self.shard_size < 1 or not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"expected frames >= 0, shard_size >= 1 and jpeg_quality in 1..95, got {self}")
        if self.frame_size is not None and self.frame_size < 16:
            raise ValueError(f"frame_size must be at least 16 pixels, got {self.frame_size}")
        if self.sampling_rate is not None:
            check_rate(self.sampling_rate)


@dataclass(frozen=True)
class Limits:
    """What one clip may cost: seconds of time, and bytes of memory of the process that reads it."""

    timeout: float = 120.0
    memory: int = 2 << 30


def read_record(item: tuple[ClipRequest, Settings]) -> dict[str, Any]:
    """Reads one clip: gives a record, or a failure that says why there is none; either with the state of its file."""
    request, settings = item
    return {"file": request.file_state(), **_read(request, settings)}


def _read(request: ClipRequest, settings: Settings) -> dict[str, Any]:
    try:
        path, start, end = request.locate()
        clip = read_clip(
            path, start, end, settings.frames, settings.frame_size, settings.sampling_rate, request.allow_short
        )
        frames = [{"bytes": encode_jpeg(frame, settings.jpeg_quality), "path": None} for frame in clip.frames]
        return {
            "id": request.id,
            "audio": {"bytes": encode_sound(clip.waveform, clip.sampling_rate), "path": None},
            "frames": frames,
            "frame_times": [round(time, 6) for time in clip.frame_times],
            "labels": list(request.labels),
            "source": printable(Path(path).name),
            "start": start,
            "duration": len(clip.waveform) / clip.sampling_rate,
        }
    except ClipError as error:
        return failure(request.id, error.reason, error.detail)
    except MemoryError:
        raise  # the pool knows the limit
    except Exception as error:  # an unforeseen fault of one file must not end a run over millions
        return failure(request.id, "crashed", f"{type(error).__name__}: {error}")


def failure(clip: str, reason: str, detail: str) -> dict[str, Any]:
    """What a shard's report holds of a clip that could not be read."""
    return {"failure": {"id": clip, "reason": reason, "detail": printable(detail)}}
