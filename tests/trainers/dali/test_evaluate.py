"""Evaluation: files, scores against the metrics' own, skipped clips, the command."""

import csv
import json

import pytest

from tests.tiny import tiny_dali
from tests.trainers.stages import CAPTIONS, clips, save_world
from trainers.dali.evaluate import EvaluationConfig, evaluate, main, predict, score, table
from trainers.metrics.captioning import caption_metrics
from trainers.metrics.labels import label_metrics

SYNONYMS = {"dog": ["dog"], "rain": ["rain", "drizzle"], "bell": ["bell"], "man": ["man"]}
LABELS = [["dog"], ["rain"], ["bell", "dog"], ["man"]]


@pytest.fixture(scope="module")
def tiny():
    return tiny_dali()


def labelled(count=4):
    rows = clips(count)
    return rows.add_column("labels", [LABELS[i % 4] for i in range(count)])


@pytest.mark.parametrize("modality", ["audio", "image", "audio_image"])
def test_captions_do_not_depend_on_the_batch(tiny, modality):
    rows = clips(5)
    whole = predict(*tiny, rows, EvaluationConfig(modality=modality, batch_size=5, max_new_tokens=6))
    single = predict(*tiny, rows, EvaluationConfig(modality=modality, batch_size=1, max_new_tokens=6))
    assert whole == single and list(whole[0]) == rows["id"] and whole[1] == []


def test_scores_are_those_of_the_metrics():
    rows = labelled()
    captions = {"clip0": "a dog barks", "clip1": "a drizzle", "clip2": "a cat meows", "clip3": "a man and a dog"}
    summary, per_clip = score(captions, rows, synonyms=SYNONYMS)
    plain = caption_metrics(list(captions.values()), CAPTIONS)
    names = label_metrics(list(captions.values()), LABELS, SYNONYMS)
    assert summary["cider_d"] == plain.corpus["cider_d"] and summary["clips"] == 4
    assert (summary["recall"], summary["precision"]) == (names.recall, names.precision) == (3 / 5, 3 / 4)
    assert [clip["recall"] for clip in per_clip] == [1, 1, 0, 1] and per_clip[3]["named"] == ["dog", "man"]
    assert [clip["bleu_1"] for clip in per_clip] == plain.clips["bleu_1"]
    fewer, _ = score({name: captions[name] for name in ("clip3", "clip0")}, rows)
    assert fewer["clips"] == 2 and "recall" not in fewer


def test_command_writes_everything(tmp_path, capsys):
    world = save_world(tmp_path, 4)
    labelled().save_to_disk(str(tmp_path / "labelled"))
    (tmp_path / "words.json").write_text(json.dumps(SYNONYMS))
    out = tmp_path / "out"
    arguments = ["--model", world["model"], "--dataset", str(tmp_path / "labelled"), "--modality", "audio_image"]
    arguments += ["--output", str(out), "--synonyms", str(tmp_path / "words.json"), "--max_new_tokens", "6"]
    main([*arguments, "--metrics", "all"])
    printed = capsys.readouterr().out
    results = json.loads((out / "metrics.json").read_text())
    assert results["settings"]["modality"] == "audio_image" and results["metrics"]["clips"] == 4
    assert {"cider_d", "bleu_4", "rouge_l", "recall", "precision"} <= results["metrics"].keys()
    for name in results["metrics"].get("missing", {}):  # without Java or downloads
        assert f"{name} was left out" in printed
    assert (out / "ids.txt").read_text().split() == [f"clip{i}" for i in range(4)]
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"clip{i}" for i in range(4)]
    assert rows[0]["references"] == "a dog barks | the dog barks loudly" and float(rows[0]["rouge_l"]) >= 0
    assert (out / "table.md").read_text() in printed


def test_damaged_clips_are_named_not_hidden(tiny, tmp_path):
    rows = clips(4).to_list()
    rows[2]["audio"] = {"bytes": b"no sound", "path": None}
    rows = clips(4).from_list(rows, features=clips(4).features)
    config = EvaluationConfig(max_skipped=0.5, output=str(tmp_path), max_new_tokens=4)
    summary = evaluate(*tiny, rows, config)
    assert summary["skipped"] == 1 and summary["clips"] == 3
    assert (tmp_path / "skipped.txt").read_text() == "clip2\n" and "clip2" not in (tmp_path / "ids.txt").read_text()
    with pytest.raises(RuntimeError, match="clip2"):
        predict(*tiny, rows, EvaluationConfig())


def test_what_cannot_be_evaluated_is_said_before_the_work(tiny):
    with pytest.raises(ValueError, match="no column `caption` or `captions`"):
        evaluate(*tiny, clips(3).remove_columns("captions"), EvaluationConfig())
    with pytest.raises(ValueError, match="no column `image`"):
        predict(*tiny, clips(3).remove_columns(["image", "frames"]), EvaluationConfig(modality="image"))
    with pytest.raises(ValueError, match="modality"):
        EvaluationConfig(modality="video")
    with pytest.raises(ValueError, match="no column `labels`"):
        score({"clip0": "a dog", "clip1": "rain"}, clips(2), synonyms=SYNONYMS)
    twice = clips(2).map(lambda row: {"id": "same"})
    with pytest.raises(ValueError, match="ids must differ"):
        predict(*tiny, twice, EvaluationConfig(max_new_tokens=2))


def test_table_holds_numbers_only():
    text = table({"a": {"x": 0.12345, "clips": 3, "missing": {"y": "no"}}, "b": {"x": 1.0}})
    assert text.splitlines() == ["| | x | clips |", "|---|---:|---:|", "| a | 0.123 | 3 |", "| b | 1.000 |  |"]
