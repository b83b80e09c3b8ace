import json

import numpy as np
import pytest
import soundfile
import torch

from tests.tiny_vipant import tiny_processor, tiny_vipant
from trainers.recipes import load_rows
from trainers.vipant.evaluate import evaluate_classification, main

CAPTIONS = [["rain", "it rains"], ["a dog"], ["bells", "a bell", "church"], ["the sea"], ["wind", "a storm"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(5):
        noise = np.random.default_rng(i).standard_normal(9_600)
        pitch = np.sin(np.arange(9_600) * 0.1 * (i + 1))
        soundfile.write(folder / f"{i}.wav", 0.1 * noise + 0.3 * pitch, 16_000)
    labels = ["dog_bark", "rain", "rain", "dog_bark", "sea"]
    rows = [
        {"id": f"c{i}", "audio": str(folder / f"{i}.wav"), "captions": CAPTIONS[i], "labels": labels[i], "fold": i % 2}
        for i in range(5)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_vipant(4).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return folder


def embeddings(folder, texts):
    inputs = tiny_processor()(
        audio=[soundfile.read(folder / f"{i}.wav", dtype="float32")[0] for i in range(5)],
        text=texts,
        sampling_rate=16_000,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = tiny_vipant(4)(**inputs)
    return output.audio_embeds, output.text_embeds


def run(folder, task, *options):
    return main([task, "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), *options])


def test_retrieval_with_several_captions(folder, tmp_path, capsys):
    run(folder, "retrieval", "--output", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["ids"] == [f"c{i}" for i in range(5)] and "text_to_audio_r@1" in capsys.readouterr().out
    texts = [caption for own in CAPTIONS for caption in own]
    owner = [i for i, own in enumerate(CAPTIONS) for _ in own]
    audio, text = embeddings(folder, texts)
    scores = (audio @ text.T).numpy()
    hit = np.mean([owner[row.argmax()] == i for i, row in enumerate(scores)])
    assert record["results"]["audio_to_text_r@1"] == pytest.approx(hit)
    hit = np.mean([column.argmax() == owner[j] for j, column in enumerate(scores.T)])
    assert record["results"]["text_to_audio_r@1"] == pytest.approx(hit)


def test_classification_by_prompts_and_folds(folder):
    rows = load_rows(str(folder / "rows.jsonl"))
    results = evaluate_classification(tiny_vipant(4), tiny_processor(), rows)
    assert set(results) == {"{}", "the sound of {}", "ensemble"}
    audio, text = embeddings(folder, ["the sound of dog bark", "the sound of rain", "the sound of sea"])
    right = (audio @ text.T).argmax(1) == torch.tensor([0, 1, 1, 0, 2])
    folds = torch.tensor([0, 1, 0, 1, 0])
    expected = np.mean([right[folds == fold].float().mean() for fold in (0, 1)])
    assert results["the sound of {}"]["accuracy"] == pytest.approx(expected)


def test_ensembles_take_the_nearest_prompt(folder, tmp_path, capsys):
    own = {"dog bark": ["a dog", "barking"], "rain": ["it rains"], "sea": ["waves", "the sea", "surf"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    options = ["--class_prompts", str(tmp_path / "own.json"), "--output", str(tmp_path / "out.json")]
    targets, folds = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([0, 1, 0, 1, 0])
    texts = [text for of_class in own.values() for text in of_class]
    audio, text = embeddings(folder, texts)
    lengths = tiny_vipant(4).get_text_features(**tiny_processor()(text=texts, return_tensors="pt"), normalize=False)
    for similarity, factors in (("cosine", 1), ("product", lengths.pooler_output.norm(dim=1))):
        run(folder, "classification", *options, "--similarity", similarity)
        scores = (audio @ text.T * factors).split([2, 1, 3], dim=1)
        right = torch.stack([part.amax(1) for part in scores], 1).argmax(1) == targets
        expected = np.mean([right[folds == fold].float().mean() for fold in (0, 1)])
        found = json.loads((tmp_path / "out.json").read_text())["results"]["ensemble"]["accuracy"]
        assert found == pytest.approx(expected)
    (tmp_path / "own.json").write_text(json.dumps({"rain": ["it rains"]}))
    assert run(folder, "classification", *options) == 1
    assert "no texts for the classes dog_bark, sea" in capsys.readouterr().err


def test_other_lengths_and_errors(folder, tmp_path, capsys):
    run(folder, "classification", "--num_frames", "40", "--prompts", "a {}")
    assert "accuracy" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[3]["audio"] = "nowhere.wav"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["retrieval", "--model", str(folder / "model"), "--dataset", str(tmp_path / "rows.jsonl")]) == 1
    assert "the last was c3" in (error := capsys.readouterr().err) and "nowhere.wav" in error
