import json

import pytest
import torch

from modeling_dali import DaliForConditionalGeneration
from tests.tiny import tiny_dali
from tests.trainers.stages import clips, image_caption, moved, settings, state
from trainers.dali.distillation import DistillationConfig, DistillationTrainer, join_captions

PROJECTOR = {f"model.audio_projector.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}


def distill(folder, rows=None, prefix=0, **options):
    model, processor = tiny_dali(prefix=prefix)
    defaults = {"num_train_epochs": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    config = DistillationConfig(**settings(folder, **(defaults | options)))
    return model, processor, config, clips() if rows is None else rows


@pytest.mark.parametrize("with_encoder", [False, True])
def test_which_weights_move(tmp_path, with_encoder):
    model, processor, config, rows = distill(tmp_path, train_audio_encoder=with_encoder)
    before, (logits, caption) = state(model), image_caption(model, processor)
    trainer = DistillationTrainer(model, config, processor, rows)
    trainer.run()
    audio = {n for n in before if n.startswith(("model.audio_tower.", "model.audio_projection."))}
    expected = PROJECTOR | (audio if with_encoder else set())
    assert moved(model, before) == expected
    found, sentence = image_caption(model, processor)
    assert torch.equal(found, logits) and torch.equal(sentence, caption)
    saved = DaliForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_learns_and_needs_no_prefix(tmp_path):
    options = {"num_train_epochs": 15, "per_device_train_batch_size": 4}
    model, processor, config, rows = distill(tmp_path, prefix=4, **options)
    trainer = DistillationTrainer(model, config, processor, rows, rows)
    assert model.model.prefix is None and "<prefix>" not in trainer.data_collator.collator.prompt
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.5


def test_lora_is_merged_into_the_result(tmp_path):
    model, processor, config, rows = distill(tmp_path, lora_rank=2)
    names = set(model.state_dict())
    before = state(model)
    trainer = DistillationTrainer(model, config, processor, rows)
    trainer.run()
    saved = DaliForConditionalGeneration.from_pretrained(tmp_path)
    assert set(saved.state_dict()) == names
    changed = {name for name in names if not torch.equal(before[name], saved.state_dict()[name])}
    projections = {n for n in names if "language_model" in n and n.endswith("_proj.weight")}
    assert changed == PROJECTOR | projections
    inputs = trainer.data_collator.collator([trainer.train_dataset[0]])
    with torch.no_grad():
        torch.testing.assert_close(saved(**inputs).logits, model.eval()(**inputs).logits, atol=1e-4, rtol=1e-4)


def write_captions(folder, captions):
    folder.mkdir()
    lines = [json.dumps({"id": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "captions-00000.jsonl").write_text("\n".join(lines))


def test_pseudo_captions_replace_gold_ones(tmp_path):
    write_captions(tmp_path / "pseudo", {"clip2": "rain", "clip1": "a bell", "clip5": "", "other": "x"})
    rows = join_captions(clips(), str(tmp_path / "pseudo"))
    assert "captions" not in rows.column_names
    assert [(row["id"], row["caption"]) for row in rows] == [("clip1", "a bell"), ("clip2", "rain")]
    stream = join_captions(clips().to_iterable_dataset(), str(tmp_path / "pseudo"))
    assert [(row["id"], row["caption"]) for row in stream] == [("clip1", "a bell"), ("clip2", "rain")]
    write_captions(tmp_path / "others", {"other": "x"})
    with pytest.raises(ValueError, match="No id of the data set has a caption"):
        join_captions(clips(), str(tmp_path / "others"))


def test_mixed_precision_and_checkpointing(tmp_path):
    model, processor, config, rows = distill(tmp_path, max_steps=2, bf16=True, activation_checkpointing=True)
    trainer = DistillationTrainer(model.bfloat16(), config, processor, rows)
    trainer.train()
    assert {parameter.dtype for _, parameter in trainer.trained_parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_defaults_are_those_of_the_released_code():
    config = DistillationConfig(output_dir="x", report_to="none")
    assert (config.learning_rate, config.num_train_epochs, config.per_device_train_batch_size) == (2e-4, 1, 40)
    assert config.lr_scheduler_type == "cosine" and config.warmup_steps == 0.03
