"""Sounds and videos of the world to try a model on."""

import io
from pathlib import Path

import av
import datasets
import soundfile
from PIL import Image

VIDEO_RATE = 10  # frames per second


def write_samples(rows: datasets.Dataset, folder: Path, count: int = 4) -> None:
    """
    Sounds (`.wav`) and videos with sound (`.mp4`) of a split with `audio` and `image`, to try the model on.

    Args:
        rows: The split.
        folder: Where to.
        count: How many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows.select(range(min(count, len(rows)))):
        sound = row["audio"]["bytes"]
        (folder / f"{row['id']}.wav").write_bytes(sound)
        write_video(folder / f"{row['id']}.mp4", sound, row["image"])


def write_video(path: Path, wav: bytes, picture: Image.Image) -> None:
    """A video that shows one picture for as long as the sound takes."""
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=VIDEO_RATE)
        video.width, video.height = picture.size
        video.pix_fmt, video.bit_rate = "yuv420p", 1_000_000
        audio = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.VideoFrame.from_image(picture)
        for index in range(round(VIDEO_RATE * len(samples) / rate)):
            frame.pts = index
            container.mux(video.encode(frame))
        sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = rate, 0  # without a start, AAC's first frame, which is lead-in, would be sound
        for stream, last in ((audio, sound), (audio, None), (video, None)):
            container.mux(stream.encode(last))
