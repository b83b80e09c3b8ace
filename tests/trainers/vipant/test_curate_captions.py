import json

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets_scripts.builders.audiotxt import audiotxt
from tests.tiny_vipant import tiny_clip, tiny_processor
from trainers.vipant import curate_captions
from trainers.vipant.curate_captions import Encoder, curate, main, read_caption_pool, top_captions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    tiny_processor().image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder.load(str(model), torch.device("cpu"))


def videos(clips: int = 7) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    frames = [
        [Image.fromarray(generator.integers(0, 255, (30, 30, 3), dtype=np.uint8)) for _ in range(2)]
        for _ in range(clips)
    ]
    features = datasets.Features({"id": datasets.Value("string"), "frames": datasets.List(datasets.Image())})
    return datasets.Dataset.from_dict({"id": [f"clip{i}" for i in range(clips)], "frames": frames}, features=features)


CAPTIONS = [(10 + 3 * i, caption) for i, caption in enumerate(["rain", "a dog", "bells", "the sea", "an engine hums"])]
BLOCKS = {"clips_per_block": 3, "captions_per_block": 2, "batch_size": 2}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_hold_each_frames_nearest_captions(encoder, tmp_path):
    rows = videos()
    index = curate(encoder, rows, CAPTIONS, tmp_path, top_k=3, **BLOCKS)
    images = encoder.images([frame for row in rows for frame in row["frames"]], 64)
    texts = encoder.texts([caption for _, caption in CAPTIONS], 64)
    best = (images.double() @ texts.double().T).numpy()
    expected = [
        [f"clip{i // 2}.p0.2_{i % 2}", [CAPTIONS[n][0] for n in np.argsort(-row)[:3]]] for i, row in enumerate(best)
    ]
    assert lines(index) == expected
    assert lines(tmp_path / "captions.jsonl") == [list(caption) for caption in CAPTIONS]
    assert not (tmp_path / "blocks").exists()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    columns=st.integers(1, 6),
    data=st.data(),
)
def test_blockwise_search_is_exact_with_ties(seed, frames, sizes, columns, data):
    generator = np.random.default_rng(seed)
    top_k = data.draw(st.integers(1, sum(sizes)))
    images = generator.integers(-1, 2, (frames, 3)).astype(np.float32)  # few values: many ties
    blocks = [generator.integers(-1, 2, (size, 3)).astype(np.float32) for size in sizes]
    scores = images @ np.concatenate(blocks).T
    got = top_captions(torch.from_numpy(images), blocks, top_k, columns).numpy()
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(np.take_along_axis(scores, got, 1), np.take_along_axis(scores, expected, 1))
    assert all(len(set(row)) == top_k for row in got.tolist())


def test_interrupted_run_goes_on_and_gives_the_same(encoder, tmp_path, monkeypatch):
    whole = curate(encoder, videos(), CAPTIONS, tmp_path / "whole", top_k=2, **BLOCKS).read_text()

    calls = []
    original = curate_captions.top_captions

    def search(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(curate_captions, "top_captions", search)
    with pytest.raises(KeyboardInterrupt):
        curate(encoder, videos(), CAPTIONS, tmp_path / "cut", top_k=2, **BLOCKS)
    assert not (tmp_path / "cut" / "index.jsonl").exists()
    again = curate(encoder, videos(), CAPTIONS, tmp_path / "cut", top_k=2, **BLOCKS)
    assert again.read_text() == whole
    assert len(calls) == 1 + 1 + 2  # one block done, one cut off, then that one and the last


def test_blocks_of_another_run_are_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(curate_captions, "top_captions", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        curate(encoder, videos(), CAPTIONS, tmp_path, top_k=2, **BLOCKS)
    with pytest.raises(ValueError, match="top_k was 2, is 3"):
        curate(encoder, videos(), CAPTIONS, tmp_path, top_k=3, **BLOCKS)


def test_unreadable_frames_are_listed(encoder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = tmp_path / "good.png"
    Image.new("RGB", (20, 20), "red").save(good)
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "image": [str(good), str(broken)]})
    index = curate(encoder, rows, CAPTIONS, tmp_path / "out", top_k=1)
    assert [name for name, _ in lines(index)] == ["a.p0.1_0"]
    (failure,) = lines(tmp_path / "out" / "failures.jsonl")
    assert failure["id"] == "b" and "cannot identify image" in failure["reason"]


def test_random_control_ignores_the_pictures_but_follows_from_the_seed(encoder, tmp_path):
    settings = BLOCKS | {"random_control": True, "top_k": 3}
    first = curate(encoder, videos(), CAPTIONS, tmp_path / "a", **settings).read_text()
    assert curate(encoder, videos(), CAPTIONS, tmp_path / "b", **settings).read_text() == first
    assert first != curate(encoder, videos(), CAPTIONS, tmp_path / "c", top_k=3, **BLOCKS).read_text()


def test_the_builder_of_curated_captions_reads_the_files(encoder, tmp_path):
    curate(encoder, videos(2), CAPTIONS, tmp_path / "out", top_k=1, **BLOCKS)
    (tmp_path / "media").mkdir()
    for i in range(2):
        soundfile.write(tmp_path / "media" / f"clip{i}.wav", np.zeros(800), 16_000)
    rows = audiotxt(tmp_path / "out" / "index.jsonl", tmp_path / "out" / "captions.jsonl", tmp_path / "media")
    names = dict(CAPTIONS)
    expected = {name.split(".")[0]: [] for name, _ in lines(tmp_path / "out" / "index.jsonl")}
    for name, ids in lines(tmp_path / "out" / "index.jsonl"):
        expected[name.split(".")[0]] += [names[i] for i in ids if names[i] not in expected[name.split(".")[0]]]
    assert dict(zip(rows["id"], rows["captions"], strict=True)) == expected


def test_command_line(model, tmp_path, capsys):
    videos(3).to_parquet(tmp_path / "videos.parquet")
    (tmp_path / "pool.txt").write_text("rain\na dog\n")
    output = tmp_path / "out"
    arguments = ["--dataset", tmp_path / "videos.parquet", "--captions", tmp_path / "pool.txt", "--output", output]
    main([str(argument) for argument in ["--model", model, *arguments, "--top_k", 2]])
    assert "0 frames could not be read" in capsys.readouterr().out
    assert len(lines(output / "index.jsonl")) == 6
    assert main([str(argument) for argument in ["--model", model, *arguments, "--top_k", 3]]) == 1
    assert "error: top_k=3 must be between 1 and the number of captions, 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pool.txt", "rain\n\n", "line 2: no caption"),
        ("pool.txt", "", "holds no captions"),
        ("pool.jsonl", '[0, "rain"]\n{"a": 1}\n', "line 2"),
        ("pool.jsonl", '[0, "rain"]\n[0, "dog"]\n', "line 2: the id 0 occurs twice"),
    ],
)
def test_bad_caption_files_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_caption_pool(tmp_path / name)
