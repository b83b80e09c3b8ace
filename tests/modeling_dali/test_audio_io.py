"""Reading files of every kind, and saying what is wrong with those that cannot be read."""

import io

import av
import numpy as np
import pytest
import soundfile

from modeling_dali.audio_io import ClipError, read_audio, read_middle_frame


def tone(rate, seconds=1.0, channels=1):
    t = np.arange(int(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def write_video(path, rate=24_000, seconds=1.0, audio=True, video=True):
    with av.open(str(path), "w") as container:
        if video:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if audio:
            sound = container.add_stream("aac", rate=rate)
            sound.layout = "mono"
        if video:
            for i in range(int(10 * seconds)):
                picture = np.full((48, 64, 3), 20 * i + 20, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            container.mux(stream.encode())
        if audio:
            frame = av.AudioFrame.from_ndarray(tone(rate, seconds), format="fltp", layout="mono")
            frame.sample_rate = rate
            for packet in sound.encode(frame):
                container.mux(packet)
            container.mux(sound.encode())
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_files(suffix, channels, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(22_050, channels=channels).T, 22_050)
    waveform, rate = read_audio(path)
    assert rate == 22_050 and waveform.dtype == np.float32 and waveform.ndim == 1
    assert waveform.shape[0] == pytest.approx(22_050, abs=2_500)
    spectrum = np.abs(np.fft.rfft(waveform[:20_000]))
    assert spectrum.argmax() * 22_050 / 20_000 == pytest.approx(440, abs=2)


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "mkv"])
def test_video_files(suffix, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", video=suffix != "m4a")
    waveform, rate = read_audio(path)
    assert rate == 24_000 and len(waveform) == pytest.approx(24_000, abs=2_100)
    spectrum = np.abs(np.fft.rfft(waveform[2_000:22_000]))
    assert spectrum.argmax() * 24_000 / 20_000 == pytest.approx(440, abs=2)


def test_middle_frame(tmp_path):
    picture = read_middle_frame(write_video(tmp_path / "a.mp4"))
    assert picture.size == (64, 48) and picture.mode == "RGB"


def test_real_videos(shared_data):
    for path in sorted((shared_data / "videos").glob("*.mp4")):
        waveform, rate = read_audio(path)
        assert rate == 44_100 and len(waveform) / rate == pytest.approx(10, abs=0.1)
        assert read_middle_frame(path).size[0] > 100


def test_open_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8_000)[0], 8_000)
    waveform, rate = read_audio(io.BytesIO((tmp_path / "a.wav").read_bytes()))
    assert rate == 8_000 and waveform.shape == (8_000,)
    data = write_video(tmp_path / "a.mp4").read_bytes()
    assert read_audio(io.BytesIO(data))[1] == 24_000


def test_the_suffix_does_not_matter(tmp_path):
    write_video(tmp_path / "a.mp4").rename(tmp_path / "a.wav")
    assert read_audio(tmp_path / "a.wav")[1] == 24_000
    soundfile.write(tmp_path / "b.flac", tone(8_000)[0], 8_000)
    (tmp_path / "b.flac").rename(tmp_path / "b.mp3")
    assert read_audio(tmp_path / "b.mp3")[1] == 8_000


def test_a_truncated_file_gives_what_it_holds_or_an_error(tmp_path):
    for suffix in ("wav", "flac", "ogg", "mp3"):
        path = tmp_path / f"a.{suffix}"
        whole = tone(22_050, 2.0)
        soundfile.write(path, whole[0], 22_050)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        try:
            waveform, _ = read_audio(path)
        except ClipError as error:
            assert str(path) in str(error)
        else:
            assert 0.2 < len(waveform) / whole.shape[1] < 0.8
            assert waveform.std() > 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "missing"),
        (lambda p: p.mkdir(), "not_a_file"),
        (lambda p: p.write_bytes(b""), "empty: zero bytes"),
        (lambda p: p.write_text("hello " * 100), "damaged"),
        (lambda p: soundfile.write(p, np.zeros(0), 8_000, format="WAV"), "empty"),
        (lambda p: write_video(p.with_suffix(".mp4"), audio=False).rename(p), "no_audio"),
    ],
)
def test_unreadable_files(make, message, tmp_path):
    path = tmp_path / "clip"
    make(path)
    with pytest.raises(ClipError, match=message) as error:
        read_audio(path)
    assert str(path) in str(error.value)


def test_no_picture(tmp_path):
    with pytest.raises(ClipError, match="no_video"):
        read_middle_frame(write_video(tmp_path / "a.m4a", video=False))
    with pytest.raises(ClipError, match="missing"):
        read_middle_frame(tmp_path / "b.mp4")
