import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_vipant.cli import duration, main, page
from modeling_vipant.library import (
    Embedder,
    Hit,
    LibraryError,
    SoundLibrary,
    check_labels,
    classify,
    index_folder,
    sound_files,
)
from tests.tiny_vipant import tiny_processor, tiny_vipant

REPO = Path(__file__).resolve().parents[2]


def write_sound(path: Path, seed: int, seconds: float = 0.6, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).standard_normal(int(seconds * rate))
    pitch = np.sin(2 * np.pi * (200 + 150 * seed) * np.arange(len(noise)) / rate)
    soundfile.write(path, 0.3 * pitch + 0.02 * noise, rate)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, folder in enumerate(folders):
        tiny_vipant(seed).save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def embedder(models):
    return Embedder.load(str(models[0]))


@pytest.fixture
def sounds(tmp_path):
    root = tmp_path / "sounds"
    for i, name in enumerate(["a.wav", "b.flac", "deep/c.ogg", "deep/er/d.wav"]):
        write_sound(root / name, seed=i)
    write_sound(root / ".hidden.wav", seed=9)
    (root / "notes.txt").write_text("no sound")
    return root


def run(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def files(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_index_then_search_by_text_sound_and_picture(sounds, models, embedder, tmp_path, capsys):
    run("index", sounds, "--model", models[0], "--workers", 0)
    assert "4 new, 0 changed, 0 unchanged, 0 removed, 0 unreadable" in capsys.readouterr().out

    run("search", "--audio", sounds / "deep" / "c.ogg", "--library", sounds, "--json")
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 4 and hits[0]["path"] == "deep/c.ogg"
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-5) and hits[0]["seconds"] == pytest.approx(0.6)

    # The same order and scores as the model's own similarities.
    paths = ["a.wav", "b.flac", "deep/c.ogg", "deep/er/d.wav"]
    waveforms = [soundfile.read(sounds / path, dtype="float32")[0] for path in paths]
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "photo.jpg")
    inputs = tiny_processor()(
        audio=waveforms,
        text=["rain on a tin roof"],
        images=[Image.open(tmp_path / "photo.jpg")],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = embedder.model(**inputs)
    for query, vector in (
        (["rain on a tin roof"], output.text_embeds[0]),
        (["--image", tmp_path / "photo.jpg"], output.image_embeds[0]),
    ):
        run("search", *query, "--library", sounds, "--json", "--top", 3)
        hits = json.loads(capsys.readouterr().out)
        expected = output.audio_embeds @ vector
        order = expected.argsort(descending=True)[:3]
        assert [hit["path"] for hit in hits] == [paths[i] for i in order]
        np.testing.assert_allclose([hit["score"] for hit in hits], expected[order], atol=1e-5)


def test_table_and_page(sounds, models, tmp_path, capsys):
    run("index", sounds, "--model", models[0], "--workers", 0)
    (tmp_path / "out").mkdir()
    run("search", "bells", "--library", sounds, "--top", 2, "--html", tmp_path / "out" / "page.html")
    table = capsys.readouterr().out
    assert len(re.findall(r"^ +[12] +-?\d\.\d{3} +0:00\.6 +\S+$", table, re.MULTILINE)) == 2
    text = (tmp_path / "out" / "page.html").read_text()
    sources = re.findall(r'<audio controls preload="metadata" src="([^"]+)"', text)
    assert len(sources) == 2
    assert all((tmp_path / "out" / source).resolve().is_file() for source in sources)


def test_page_escapes_names(tmp_path):
    text = page("<b>q</b>", [Hit('a"<script>.wav', -0.1, 61.0)], tmp_path, tmp_path)
    assert "<script>" not in text and "<b>" not in text
    assert "a%22%3Cscript%3E.wav" in text and "1:01" in text


@pytest.mark.parametrize(("seconds", "text"), [(3.24, "0:03.2"), (59.94, "0:59.9"), (60, "1:00"), (760, "12:40")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_update_reads_only_new_and_changed_files(sounds, embedder, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index_folder(sounds, index, embedder)
    read = []
    original = Embedder.windows
    monkeypatch.setattr(Embedder, "windows", lambda self, path: read.append(path.name) or original(self, path))

    before = files(index)
    report = index_folder(sounds, index, embedder)
    assert (report.added, report.changed, report.unchanged, report.removed, read) == (0, 0, 4, 0, [])
    assert files(index) == before  # nothing to do, nothing written

    write_sound(sounds / "new.wav", seed=5)
    write_sound(sounds / "b.flac", seed=6, seconds=0.9)
    (sounds / "a.wav").unlink()
    report = index_folder(sounds, index, embedder)
    assert (report.added, report.changed, report.unchanged, report.removed) == (1, 1, 2, 1)
    assert sorted(read) == ["b.flac", "new.wav"]

    fresh = tmp_path / "fresh"
    index_folder(sounds, fresh, embedder)
    one, other = SoundLibrary.load(index), SoundLibrary.load(fresh)
    assert one.files.equals(other.files)
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-6)
    assert len(list(index.iterdir())) == 3  # files of older generations are gone


def test_long_files_are_averaged_over_windows(embedder, tmp_path):
    seconds = embedder.processor.feature_extractor.window_samples / 16_000  # 0.64
    write_sound(tmp_path / "long.wav", seed=1, seconds=3 * seconds)
    windows = embedder.windows(tmp_path / "long.wav")
    assert windows["window_seconds"].tolist() == pytest.approx([seconds] * 3, abs=1e-3)
    embeds = embedder.model.get_audio_features(windows["input_features"]).pooler_output
    torch.testing.assert_close(embedder.sounds([windows])[0], F.normalize(embeds.mean(0), dim=0))
    write_sound(tmp_path / "odd.wav", seed=1, seconds=1.25 * seconds)
    windows = embedder.windows(tmp_path / "odd.wav")  # the second one is a quarter as long, and counts a quarter
    embeds = embedder.model.get_audio_features(windows["input_features"]).pooler_output
    torch.testing.assert_close(embedder.sounds([windows])[0], F.normalize(embeds[0] + 0.25 * embeds[1], dim=0))
    write_sound(tmp_path / "rest.wav", seed=1, seconds=seconds + 0.02)
    windows = embedder.windows(tmp_path / "rest.wav")  # what is shorter than a frame has no window
    assert windows["window_seconds"].tolist() == pytest.approx([seconds + 0.02], abs=1e-3)


def test_other_rates_and_channels(embedder, tmp_path):
    time = np.arange(44_100) / 44_100
    wave = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "stereo.wav", np.stack([2 * wave, 0 * wave], 1), 44_100, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", wave, 44_100, subtype="FLOAT")
    stereo, mono = (embedder.sounds([embedder.windows(tmp_path / f"{n}.wav")]) for n in ("stereo", "mono"))
    torch.testing.assert_close(stereo, mono)


def test_unreadable_files_are_reported_and_the_rest_indexed(sounds, models, capsys):
    (sounds / "broken.wav").write_bytes(b"RIFF no sound at all")
    (sounds / "empty.mp3").write_bytes(b"")
    run("index", sounds, "--model", models[0], "--workers", 2)
    captured = capsys.readouterr()
    assert "4 new" in captured.out and "2 unreadable" in captured.out
    assert "not read: broken.wav:" in captured.err and "not read: empty.mp3:" in captured.err
    assert len(SoundLibrary.load(sounds / ".vipant").files) == 4


def error_of(*arguments) -> str:
    with redirect_stderr(io.StringIO()) as told:
        assert main([str(argument) for argument in arguments]) == 1
    line = told.getvalue().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_empty_and_missing_folders(models, tmp_path, sounds):
    (tmp_path / "empty").mkdir()
    assert "holds no sounds (looked for .aac" in error_of("index", tmp_path / "empty", "--model", models[0])
    assert "is no folder" in error_of("index", tmp_path / "nowhere", "--model", models[0])
    assert "needs --model" in error_of("index", sounds)
    assert "make one with `vipant index`" in error_of("search", "rain", "--library", tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_bytes(b"nothing")
    assert "none of the 1 sound files" in error_of("index", tmp_path / "bad", "--model", models[0], "--workers", 0)


def test_an_emptied_folder_keeps_the_old_index(sounds, models, embedder):
    run("index", sounds, "--model", models[0], "--workers", 0)
    before = files(sounds / ".vipant")
    for path in list(sound_files(sounds)):
        (sounds / path).unlink()
    assert "holds no sounds" in error_of("index", sounds)
    assert files(sounds / ".vipant") == before


def test_another_models_index_is_refused_and_left_whole(sounds, models):
    run("index", sounds, "--model", models[0], "--workers", 0)
    before = files(sounds / ".vipant")
    assert "was made by another model" in error_of("index", sounds, "--model", models[1], "--workers", 0)
    assert "was made by another model" in error_of("search", "rain", "--library", sounds, "--model", models[1])
    assert files(sounds / ".vipant") == before


def test_fingerprint_sees_weights_and_front_end_but_not_the_place(models, tmp_path):
    one = Embedder.load(str(models[0]))
    one.model.save_pretrained(tmp_path)
    one.processor.save_pretrained(tmp_path)
    again = Embedder.load(str(tmp_path))
    assert again.fingerprint() == one.fingerprint()
    again.processor.feature_extractor.mean += 0.1
    assert again.fingerprint() != one.fingerprint()
    again = Embedder.load(str(tmp_path))
    again.model.audio_projection.weight.data[0, 0] += 1e-3
    assert again.fingerprint() != one.fingerprint()


@pytest.mark.parametrize("damage", ["header", "embeddings", "files", "lengths"])
def test_damaged_index_is_named(sounds, embedder, tmp_path, damage):
    index = tmp_path / "index"
    index_folder(sounds, index, embedder)
    if damage == "header":
        (index / "index.json").write_text("{")
    elif damage == "lengths":
        header = json.loads((index / "index.json").read_text())
        np.save(index / header["embeddings"], np.zeros((2, 24), np.float32))
    else:
        next(index.glob(f"{damage}-*")).write_bytes(b"x")
    with pytest.raises(LibraryError, match="is damaged"):
        SoundLibrary.load(index)


def test_interrupted_indexing_keeps_what_is_done(sounds, embedder, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index_folder(sounds, index, embedder)
    old = SoundLibrary.load(index)
    for i in range(10):
        write_sound(sounds / f"more{i}.wav", seed=i)
    calls = []
    original = Embedder.sounds

    def interrupted(self, windows):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, windows)

    monkeypatch.setattr(Embedder, "sounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index_folder(sounds, index, embedder)
    now = SoundLibrary.load(index)
    assert len(now.files) == len(old.files) + 8  # one batch
    monkeypatch.undo()
    report = index_folder(sounds, index, embedder)
    assert (report.added, report.unchanged) == (2, 12)


def test_a_killed_run_leaves_the_old_index_whole(sounds, models, embedder, tmp_path):
    """SIGKILL at the worst moment: the new data files are written, the header not yet replaced."""
    index = tmp_path / "index"
    index_folder(sounds, index, embedder)
    old = SoundLibrary.load(index)
    write_sound(sounds / "more.wav", seed=7)
    code = f"""
import os, signal, sys
from pathlib import Path
from modeling_vipant.library import Embedder, index_folder
Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
index_folder(Path({str(sounds)!r}), Path({str(index)!r}), Embedder.load({str(models[0])!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert result.returncode == -9
    assert len(list(index.glob("embeddings-*"))) == 2  # it was killed where it hurts
    now = SoundLibrary.load(index)
    assert now.files.equals(old.files)
    np.testing.assert_array_equal(now.embeddings, old.embeddings)
    assert index_folder(sounds, index, embedder).added == 1
    assert len(list(index.iterdir())) == 3


def test_classify(sounds, models, embedder, capsys):
    run("classify", sounds / "a.wav", sounds / "b.flac", "--labels", "dog,rain,church_bells", "--model", models[0])
    text = capsys.readouterr().out
    assert text.count("church bells") == 2 and "a.wav" in text
    run("classify", sounds / "a.wav", "--labels", "dog,rain,church_bells", "--model", models[0], "--json")
    (got,) = json.loads(capsys.readouterr().out).values()
    inputs = tiny_processor()(
        audio=[soundfile.read(sounds / "a.wav", dtype="float32")[0]],
        text=["the sound of dog", "the sound of rain", "the sound of church bells"],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = embedder.model(**inputs).logits_per_audio.softmax(-1)[0].tolist()
    assert got == pytest.approx(dict(zip(["dog", "rain", "church bells"], expected, strict=True)), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["dog"], "1 label given"),
        (["dog", "rain", "Dog"], "labels occur twice: Dog, dog"),
        (["church_bells", "church bells"], "labels occur twice"),
        (["dog", " "], "a label is empty"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(LibraryError, match=message):
        check_labels(labels)


def test_bad_requests_are_refused(sounds, models, embedder):
    run("index", sounds, "--model", models[0], "--workers", 0)
    with pytest.raises(LibraryError, match=r"has no \{\}"):
        classify(embedder, [sounds / "a.wav"], ["dog", "rain"], prompt="the sound")
    assert "--top 0" in error_of("search", "rain", "--library", sounds, "--top", 0)
    assert "the query is empty" in error_of("search", " ", "--library", sounds)
    assert "no such file" in error_of("search", "--audio", sounds / "nope.wav", "--library", sounds)
    assert "nope.jpg" in error_of("search", "--image", sounds / "nope.jpg", "--library", sounds)
    with pytest.raises(SystemExit):
        run("search", "rain", "--audio", sounds / "a.wav", "--library", sounds)
