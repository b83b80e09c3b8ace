"""The K best pairs, by any rule, however the run went."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets_scripts.files import Folder
from datasets_scripts.filter_pairs import CaptionDistance, Captioner, Embedder, TopK, filter_pairs, main
from datasets_scripts.shards import commit_shard, finish, open_shards
from datasets_scripts.streaming import ShardStream
from tests.datasets_scripts.workloads import by_start

REPOSITORY = Path(__file__).resolve().parents[2]
PLAN = {"settings": {"frames": 2}}


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("source"))
    for index in range(4):
        rows = (
            {
                "id": f"{index}-{i:02d}",
                "audio": {"bytes": b"x", "path": None},
                "frames": [picture("red" if i % 2 else "blue"), picture("red")],
                "frame_times": [0.0, 1.0],
                "labels": ["red"],
                "source": "",
                "start": float((7 * i + index) % 50),
                "duration": 1.0,
            }
            for i in range(50)
        )
        commit_shard(folder, index, rows)
    finish(folder, PLAN)
    return folder.path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_best_are_kept_with_their_scores(shards, tmp_path):
    manifest = filter_pairs(shards, tmp_path, by_start, keep=30, name="start", progress=False)
    every = list(open_shards(shards))
    best = sorted(range(200), key=lambda i: (every[i]["start"], i))[:30]
    kept = list(open_shards(tmp_path))
    assert [row["id"] for row in kept] == [every[i]["id"] for i in sorted(best)]
    assert all(row["score"] == row["start"] for row in kept)
    assert manifest["rows"] == 30 and manifest["plan"]["filter"] == {"score": "start", "keep": 30, "of": 200}
    assert sorted(row["id"] for row in ShardStream(tmp_path)) == sorted(row["id"] for row in kept)
    before = content(tmp_path)
    filter_pairs(shards, tmp_path, None, keep=30, name="start", progress=False)  # nothing is scored again
    assert content(tmp_path) == before
    assert filter_pairs(shards, tmp_path, None, keep=500, name="start", progress=False)["rows"] == 200
    with pytest.raises(ValueError, match='score was "start", is "other"'):
        filter_pairs(shards, tmp_path, by_start, keep=30, name="other", progress=False)


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 70), st.integers(1, 9))
def test_top_k_against_sorting(scores, k, step):
    top = TopK(k)
    for first in range(0, len(scores), step):
        part = np.array(scores[first : first + step], float)
        top.add(part, np.stack([np.zeros(len(part), int), np.arange(first, first + len(part))], axis=1))
        assert len(top._scores) <= 2 * k + step
    expected = sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:k])
    assert top.positions()[:, 1].tolist() == expected


KILLED = """
import os, signal, sys
from datasets_scripts import files, filter_pairs
sys.path.insert(0, os.getcwd())
from tests.datasets_scripts.workloads import by_start
calls, at, write = 0, int(sys.argv[1]), files.HashingFile.write
def dying(self, data):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
files.HashingFile.write = dying
filter_pairs.filter_pairs(sys.argv[2], sys.argv[3], by_start, 30, "start", progress=False)
"""


def test_killed_and_run_again(shards, tmp_path):
    filter_pairs(shards, tmp_path / "whole", by_start, keep=30, name="start", progress=False)
    for at in (9, 40):
        command = [sys.executable, "-c", KILLED, str(at), shards, str(tmp_path / "killed")]
        assert subprocess.run(command, cwd=REPOSITORY).returncode != 0
    filter_pairs(shards, tmp_path / "killed", by_start, keep=30, name="start", progress=False)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_processes_and_ray_give_the_same(shards, tmp_path, ray_cluster):
    filter_pairs(shards, tmp_path / "one", by_start, keep=30, name="start", progress=False)
    filter_pairs(shards, tmp_path / "two", by_start, keep=30, name="start", workers=2, progress=False)
    filter_pairs(shards, tmp_path / "ray", by_start, 30, "start", engine="ray", workers=1, progress=False)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "ray")


def colours(pictures):
    return [
        "a red thing" if picture.convert("RGB").getpixel((0, 0))[0] > 128 else "a blue thing" for picture in pictures
    ]


def embed(texts):
    return np.array([[("red" in text) * 2.0, ("blue" in text) * 3.0, 0.0] for text in texts])


def test_the_distance_of_captions_to_labels(shards, tmp_path):
    """Red labels: clips with two red frames are at distance 0, those with one at 1/2."""
    score = CaptionDistance(colours, embed)
    rows = list(open_shards(shards))[:4]
    assert np.allclose(score(rows), [0.5, 0, 0.5, 0])
    names = CaptionDistance(colours, embed, {"/m/1": "blue"})
    assert np.allclose(names([{**rows[0], "labels": ["/m/1"]}]), [0.5])
    with pytest.raises(ValueError, match="'0-00' has no label"):
        score([{**rows[0], "labels": []}])
    with pytest.raises(ValueError, match="'0-00' has no frame"):
        score([{**rows[0], "frames": []}])
    with pytest.raises(ValueError, match=r"the label '/m/2', which has no name"):
        names([{**rows[0], "labels": ["/m/2"]}])


def test_an_image_captioner_of_transformers(tmp_path):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "[DEC]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    text = {
        **small,
        "vocab_size": 30,
        "encoder_hidden_size": 16,
        "bos_token_id": 13,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(
        tmp_path / "model"
    )
    captions = Captioner(str(tmp_path / "model"), max_new_tokens=4)(
        [Image.new("L", (20, 30)), Image.new("RGB", (9, 9))]
    )
    assert len(captions) == 2 and all(isinstance(caption, str) for caption in captions)


def test_an_embedder_of_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=13, **shape)).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"))
    library.SentenceTransformer(modules=[transformer, Pooling(16)]).save(str(tmp_path / "model"))
    vectors = Embedder(str(tmp_path / "model"))(["a b", "c", "a b"])
    assert vectors.shape == (3, 16) and np.allclose(vectors[0], vectors[2]) and not np.allclose(vectors[0], vectors[1])


def test_the_command_line(shards, tmp_path, capsys):
    (tmp_path / "rules.py").write_text("def last(rows):\n    return [-row['start'] for row in rows]\n")
    arguments = [shards, "--output", str(tmp_path / "out"), "--keep", "10", "--quiet"]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert main([*arguments, "--score", "rules:last"]) == 0
    finally:
        os.chdir(here)
    assert "kept 10 of 200" in capsys.readouterr().out
    assert min(open_shards(tmp_path / "out")["start"]) >= 47
    assert main([shards, "--output", str(tmp_path / "b"), "--keep", "10", "--quiet", "--column", "start"]) == 0
    assert main([shards, "--output", str(tmp_path / "c"), "--keep", "10", "--quiet", "--column", "x"]) == 1
    assert "no column 'x'" in capsys.readouterr().err
    assert main([shards, "--output", str(tmp_path / "d"), "--keep", "10", "--quiet", "--score", "none:x"]) == 1
    assert "does not import" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "keep.json").read_text()) == 10


@pytest.mark.parametrize("score", [lambda rows: [float("nan")] * len(rows), lambda rows: [1.0], lambda rows: 1.0])
def test_scores_that_are_none_are_refused(shards, tmp_path, score):
    with pytest.raises(ValueError, match="score of"):
        filter_pairs(shards, tmp_path, score, keep=5, name="bad", progress=False)
