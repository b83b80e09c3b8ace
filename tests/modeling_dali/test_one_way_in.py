"""The same sound gives the same features to the last bit, whichever way it comes in."""

import io

import numpy as np
import pytest
import soundfile
import soxr
import torch

from datasets_scripts.prepare import clips_of, prepare
from datasets_scripts.records import Settings
from datasets_scripts.shards import open_shards
from modeling_dali.pipeline_dali import cut_windows
from modeling_vipant.library import Embedder
from tests.tiny import tiny_dali
from tests.tiny_vipant import tiny_processor, tiny_vipant
from trainers.dali.data_collator import AlignmentCollator, DaliDataCollator
from trainers.vipant.data_collator import ClipCollator

RATE = 16_000
RATES = [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000]
CHANNELS = ["mono", "left", "right", "both"]
CASES = [(rate, "right") for rate in RATES] + [(rate, name) for rate in (RATE, 48_000) for name in CHANNELS]


@pytest.fixture(scope="module")
def processor():
    return tiny_dali()[1]


def sweep(rate: int, channels: str) -> np.ndarray:
    """0.6 s [samples, channels], from 200 to 2,000 Hz; in steps of two of 16 bits, so that a mean of two is exact."""
    t = np.arange(round(0.6 * rate)) / rate
    sound = np.rint(12_000 * np.sin(2 * np.pi * (200 * t + 1_500 * t * t))) * 2
    silence = np.zeros_like(sound)
    columns = {"mono": [sound], "left": [sound, silence], "right": [silence, sound], "both": [sound, -sound // 4 * 2]}
    return np.stack(columns[channels], axis=1).astype(np.int16)


def features(processor, audio, **kwargs) -> torch.Tensor:
    return processor(text="<audio>", audio=audio, return_tensors="pt", **kwargs)["input_features"]


@pytest.mark.parametrize(("rate", "channels"), CASES)
def test_dali(processor, rate, channels, tmp_path):
    extractor, path = processor.feature_extractor, tmp_path / "a.wav"
    pcm = sweep(rate, channels)
    soundfile.write(path, pcm, rate)
    data, floats = path.read_bytes(), (pcm / 32768).astype(np.float32)
    mean = soxr.resample(floats.mean(1), rate, RATE)
    expected = extractor(mean, sampling_rate=RATE)["input_features"]
    assert expected.isfinite().all()
    assert extractor(mean, RATE)["input_features_mask"].sum() == pytest.approx(58, abs=1)

    for source in (str(path), path, data, io.BytesIO(data), {"path": str(path)}, {"bytes": data, "path": None}):
        assert torch.equal(extractor(source)["input_features"], expected)
        assert torch.equal(extractor([source], sampling_rate=rate)["input_features"], expected)
        assert torch.equal(features(processor, source), expected)
        assert torch.equal(features(processor, [source], sampling_rate=rate), expected)
    for array in (pcm, floats.T, torch.from_numpy(floats), floats.T.astype(np.float64)):
        assert torch.equal(extractor([array], sampling_rate=rate)["input_features"], expected)
        assert torch.equal(features(processor, array, sampling_rate=rate), expected)
        as_dict = {"array": array, "sampling_rate": rate}
        assert torch.equal(features(processor, as_dict), expected)

    for block in ({"path": str(path)}, {"url": path.as_uri()}, {"audio": str(path)}, {"audio": floats.T}):
        conversation = [{"role": "user", "content": [{"type": "audio", **block}, {"type": "text", "text": "a dog"}]}]
        inputs = processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"sampling_rate": rate},
        )
        assert torch.equal(inputs["input_features"], expected)

    row = {"id": "a", "audio": {"path": str(path), "bytes": None}, "caption": "a dog", "image": _picture()}
    assert torch.equal(AlignmentCollator(processor, augment=False)([row])["input_features"], expected)
    assert torch.equal(DaliDataCollator(processor)([row])["input_features"], expected)
    windows = list(cut_windows(processor, str(path)))
    assert torch.equal(features(processor, [windows[0].samples], sampling_rate=RATE), expected)


def _picture():
    from PIL import Image

    return Image.new("RGB", (16, 16))


def test_video_in_a_chat_gives_its_sound(processor, tmp_path):
    soundfile.write(tmp_path / "a.wav", sweep(RATE, "left"), RATE)
    path = str(tmp_path / "a.wav")
    expected = features(processor, path)
    for content in (
        [{"type": "video", "path": path}],
        [{"type": "video", "path": path}, {"type": "audio"}],
        [{"type": "audio", "path": path}],
    ):
        conversation = [{"role": "user", "content": [*content, {"type": "text", "text": "a dog"}]}]
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", load_audio_from_video=True
        )
        assert torch.equal(inputs["input_features"], expected)
        assert (inputs["input_ids"] == processor.audio_token_id).sum() == processor.audio_seq_length


@pytest.mark.parametrize(("rate", "channels"), CASES)
def test_vipant(rate, channels, tmp_path):
    processor = tiny_processor()
    extractor, path = processor.feature_extractor, tmp_path / "a.wav"
    pcm = sweep(rate, channels)
    soundfile.write(path, pcm, rate)
    data, floats = path.read_bytes(), (pcm / 32768).astype(np.float32)
    expected = extractor(soxr.resample(floats.mean(1), rate, RATE), RATE)["input_features"]
    for source in (str(path), path, data, {"path": str(path)}, {"array": floats.T, "sampling_rate": rate}):
        assert torch.equal(processor(audio=source, return_tensors="pt")["input_features"], expected)
        assert torch.equal(
            processor(audio=[source], sampling_rate=rate, return_tensors="pt")["input_features"], expected
        )
    assert torch.equal(processor(audio=floats.T, sampling_rate=rate, return_tensors="pt")["input_features"], expected)

    row = {"id": "a", "audio": {"path": str(path), "bytes": None}}
    assert torch.equal(ClipCollator(processor, ["audio"])([row])["input_features"], expected)
    embedder = Embedder(tiny_vipant(), processor, "tiny")
    assert torch.equal(embedder.windows(path)["input_features"], expected)


@pytest.mark.parametrize("keep", [RATE, None])
def test_prepare(processor, keep, tmp_path):
    """Shards hold 16 bits: sound that comes in 16 bits at the rate that is kept goes through them unchanged."""
    (tmp_path / "in").mkdir()
    cases = [(rate, channels) for rate in ([RATE] if keep else RATES) for channels in CHANNELS]
    for rate, channels in cases:
        soundfile.write(tmp_path / "in" / f"{rate}-{channels}.wav", sweep(rate, channels), rate)
    names = sorted(path.name for path in (tmp_path / "in").iterdir())
    (tmp_path / "in" / "files.txt").write_text("\n".join(names))
    requests = clips_of(tmp_path / "in" / "files.txt", seconds=None)
    prepare(requests, tmp_path / "out", Settings(frames=0, sampling_rate=keep), workers=1, progress=False)
    rows = list(open_shards(tmp_path / "out"))
    assert [row["id"] + ".wav" for row in rows] == names
    for row in rows:
        assert row["audio"]["bytes"].startswith(b"fLaC")
        expected = features(processor, str(tmp_path / "in" / f"{row['id']}.wav"))
        assert torch.equal(features(processor, row["audio"]), expected)


def test_prepare_keeps_sound_beyond_full_scale(processor, tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, 3 * sweep(RATE, "left") / 32768, RATE, subtype="FLOAT")
    (tmp_path / "files.txt").write_text("loud.wav")
    requests = clips_of(tmp_path / "files.txt", seconds=None)
    prepare(requests, tmp_path / "out", Settings(frames=0), workers=1, progress=False)
    row = next(iter(open_shards(tmp_path / "out")))
    assert torch.equal(features(processor, row["audio"]), features(processor, str(path)))
