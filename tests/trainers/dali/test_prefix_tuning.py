import pytest
import torch
from peft import PeftConfig

from tests.tiny import tiny_dali
from tests.trainers.stages import clips, image_caption, moved, settings, state
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer


def tune(folder, rows=None, **options):
    model, processor = tiny_dali()
    config = PrefixTuningConfig(**settings(folder, per_device_train_batch_size=8, learning_rate=0.1, **options))
    return PrefixTuningTrainer(model, config, processor, clips() if rows is None else rows)


@pytest.mark.parametrize("position", ["after_media", "front"])
def test_only_the_prefix_moves(tmp_path, position):
    model, processor = tiny_dali()
    before, (logits, caption) = state(model), image_caption(model, processor)
    config = PrefixTuningConfig(**settings(tmp_path, num_train_epochs=3, prefix_position=position))
    trainer = PrefixTuningTrainer(model, config, processor, clips())
    start = model.model.prefix.detach().clone()
    trainer.run()
    assert not torch.equal(model.model.prefix, start)
    prefix = model.model.prefix.detach().clone()
    found, sentence = image_caption(model, processor)
    assert torch.equal(found, logits) and torch.equal(sentence, caption)
    model.remove_prefix()
    assert moved(model, before) == set()
    model.load_prefix(tmp_path, position)
    assert torch.equal(model.model.prefix, prefix)


def test_learns_and_reads_back_with_peft(tmp_path):
    rows = clips().map(lambda row: {"captions": row["captions"][:1]})  # the same ones in the first epoch and the last
    trainer = tune(tmp_path, rows, num_train_epochs=30, prefix_length=16)
    trainer.run(command="python -m trainers.dali.prefix_tuning", data="clips")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert PeftConfig.from_pretrained(str(tmp_path)).num_virtual_tokens == 16
    card = (tmp_path / "README.md").read_text()
    for part in (
        "python -m trainers.dali.prefix_tuning",
        "on clips",
        "| epochs | 30 |",
        "train_loss",
        "trained parameters | 512",
    ):
        assert part in card


def test_initial_prefix_is_small_and_seeded(tmp_path):
    prefixes = [tune(tmp_path, seed=seed, prefix_length=16).model.model.prefix.detach() for seed in (1, 1, 2)]
    assert torch.equal(prefixes[0], prefixes[1]) and not torch.equal(prefixes[0], prefixes[2])
    assert prefixes[0].std() == pytest.approx(1e-4, rel=0.1)


def test_defaults_are_those_of_the_released_code():
    config = PrefixTuningConfig(output_dir="x", report_to="none")
    assert (config.learning_rate, config.num_train_epochs, config.per_device_train_batch_size) == (1e-3, 500, 16)
    assert config.lr_scheduler_type == "cosine" and config.warmup_steps == 0.03 and config.prefix_length == 16


@pytest.mark.parametrize(
    "rows, message",
    [
        (lambda: clips().select([]), "training is empty"),
        (lambda: clips().remove_columns("captions"), "no column `caption` or `captions`"),
        (lambda: clips().remove_columns(["image", "frames"]), "no column `image` or `frames`"),
    ],
)
def test_wrong_data_is_named_before_work_starts(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        tune(tmp_path, rows())


def test_undecodable_pictures_are_counted(tmp_path):
    rows = clips(100).to_list()
    rows[7]["image"] = {"bytes": b"no picture", "path": None}
    trainer = tune(tmp_path, rows, max_steps=13)
    metrics = trainer.run()
    assert metrics["skipped_samples"] == 1


def test_mixed_precision_and_checkpointing(tmp_path):
    trainer = tune(tmp_path, num_train_epochs=2, bf16=True, activation_checkpointing=True)
    assert trainer.train().training_loss > 0
    assert trainer.model.model.prefix.dtype == torch.float32
