import json

import datasets
import numpy as np
import pytest
import soundfile
import torch
from scipy.stats import beta

from modeling_vipant import VipAntForAudioClassification
from tests.tiny_vipant import tiny_processor, tiny_vipant
from trainers.rows import EpochSampler, TooManySkippedError
from trainers.vipant.tagging import (
    LabelEncoder,
    TaggingCollator,
    TaggingConfig,
    TaggingTrainer,
    balanced_weights,
    main,
    mix,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Low and high tones, some with both; labels say which."""
    folder = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    time = np.arange(9_600) / 16_000
    rows = []
    for i in range(20):
        labels = [["low"], ["high"], ["low", "high"], ["low"]][i % 4]
        wave = sum(0.2 * np.sin(2 * np.pi * {"low": 300, "high": 3000}[name] * time) for name in labels)
        soundfile.write(folder / f"{i}.wav", wave + 0.01 * generator.standard_normal(len(wave)), 16_000)
        rows.append({"id": str(i), "audio": str(folder / f"{i}.wav"), "labels": labels, "fold": 1 + i % 2})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_vipant().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def run(data, model, output, *options):
    arguments = {
        "--model": model,
        "--dataset": data / "rows.jsonl",
        "--output_dir": output,
        "--use_cpu": "true",
        "--num_frames": 64,
        "--report_to": "none",
        "--save_strategy": "no",
        "--time_mask": 8,
        "--frequency_mask": 4,
        "--per_device_train_batch_size": 8,
        "--learning_rate": "1e-3",
        "--disable_tqdm": "true",
    }
    return main([str(part) for pair in arguments.items() for part in pair] + list(options))


def test_tagging_learns_and_saves_a_labelled_model(data, model, tmp_path):
    run(data, model, tmp_path, "--eval_split", "train", "--num_train_epochs", "20")
    metrics = json.loads((tmp_path / "all_results.json").read_text())
    assert metrics["eval_map"] > 0.95
    classifier = VipAntForAudioClassification.from_pretrained(tmp_path)
    assert classifier.config.id2label == {0: "high", 1: "low"}
    assert classifier.config.problem_type == "multi_label_classification"


def test_lars_rates_follow_the_batch(model, tmp_path):
    classifier = VipAntForAudioClassification.from_pretrained(model, problem_type="single_label_classification")
    settings = {"per_device_train_batch_size": 50, "gradient_accumulation_steps": 2, "report_to": "none"}
    config = TaggingConfig(output_dir=str(tmp_path), use_cpu=True, lars=True, **settings)
    optimizer = TaggingTrainer(classifier, config, tiny_processor()).create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * 100 / 256, 0.0048 * 100 / 256])
    assert any(classifier.classifier.logit_scale is p for p in optimizer.param_groups[1]["params"])


def test_folds_are_held_out(data, model, tmp_path, capsys):
    single = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    single.write_text("\n".join(json.dumps(row | {"labels": row["labels"][0]}) for row in rows))
    run(tmp_path, model, tmp_path / "out", "--fold", "2", "--multi_label", "false", "--max_steps", "2")
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert run(tmp_path, model, tmp_path / "none", "--fold", "7", "--max_steps", "1") == 1
    assert "error: fold 7 does not part the data: folds are [1, 2]" in capsys.readouterr().err


def rows_of(data) -> datasets.Dataset:
    return datasets.Dataset.from_json(str(data / "rows.jsonl"), cache_dir=str(data / "cache"))


def test_mixed_examples_mix_sounds_and_labels_alike(data, monkeypatch):
    rows = rows_of(data)
    mixed = TaggingCollator(tiny_processor(), LabelEncoder(["high", "low"], True), mixup=1.0, rows=rows)
    heard = {}
    original = TaggingCollator.features

    def features(self, waveform, training):
        heard["waveform"] = waveform
        return original(self, waveform, training)

    monkeypatch.setattr(TaggingCollator, "features", features)
    shares = []
    for epoch in range(60):
        labels = mixed.read(rows[0] | {"epoch": epoch})["labels"]  # row 0 is "low" alone
        spectrum = np.abs(np.fft.rfft(heard["waveform"].numpy())) / 960  # tones of 0.2 have 1.0
        low, high = spectrum[180], spectrum[1800]
        assert labels[0].item() == pytest.approx(high, abs=0.03)
        assert labels[1].item() == pytest.approx(min(low, 1.0), abs=0.03)
        if labels[0] > 0:
            shares.append(labels[0].item())
    low, high = beta(10, 10).ppf([0.001, 0.999])
    assert len(shares) > 10 and min(shares) > low and max(shares) < high


def test_examples_follow_from_seed_epoch_and_id(data):
    rows = rows_of(data)
    options = {"mixup": 0.5, "rows": rows, "frequency_mask": 4, "time_mask": 8}
    one, other = (TaggingCollator(tiny_processor(), LabelEncoder(["high", "low"], True), **options) for _ in range(2))
    torch.manual_seed(1)
    first = one([rows[i] | {"epoch": 3} for i in range(4)])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = other([rows[i] | {"epoch": 3} for i in range(4)])
    assert all(torch.equal(first[name], again[name]) for name in first) and torch.equal(state, torch.get_rng_state())
    later = one([rows[i] | {"epoch": 4} for i in range(4)])
    assert not torch.equal(first["input_features"], later["input_features"])


def test_mix_pads_and_cuts_the_other_sound():
    one = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(mix(one, torch.tensor([3.0, 1.0]), 0.5), torch.tensor([1.0, -1.0, 0.5, -0.5]))
    torch.testing.assert_close(mix(one, torch.arange(9.0), 1.0), one)


def test_balanced_sampling_evens_out_labels():
    rows = datasets.Dataset.from_dict({"labels": [["rain"]] * 90 + [["bell"]] * 9 + [["bell", "owl"]]})
    weights = balanced_weights(rows)
    torch.testing.assert_close(weights[[0, 90, 99]], torch.tensor([1 / 90, 0.1, 1.1], dtype=torch.double))
    sampler = EpochSampler(10_000, 0, weights.repeat(100))
    drawn = [index % 100 for _, index in sampler]
    share = np.mean([index < 90 for index in drawn])
    assert share == pytest.approx(1 / 3, abs=0.02)
    assert list(sampler) == list(sampler)
    first = [index for _, index in sampler]
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != first


def test_label_encoder():
    encode = LabelEncoder(["a", "b", "c"], multi_label=True)
    assert encode(["c", "a"]).tolist() == [1, 0, 1]
    assert encode([]).tolist() == [0, 0, 0]
    with pytest.raises(LookupError, match="unknown labels: z"):
        encode(["z"])
    one = LabelEncoder(["0", "1"], multi_label=False)
    assert one(1).item() == 1
    with pytest.raises(LookupError, match="2 labels where one is needed"):
        one([0, 1])


def test_clips_that_cannot_be_decoded_weigh_nothing_until_there_are_too_many(data, model, tmp_path):
    rows = [{"id": str(i), "audio": str(data / f"{i}.wav"), "labels": ["low"]} for i in range(4)]
    rows[1]["audio"] = str(tmp_path / "gone.wav")
    classifier = VipAntForAudioClassification.from_pretrained(
        model, id2label={0: "low"}, problem_type="multi_label_classification"
    )
    config = TaggingConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = TaggingTrainer(classifier, config, tiny_processor(), rows)
    collator = trainer.data_collator.collator
    batch = collator(rows)
    assert batch["pair_weight"].tolist() == [1, 0, 1, 1] and collator.skips.skipped == 1
    trainer.model.eval()
    without = collator([rows[0], *rows[2:]])
    torch.testing.assert_close(trainer.compute_loss(classifier, batch), trainer.compute_loss(classifier, without))
    with pytest.raises(TooManySkippedError, match=r"2 of \d samples could not be decoded, more than 1\.0%"):
        collator([rows[1]])


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mixup=2\.0 is a share"):
        TaggingConfig(output_dir=str(tmp_path), use_cpu=True, mixup=2.0)
    with pytest.raises(ValueError, match="choose one"):
        TaggingConfig(output_dir=str(tmp_path), use_cpu=True, fold=1, eval_split="test")
