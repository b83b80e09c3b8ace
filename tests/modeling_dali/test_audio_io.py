"""One way in for sound: every source, every format, every channel count, and a reason for what cannot be read."""

import base64
import http.server
import io
import os
import pickle
import struct
import threading
import time
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_dali import audio_io
from modeling_dali.audio_io import (
    REASONS,
    ClipError,
    list_sounds,
    mix,
    read_audio,
    read_batch,
    read_image,
    read_middle_frame,
    split_batch,
)


def tone(rate, seconds=1.0, channels=1):
    t = np.arange(int(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def write_media(path, codec="aac", rate=24_000, seconds=1.0, layout="mono", start=0.0, video=False, channels=None):
    """Writes sound (the channels of `tone` by default), `start` seconds into the file, and a video from 0 on."""
    channels = tone(rate, seconds, len(av.AudioLayout(layout).channels)) if channels is None else channels
    with av.open(str(path), "w") as container:
        if video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = None
        if codec:
            sound = container.add_stream(codec, rate=rate)
            sound.layout = layout
        packets = []
        for i in range(int(10 * (seconds + start)) if video else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i + 4, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            packets += pictures.encode(frame)
        packets += pictures.encode() if video else []
        if sound:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels.T).reshape(1, -1), "flt", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
            resampler = av.AudioResampler(sound.format.name, layout, rate, frame_size=sound.frame_size or 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                packets += sound.encode(part)
            packets += sound.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def write_video(path):
    """A second of sound and pictures."""
    return write_media(path, video=True)


def encoded(samples, rate, **format):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, **format)
    return buffer.getvalue()


def reason_of(source, *arguments) -> str:
    with pytest.raises(ClipError) as error:
        read_audio(source, *arguments)
    assert error.value.reason in REASONS and "\n" not in str(error.value)
    return error.value.reason


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(folder))
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_the_same_sound_from_every_source(tmp_path, server):
    channels = tone(22_050, channels=2)
    data = encoded(channels, 22_050, format="WAV", subtype="FLOAT")
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    (server[0] / "a.wav").write_bytes(data)
    expected = (channels[0] + channels[1]) / np.float32(2)
    uri = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
    for source in (str(path), path, data, bytearray(data), io.BytesIO(data), path.as_uri(), f"{server[1]}/a.wav", uri):
        waveform, rate = read_audio(source)
        assert rate == 22_050 and waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, expected)
    with path.open("rb") as file:
        file.read(100)  # wherever it stands, all of the file is meant
        np.testing.assert_array_equal(read_audio(file)[0], expected)
    samples = SimpleNamespace(data=torch.from_numpy(channels), sample_rate=22_050)
    for source in (
        {"path": str(path)},
        {"path": path, "bytes": None},
        {"bytes": data, "path": "a name alone.wav"},
        {"array": channels, "sampling_rate": 22_050},
        samples,
        SimpleNamespace(get_all_samples=lambda: samples),
    ):
        waveform, rate = read_audio(source)
        assert rate == 22_050
        np.testing.assert_array_equal(waveform, expected)
    for array in (channels, channels.T, torch.from_numpy(channels), channels.tolist(), np.asfortranarray(channels)):
        np.testing.assert_array_equal(read_audio(array, 22_050)[0], expected)
    np.testing.assert_array_equal(read_audio(expected.astype(np.float64), 22_050)[0], expected)


def test_a_rate_is_the_files_own_and_resampling_happens_once(tmp_path):
    channels = tone(48_000)
    soundfile.write(tmp_path / "a.wav", channels[0], 48_000, subtype="FLOAT")
    for told in (None, 8_000, 48_000):  # of arrays; a file knows better
        waveform, rate = read_audio(tmp_path / "a.wav", told, 16_000)
        assert rate == 16_000
        np.testing.assert_array_equal(waveform, soxr.resample(channels[0], 48_000, 16_000))
    with pytest.warns(UserWarning, match="16000 Hz is assumed"):
        assert read_audio(channels, None, 16_000)[1] == 16_000
    with pytest.raises(ClipError, match="needs its `sampling_rate`"):
        read_audio(channels)


@pytest.mark.parametrize(
    ("dtype", "offset", "scale"), [(np.int16, 0, 2**15), (np.int32, 0, 2**31), (np.uint8, 128, 128)]
)
def test_integer_samples_are_scaled_by_their_type(dtype, offset, scale):
    limits = np.iinfo(dtype)
    pcm = np.linspace(limits.min, limits.max, 500).astype(dtype)
    expected = (pcm.astype(np.float64) - offset) / scale
    np.testing.assert_allclose(read_audio(pcm, 16_000)[0], expected, atol=1e-7)


def test_batches():
    one, two = tone(8_000)[0], tone(8_000, channels=2)
    assert [len(clip) for clip in read_batch([one, two], 8_000)] == [8_000, 8_000]
    assert [len(clip) for clip in read_batch(np.stack([one] * 3), 8_000)] == [8_000] * 3
    assert [len(clip) for clip in read_batch([one, one], [8_000, 16_000], 16_000)] == [16_000, 8_000]
    assert len(split_batch(one.tolist())) == 1 and len(split_batch([one.tolist()] * 2)) == 2
    assert len(split_batch([["a.wav", "b.wav"], [one]])) == 3
    assert split_batch("a.wav") == ["a.wav"]
    assert list_sounds(None) is None and len(list_sounds(two)) == 1 and len(split_batch(two)) == 2
    for wrong, message in (([], "empty"), (np.zeros((2, 2, 2)), "one array holds")):
        with pytest.raises(ValueError, match=message):
            split_batch(wrong)
    with pytest.raises(ValueError, match="2 sampling rates were given for 1 clips"):
        read_batch([one], [8_000, 8_000])


# Formats and channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "caf", "w64", "au"])
@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_sound_files_agree_with_libsndfile(suffix, seconds, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(22_050, seconds, 2).T, 22_050)
    waveform, rate = read_audio(path)
    expected, _ = soundfile.read(path, dtype="float32")
    assert rate == 22_050
    np.testing.assert_allclose(waveform, expected.mean(1), atol=2e-6)


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "mov", "mkv"])
@pytest.mark.parametrize("seconds", [0.87, 2.0])
def test_coded_sound_stands_at_its_time_and_ends_there(suffix, seconds, tmp_path):
    path = write_media(tmp_path / f"a.{suffix}", seconds=seconds, video=suffix != "m4a")
    waveform, rate = read_audio(path)
    expected = tone(24_000, seconds)[0]
    assert rate == 24_000
    assert len(waveform) - len(expected) in (range(1_024) if suffix == "mkv" else (0,))  # Matroska knows milliseconds
    assert np.abs(waveform[2_000 : len(expected) - 2_000] - expected[2_000:-2_000]).max() < 0.1


@pytest.mark.parametrize(
    ("name", "codec", "layout", "rate", "atol"),
    [
        ("a.wav", "pcm_s16le", "7.1", 16_000, 1e-4),
        ("a.mkv", "pcm_s16le", "7.1", 16_000, 1e-4),
        ("a.mkv", "aac", "7.1", 16_000, 0.05),
        ("a.webm", "libopus", "7.1", 48_000, 0.05),
        ("a.mkv", "aac", "5.1", 48_000, 0.05),
        ("a.mkv", "pcm_f32le", "hexadecagonal", 16_000, 1e-6),
    ],
)
def test_many_channels_are_mixed_to_their_mean(name, codec, layout, rate, atol, tmp_path):
    count = len(av.AudioLayout(layout).channels)
    t = np.arange(rate) / rate
    channels = np.zeros((count, rate), np.float32)
    for c in range(count):
        channels[c] = 0.4 * (c + 1) / count * np.sin(2 * np.pi * (100 + 5 * c) * t)  # low: one may be a subwoofer
    waveform, _ = read_audio(write_media(tmp_path / name, codec, rate, layout=layout, channels=channels))
    inner = slice(rate // 4, rate // 2)
    np.testing.assert_allclose(waveform[inner], channels.mean(0)[inner], atol=atol)


@pytest.mark.parametrize("count", [1, 2, 9, 40, 64])
def test_channels_without_names(count, tmp_path):
    samples = np.random.default_rng(0).standard_normal((500, count)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    waveform, _ = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(waveform, samples.astype(np.float64).mean(1), atol=1e-6)
    np.testing.assert_array_equal(waveform, mix(samples.T))


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12), samples=st.integers(1, 50), scale=st.sampled_from([1e-6, 1.0, 3.0, 1e5]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_mixing_is_the_mean_whatever_the_memory_layout(count, samples, scale, seed):
    channels = (scale * np.random.default_rng(seed).standard_normal((count, samples))).astype(np.float32)
    mixed = mix(channels)
    np.testing.assert_allclose(mixed, channels.astype(np.float64).mean(0), atol=1e-6 * scale)
    np.testing.assert_array_equal(mixed, mix(np.asfortranarray(channels)))
    assert count > 1 or np.array_equal(mixed, channels[0])


def test_samples_beyond_full_scale_are_kept(tmp_path):
    samples = np.array([[1.5, -3.0, 0.25] * 100, [0.5, -1.0, 0.75] * 100], np.float32)
    waveform, _ = read_audio(encoded(samples, 16_000, format="WAV", subtype="FLOAT"))
    np.testing.assert_array_equal(waveform[:3], np.array([1.0, -2.0, 0.5], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 5e37, -5e37, 1e300])
@pytest.mark.parametrize("as_file", [True, False])
def test_samples_that_would_spoil_features_are_refused(value, as_file):
    samples = np.zeros((2, 1_000))
    samples[1, 700] = value
    source = encoded(samples, 16_000, format="WAV", subtype="DOUBLE") if as_file else samples
    assert reason_of(source, 16_000) == "bad_samples"


def test_late_sound_is_silent_until_it_begins(tmp_path):
    path = write_media(tmp_path / "a.mkv", "pcm_s16le", 16_000, start=2.0, video=True)
    waveform, rate = read_audio(path)
    assert len(waveform) == 3 * rate
    assert not waveform[: 2 * rate].any()
    np.testing.assert_allclose(waveform[2 * rate :], tone(rate)[0], atol=1e-4)


def test_the_suffix_does_not_matter(tmp_path):
    write_media(tmp_path / "a.mp4").rename(tmp_path / "a.wav")
    assert read_audio(tmp_path / "a.wav")[1] == 24_000
    for name in ("b.mp3", "b.raw", "b"):
        (tmp_path / name).write_bytes(encoded(tone(8_000), 8_000, format="FLAC"))
        assert read_audio(tmp_path / name)[1] == 8_000


def test_real_videos(shared_data):
    for path in sorted((shared_data / "videos").glob("*.mp4")):
        waveform, rate = read_audio(path)
        assert rate == 44_100 and len(waveform) / rate == pytest.approx(10, abs=0.1)
        assert read_middle_frame(path).size[0] > 100


def test_real_sounds_agree_with_libsndfile(shared_data):
    for path in sorted((shared_data / "stamps").glob("*.ogg")):
        expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
        np.testing.assert_allclose(read_audio(path)[0], expected.mean(1), atol=2e-6)


# What cannot be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "missing"),
        (lambda p: p.mkdir(), "not_a_file"),
        (os.mkfifo, "not_a_file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("hello " * 100), "damaged"),
        (lambda p: p.write_bytes(np.random.default_rng(0).bytes(100_000)), "damaged"),
        (lambda p: p.write_text("#EXTM3U\n#EXTINF:10,\n/etc/passwd\n"), "damaged"),
        (lambda p: soundfile.write(p, np.zeros(0), 8_000, format="WAV"), "empty"),
        (lambda p: write_media(p.with_suffix(".mp4"), None, video=True).rename(p), "no_audio"),
    ],
)
def test_unreadable_files_are_named(make, reason, tmp_path):
    path = tmp_path / "clip"
    make(path)
    with pytest.raises(ClipError) as error:
        read_audio(path)
    assert error.value.reason == reason and str(error.value).startswith(f"{path}: {reason}")
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.reason, str(again)) == (reason, str(error.value))


@pytest.mark.parametrize(
    ("source", "rate", "reason"),
    [
        (None, None, "missing"),
        ({"path": None, "bytes": None}, None, "missing"),
        ("nonsense://host/a.wav", None, "missing"),
        (b"", None, "empty"),
        (np.zeros(0), 16_000, "empty"),
        (io.StringIO("text"), None, "damaged"),
        (np.zeros((2, 3, 4)), 16_000, "bad_samples"),
        (np.zeros(4, np.int64), 16_000, "bad_samples"),
        (np.zeros(4, complex), 16_000, "bad_samples"),
        (["a", "b"], 16_000, "bad_samples"),
        ([[0.0], [0.0, 0.0]], 16_000, "bad_samples"),
        (object(), 16_000, "bad_samples"),
        *((np.zeros(400), rate, "bad_rate") for rate in (0, -1, 1, 1e9, float("inf"), float("nan"), "16000")),
    ],
)
def test_unusable_values(source, rate, reason):
    assert reason_of(source, rate) == reason


def test_file_names_are_no_protocols(tmp_path, monkeypatch):
    """ffmpeg would go to the network, wait for standard input, or read other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(encoded(tone(8_000), 8_000, format="WAV"))
    for name in (
        "http:127.0.0.1:9?x=.wav",
        "pipe:0",
        "concat:a.wav|a.wav",
        "file:a.wav",
        "subfile:a.wav",
        "async:a.wav",
    ):
        assert reason_of(name) == "missing"
    for text in (
        f"ffconcat version 1.0\nfile '{tmp_path / 'a.wav'}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'a.wav'}\n#EXT-X-ENDLIST\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=audio 9 RTP/AVP 0\n{tmp_path}",
    ):
        (tmp_path / "x.wav").write_text(text)
        assert reason_of("x.wav") == "damaged"
    (tmp_path / "pipe:0").write_bytes((tmp_path / "a.wav").read_bytes())  # a file's name may be anything
    assert read_audio("pipe:0")[1] == 8_000


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a", "mkv", "aiff"])
def test_a_cut_file_is_refused_or_gives_what_it_holds(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix in ("m4a", "mkv"):
        write_media(path, seconds=4.0)
    else:
        soundfile.write(path, tone(22_050, 4.0)[0], 22_050)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        waveform, rate = read_audio(path)
    except ClipError as error:
        assert error.reason in ("truncated", "damaged")
    else:
        assert suffix in ("ogg", "mp3", "wav")  # whose length follows from what is there
        assert 0.5 < len(waveform) / rate < 3 and waveform.std() > 0.2


def set_wav_sizes(data: bytes, size: int) -> bytes:
    place = data.index(b"data") + 4
    return data[:4] + struct.pack("<I", size) + data[8:place] + struct.pack("<I", size) + data[place + 4 :]


def set_flac_samples(data: bytes, count: int) -> bytes:
    word = int.from_bytes(data[18:26], "big") >> 36 << 36 | count
    return data[:18] + word.to_bytes(8, "big") + data[26:]


def test_streamed_files_declare_no_length():
    samples = tone(16_000)
    wav = encoded(samples, 16_000, format="WAV", subtype="FLOAT")
    for size in (0xFFFFFFFF, 0, 0x7FFFFFFF):  # as ffmpeg, sox and others write to a pipe
        np.testing.assert_array_equal(read_audio(set_wav_sizes(wav, size))[0], samples[0])
    flac = encoded(samples, 16_000, format="FLAC")
    np.testing.assert_array_equal(read_audio(set_flac_samples(flac, 0))[0], read_audio(flac)[0])


@pytest.mark.parametrize(
    "data",
    [
        set_flac_samples(encoded(tone(16_000), 16_000, format="FLAC"), (1 << 36) - 1),
        encoded(tone(16_000), 16_000, format="AIFF").replace(
            struct.pack(">hL", 1, 16_000), struct.pack(">hL", 1, 0x7FFFFFFF)
        ),
    ],
    ids=["flac", "aiff"],
)
def test_declared_lengths_take_no_memory(data):
    tracemalloc.start()
    assert reason_of(data) in ("truncated", "damaged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_decoding_ends_at_the_limit(monkeypatch):
    """Two hours of silence in a small file."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8_000, 1, format="FLAC") as file:
        for _ in range(120):
            file.write(np.zeros(60 * 8_000, np.int16))
    data = buffer.getvalue()
    assert len(data) < 1 << 20
    monkeypatch.setattr(audio_io, "MAX_SECONDS", 120.0)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ClipError, match="too_large: more than 2 minutes of sound: cut it into parts"):
        read_audio(data, target_rate=16_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120 * 8_000 * 4 * 2 and time.perf_counter() - begin < 20
    monkeypatch.setattr(audio_io, "MAX_SECONDS", 3600.0)
    monkeypatch.setattr(audio_io, "MAX_SAMPLES", 1 << 20)
    assert reason_of(data) == "too_large"


def test_rates_of_headers_are_checked():
    wav = encoded(tone(16_000), 16_000, format="WAV")
    for rate in (1, 100, 2_000_000_000):
        assert reason_of(wav[:24] + struct.pack("<I", rate) + wav[28:], None, 16_000) in ("bad_rate", "damaged")


def test_memory_errors_become_the_readers_own(monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(audio_io.soxr, "resample", fail)
    with pytest.raises(ClipError, match="Clip 0: out_of_memory"):
        read_batch([tone(8_000)[0]], 8_000, 16_000)
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(8_000)[0], 8_000)
    monkeypatch.setattr(audio_io.Track, "add", fail)
    with pytest.raises(ClipError, match=r"a\.wav: out_of_memory"):
        read_audio(path)


FORMATS = [{"format": name} for name in ("WAV", "FLAC", "OGG", "MP3")] + [{"format": "WAV", "subtype": "FLOAT"}]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_gives_finite_sound_or_a_reason(data):
    whole = bytearray(encoded(tone(16_000, 0.5, 2), 16_000, **data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(1, len(whole)))]
    try:
        waveform, rate = read_audio(bytes(whole))
    except ClipError as error:
        assert error.reason in REASONS
    else:
        assert waveform.ndim == 1 and len(waveform) and np.isfinite(waveform).all() and 1_000 <= rate <= 1_000_000


# Pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_the_middle_frame_is_the_one_in_the_middle(suffix, tmp_path):
    """Picture i is 8 i + 4 bright; the only key frames are those of MPEG-4's default, 12 apart."""
    path = write_media(tmp_path / f"a.{suffix}", "pcm_s16le" if suffix == "avi" else "aac", seconds=3.0, video=True)
    picture = read_middle_frame(path)
    assert picture.size == (64, 48) and picture.mode == "RGB"
    assert np.asarray(picture).mean() == pytest.approx(8 * 15 + 4, abs=6)


def test_no_picture(tmp_path):
    for path, reason in ((write_media(tmp_path / "a.m4a"), "no_video"), (tmp_path / "b.mp4", "missing")):
        with pytest.raises(ClipError) as error:
            read_middle_frame(path)
        assert error.value.reason == reason and str(path) in str(error.value)


def picture_bytes(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_pictures_from_every_source(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = picture_bytes(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(data)
    for source in (
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        io.BytesIO(data),
        {"bytes": data, "path": None},
        {"path": str(tmp_path / "a.png")},
        Image.fromarray(pixels),
    ):
        image = read_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_pictures_are_upright():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    turned = np.asarray(read_image(picture_bytes(image, exif=exif)))
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("values", "format"),
    [
        (np.linspace(0, 65535, 256).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 256).astype(np.uint16), "TIFF"),
        (np.linspace(0, 1, 256).astype(np.float32), "TIFF"),
    ],
)
def test_deep_grey_keeps_its_range(values, format):
    image = read_image(picture_bytes(Image.fromarray(values.reshape(16, 16)), format))
    np.testing.assert_array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "missing"),
        ("none.png", "missing"),
        (b"no picture", "damaged"),
        (picture_bytes(Image.new("RGB", (64, 64)))[:60], "damaged"),
        (picture_bytes(Image.new("L", (1, 60_000))), "too_large"),
        (picture_bytes(Image.new("1", (20_000, 20_000))), "too_large"),
        (picture_bytes(Image.fromarray(np.full((8, 8), 300.0, np.float32)), "TIFF"), "bad_samples"),
    ],
)
def test_unreadable_pictures(source, reason):
    with pytest.raises(ClipError) as error:
        read_image(source)
    assert error.value.reason == reason
