"""Frames at the asked times, sound in its place, and a reason for everything that cannot be read."""

import io
import os
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from datasets_scripts.decode import ClipError, encode_jpeg, encode_sound, read_clip
from tests.datasets_scripts.videos import clock, lag, make_video, number

CASES = {
    "h264-aac": ("a.mp4", {}),
    "h264-44k-stereo-mkv": ("a.mkv", {"audio": "aac"}),
    "h264-mp3": ("a.mp4", {"audio": "libmp3lame"}),
    "h264-pcm-mov": ("a.mov", {"audio": "pcm_s16le"}),
    "h264-one-gop": ("a.mp4", {"gop": 1000}),
    "h264-mpegts": ("a.ts", {}),
    "h264-fragmented": ("a.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264-live": ("a.mkv", {"options": {"live": "1"}}),
    "vp9-opus": ("a.webm", {"video": "libvpx-vp9", "audio": "libopus", "rate": 48_000}),
    "mpeg4-mp3-avi": ("a.avi", {"video": "mpeg4", "audio": "libmp3lame"}),
    "mpeg4-pcm-mono": ("a.mkv", {"video": "mpeg4", "audio": "pcm_s16le", "rate": 22_050, "layout": "mono"}),
    "h264-5.1": ("a.mp4", {"layout": "5.1", "rate": 48_000}),
    "5.1-opus": ("a.mkv", {"audio": "libopus", "layout": "5.1", "rate": 48_000}),
    "ntsc": ("a.mp4", {"fps": 30_000 / 1001}),
    "one-frame-a-second": ("a.mp4", {"fps": 1.0}),
}


def check_frames(clip, times, start, length, count):
    """Every frame is the one nearest to its time, and says its time rightly."""
    wanted = start + np.arange(count) * length / count
    assert len(clip.frames) == len(clip.frame_times) == count
    for image, told, time in zip(clip.frames, clip.frame_times, wanted, strict=True):
        shown = times[number(image)]
        assert abs(shown - time) <= np.abs(times - time).min() + 0.0015, f"{shown} for {time}"
        assert abs(told + start - shown) < 0.0015


@pytest.mark.parametrize("case", CASES)
def test_frames_and_sound_come_from_their_times(tmp_path, case):
    name, arguments = CASES[case]
    times = make_video(tmp_path / name, **arguments)
    shown, late = clock(tmp_path / name)
    if not (name.endswith((".ts", ".avi")) or case == "h264-fragmented"):  # these keep the time they were given
        assert np.abs(shown - times).max() < 0.0015 and abs(late) < 0.001
    for start, end in [(0.0, 10.0), (3.3, 8.3), (9.0, 10.0)]:
        clip = read_clip(tmp_path / name, start, end, frames=7)
        check_frames(clip, shown, start, end - start, 7)
        assert abs(len(clip.waveform) / 16_000 - (end - start)) < 0.1
        assert abs(lag(clip.waveform, start) - late) < 0.005


@pytest.mark.parametrize("seconds", [1.0, 600.0])
def test_short_and_long_files(tmp_path, seconds):
    shape = {"fps": 4, "video": "mpeg4", "audio": "pcm_s16le", "rate": 16_000, "layout": "mono"}
    times = make_video(tmp_path / "a.mov", seconds, **shape)
    clip = read_clip(tmp_path / "a.mov", frames=10, frame_size=None)
    check_frames(clip, times, 0, len(clip.waveform) / 16_000, 10)
    late = seconds - 1
    clip = read_clip(tmp_path / "a.mov", late, late + 1, frames=3)
    check_frames(clip, times, late, 1.0, 3)
    assert abs(lag(clip.waveform, late)) < 0.02


def test_a_recording_without_a_length(tmp_path):
    times = make_video(tmp_path / "a.mkv", 6, options={"live": "1"})
    clip = read_clip(tmp_path / "a.mkv", frames=6)
    check_frames(clip, times, 0, len(clip.waveform) / 16_000, 6)
    assert len(clip.waveform) / 16_000 == pytest.approx(6, abs=0.1)
    assert reason(tmp_path / "a.mkv", 2, 12) == "too_short"
    assert reason(tmp_path / "a.mkv", 30, 40) == "too_short"


def test_variable_frame_rate(tmp_path):
    generator = np.random.default_rng(0)
    times = np.round(np.concatenate([[0], np.cumsum(generator.choice([0.02, 0.05, 0.4, 1.1], 60))]), 3)
    times = times[times < 10]
    make_video(tmp_path / "a.mp4", times=times, gop=9)
    check_frames(read_clip(tmp_path / "a.mp4", 0, 9.5, frames=19), times, 0, 9.5, 19)
    check_frames(read_clip(tmp_path / "a.mp4", 4.2, 8.2, frames=8), times, 4.2, 4, 8)


@pytest.mark.parametrize("frame_size", [None, 32])
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_frames_come_upright(tmp_path, rotation, frame_size):
    make_video(tmp_path / "a.mp4", rotation=rotation)
    clip = read_clip(tmp_path / "a.mp4", frames=10, frame_size=frame_size)
    # `rotation` turns the coded picture counterclockwise for display, so turning back gives the coded one.
    assert [number(image.rotate(-rotation, expand=True)) for image in clip.frames] == list(range(0, 100, 10))


def test_gaps_and_late_tracks_keep_their_time(tmp_path):
    """Sound that starts two seconds into the file is silence first, not moved to the front."""
    times = np.arange(20, 100) / 10
    make_video(tmp_path / "a.mkv", times=times)
    clip = read_clip(tmp_path / "a.mkv", 2, 10, frames=8)
    assert [number(image) for image in clip.frames] == list(range(0, 80, 10))
    assert abs(lag(clip.waveform, 2)) < 0.02


def test_size_and_bytes(tmp_path):
    make_video(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    clip = read_clip(data, frames=2, frame_size=32)
    assert [image.size for image in clip.frames] == [(32, 32)] * 2
    assert Image.open(io.BytesIO(encode_jpeg(clip.frames[0]))).size == (32, 32)
    restored, rate = soundfile.read(io.BytesIO(encode_sound(clip.waveform)), dtype="float32")
    assert rate == 16_000
    assert np.abs(restored - clip.waveform.clip(-1, 1)).max() < 1e-4
    assert np.array_equal(read_clip(tmp_path / "a.mp4", frames=2).waveform, clip.waveform)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    remote = read_clip(f"file://{tmp_path / 'b.mp4'}", frames=2)
    assert np.array_equal(remote.waveform, clip.waveform)


def test_mixing_down_is_the_mean_of_stereo(tmp_path):
    generator = np.random.default_rng(0)
    samples = generator.uniform(-0.5, 0.5, (32_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    clip = read_clip(tmp_path / "a.wav", frames=0, sampling_rate=None)
    assert clip.sampling_rate == 16_000
    assert np.abs(clip.waveform - samples.mean(axis=1)).max() < 1e-6


def reason(*arguments, **keywords) -> str:
    with pytest.raises(ClipError) as error:
        read_clip(*arguments, **keywords)
    assert str(error.value)
    return error.value.reason


def test_every_fault_has_its_reason(tmp_path):
    path = tmp_path / "a.mp4"
    assert reason(path) == "missing"
    assert reason(tmp_path) == "not_a_file"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason(tmp_path / "pipe.mp4") == "not_a_file"
    assert reason("/dev/zero") == "not_a_file"
    path.write_bytes(b"")
    assert reason(path) == "empty"
    assert reason(b"") == "empty"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    assert reason(path) == "damaged"
    path.write_text("#EXTM3U\n#EXTINF:10,\n/etc/passwd\n")
    assert reason(path) == "damaged"
    make_video(path, audio=None)
    assert reason(path) == "no_audio"
    make_video(path, video=None)
    assert reason(path) == "no_video"
    assert len(read_clip(path, frames=0).waveform) == pytest.approx(160_000, abs=1600)
    make_video(path, amplitude=0.0)
    assert reason(path) == "silent"
    make_video(path, seconds=4)
    assert reason(path, 0, 10) == "too_short"
    assert reason(path, 5, 10) == "too_short"
    short = read_clip(path, 0, 10, frames=4, allow_short=True)
    assert [number(image) for image in short.frames] == [0, 10, 20, 30]
    make_video(path, audio_seconds=5)
    assert reason(path, 0, 10) == "too_short"


def test_truncated_files(tmp_path):
    path = tmp_path / "a.mp4"
    make_video(path, options={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert reason(path, 0, 10) in ("truncated", "damaged")
    path.write_bytes(whole[:600])
    assert reason(path) == "damaged"
    make_video(tmp_path / "b.mp4")  # its index stands at the end
    whole = (tmp_path / "b.mp4").read_bytes()
    path.write_bytes(whole[: len(whole) - 500])
    assert reason(path) == "damaged"
    make_video(tmp_path / "c.mkv")
    whole = (tmp_path / "c.mkv").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert reason(path, 0, 10) in ("truncated", "damaged")


def test_huge_frames_are_refused(tmp_path):
    """The container, or the picture in it, says 100,000 x 100,000 pixels: 30 GB, were they believed."""
    path = tmp_path / "a.avi"
    make_video(path, video="ffv1", audio="pcm_s16le")
    data = path.read_bytes()
    header = data.index(b"strf") + 8
    for side, expected in [(12_000, "too_large"), (100_000, "damaged")]:  # the demuxer believes up to 2^31 / 8 pixels
        path.write_bytes(data[: header + 4] + np.array([side, side], "<u4").tobytes() + data[header + 12 :])
        assert reason(path) == expected
    make_video(path, video="png", audio="pcm_s16le")
    size = np.array([64, 64], ">u4").tobytes()
    path.write_bytes(path.read_bytes().replace(b"IHDR" + size, b"IHDR" + np.array([100_000] * 2, ">u4").tobytes()))
    assert reason(path) == "damaged"


def test_unsupported_codec(tmp_path):
    path = tmp_path / "a.avi"
    make_video(path, video="mpeg4", audio="pcm_s16le")
    data = path.read_bytes().replace(b"FMP4", b"ZZZZ")
    path.write_bytes(data)
    assert reason(path) == "unsupported_codec"


@pytest.mark.parametrize("arguments", [(-1, 3), (3, 3), (float("nan"), 3), (0, 1, -1)])
def test_senseless_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match="expected 0 <= start < end"):
        read_clip(b"x", *arguments)


def test_real_clips(shared_data):
    for path in sorted((shared_data / "videos").glob("*.mp4")):
        clip = read_clip(path, 0, 10)
        assert len(clip.waveform) == 160_000 and np.isfinite(clip.waveform).all()
        assert np.abs(np.array(clip.frame_times) - np.arange(10)).max() <= 0.0401  # half a frame at 12.5 Hz
        part = read_clip(path, 4, 7, frames=3)
        # AAC fills bands with noise that depends on where decoding began, so the samples are not equal.
        assert np.corrcoef(part.waveform, clip.waveform[4 * 16_000 : 7 * 16_000])[0, 1] > 0.98
        for one, other in zip(part.frames, clip.frames[4:7], strict=True):
            difference = np.abs(np.asarray(one, float) - np.asarray(other, float))
            assert difference.mean() < 1.0


def test_smaller_frames_look_like_the_large_ones(shared_data):
    (path,) = (shared_data / "videos").glob("Kls*.mp4")
    for small, large in zip(
        *(read_clip(path, 4, 6, frames=2, frame_size=size).frames for size in (336, None)), strict=True
    ):
        reference = np.asarray(large.resize(small.size, Image.Resampling.BICUBIC), float)
        assert small.size == (597, 336) and np.abs(np.asarray(small, float) - reference).mean() < 2
