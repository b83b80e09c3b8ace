"""What stops a stage, and what a stage that was stopped goes on from."""

import json

import pytest
import torch

from datasets_scripts.files import locked
from tests.trainers.dali.stage_worker import build
from tests.trainers.stages import clips, state
from trainers.checkpoints import last_complete
from trainers.fingerprints import rows_hash, weights_hash


def test_a_loss_that_is_not_finite_names_the_clips(tmp_path):
    trainer = build("distillation", tmp_path)
    trainer.model.get_parameter("model.audio_projector.linear_1.bias").data.fill_(torch.nan)
    before = state(trainer.model)
    with pytest.raises(FloatingPointError, match=r"The loss is nan in step 1, clips clip\d, clip\d, clip\d, clip\d"):
        trainer.run()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())


def test_a_loss_that_refuses_its_input_names_the_clips(tmp_path):
    trainer = build("alignment", tmp_path, loss="mmd")
    trainer.model.audio_projection.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"NaN or infinite .* \(step 1, clips clip\d, clip\d, clip\d, clip\d\)"):
        trainer.run()


def test_gradients_that_are_not_finite_stop_training(tmp_path):
    trainer = build("alignment", tmp_path, loss="mmd")
    trainer.model.audio_projection.bias.register_hook(lambda gradient: gradient * torch.inf)
    before = state(trainer.model)
    with pytest.raises(FloatingPointError, match="Gradients are not finite in step 1, clips clip"):
        trainer.run()
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_inputs_that_are_not_finite_are_told_from_others(tmp_path):
    trainer = build("distillation", tmp_path)
    trainer.batch_ids = ["a", "b", "c"]
    features = torch.zeros(3, 4, 5)
    assert trainer.batch_name({"input_features": features}) == "clips a, b, c"
    features[1, 2, 3] = torch.inf
    assert trainer.batch_name({"input_features": features}) == "inputs not finite: b"


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match="is in use by another run"):
        build("prefix_tuning", tmp_path, max_steps=1).run()
    build("prefix_tuning", tmp_path, max_steps=1).run()


def test_checkpoints_that_are_damaged_are_refused(tmp_path):
    build("prefix_tuning", tmp_path, max_steps=4).run()
    newest = tmp_path / "checkpoint-4"
    assert last_complete(tmp_path) == str(newest)
    kept = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is incomplete: optimizer.pt is missing"):
        build("prefix_tuning", tmp_path, max_steps=6).run()
    (newest / "optimizer.pt").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: optimizer.pt .* Delete this checkpoint"):
        build("prefix_tuning", tmp_path, max_steps=6).run()
    (newest / "manifest.json").unlink()  # as a kill leaves it
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-2") and not newest.exists()


def test_a_finished_run_trains_nothing_when_it_is_run_again(tmp_path):
    first = build("alignment", tmp_path, max_steps=3, loss="mmd", save_steps=3)  # ends within an epoch
    first.run()
    again = build("alignment", tmp_path, max_steps=3, loss="mmd", save_steps=3)
    again.run()
    assert again.state.global_step == 3
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    longer = build("alignment", tmp_path, max_steps=4, loss="mmd", save_steps=3)
    longer.run()
    assert longer.state.global_step == 4


def test_old_checkpoints_go_when_a_new_one_is_complete(tmp_path):
    build("prefix_tuning", tmp_path, max_steps=3, save_steps=1, save_total_limit=1).run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    settings = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())["settings"]
    assert settings["save_total_limit"] == 1


def test_fingerprints_see_what_decides_a_result(tmp_path):
    rows = clips(4)
    assert rows_hash(rows) == rows_hash(clips(4)) != rows_hash(clips(5))
    other = rows.to_list()
    other[2]["image"], other[3]["image"] = other[3]["image"], other[2]["image"]
    assert rows_hash(rows.from_list(other, features=rows.features)) != rows_hash(rows)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"one")
    named = rows.from_list([{"id": "a", "image": str(picture)}])
    before = rows_hash(named)
    picture.write_bytes(b"other")
    assert rows_hash(named) != before
    layer = torch.nn.Linear(2, 2)
    before = weights_hash(layer)
    layer.bias.data[0] += 1e-6
    assert weights_hash(layer) != before
