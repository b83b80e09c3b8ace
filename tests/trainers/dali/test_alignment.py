import json
import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from modeling_dali import DaliForConditionalGeneration
from modeling_dali.checkpoint_dali import read_scorers
from tests.released import released_scorers, seeded
from tests.tiny import tiny_dali
from tests.trainers.stages import clips, image_caption, moved, picture, settings, state, wav
from trainers.dali.alignment import (
    LOSSES,
    AlignmentConfig,
    AlignmentTrainer,
    alignment_metrics,
    moments,
    scored_transport,
)
from trainers.dali.image_token_cache import ImageTokenCache
from trainers.losses import TransportScorer


def align(folder, rows=None, eval_rows=None, **options):
    model, processor = tiny_dali()
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    config = AlignmentConfig(**settings(folder, **(defaults | options)))
    return AlignmentTrainer(model, config, processor, clips() if rows is None else rows, eval_rows)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls_and_moves_its_weights_alone(loss, tmp_path):
    options = {"entropy_start": 1.0, "entropy_end": 1.0, "scorer_learning_rate": 1e-3, "augment": False}
    rows = clips(8, frames=1)
    trainer = align(tmp_path, rows, loss=loss, num_train_epochs=12, learning_rate=5e-3, **options)
    before, (logits, caption) = state(trainer.dali), image_caption(trainer.dali, trainer.processing_class)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < first - 0.02 * abs(first)
    audio = {n for n in before if n.startswith(("model.audio_tower.", "model.audio_projection."))}
    assert moved(trainer.dali, before) == audio
    found, sentence = image_caption(trainer.dali, trainer.processing_class)
    assert torch.equal(found, logits) and torch.equal(sentence, caption)


def test_positions_train_only_where_asked(tmp_path):
    trainer = align(tmp_path, loss="mmd", max_steps=1, train_positions=False)
    before = state(trainer.dali)
    trainer.train()
    audio = {n for n in before if n.startswith(("model.audio_tower.", "model.audio_projection."))}
    assert moved(trainer.dali, before) == audio - {"model.audio_tower.positions"}


# Of the authors' forward pass (CAVMAE.forward in cav-mae/src/models/cav_mae.py) and their two backward passes of the
# second epoch (cav-mae/src/traintest_distribution_alignment.py, lines 114 to 130), on the scorers and tokens of
# tests/released.py: norms of the gradients, and the first three of the first token.
AUTHORS_LOSS, AUTHORS_ENTROPY = 231.18496704101562, 12.53858757019043
AUTHORS_ENCODER, AUTHORS_TRANSPORT = 8.929203987121582, 1.9920719861984253
AUTHORS_TOKEN = [-0.045032259076833725, -0.0703415721654892, 0.007542294915765524]
AUTHORS_SCORERS = {"a_q.weight": 16.720401763916016, "audio_scorer.in_proj_weight": 25.951210021972656}


def test_gradients_are_the_authors_where_asked():
    scorer = TransportScorer(32)
    scorer.load_state_dict(read_scorers(released_scorers(32), 32, "scorers"))
    audio, image = seeded((2, 512, 32), 1, 3.0).requires_grad_(), seeded((2, 576, 32), 2, 2.0)
    loss = scored_transport(scorer, audio, image, 500.0, encoder_factor=2.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(AUTHORS_LOSS - 500 * AUTHORS_ENTROPY, rel=1e-5)
    assert audio.grad.norm().item() == pytest.approx(AUTHORS_ENCODER, rel=1e-4)
    np.testing.assert_allclose(audio.grad[0, 0, :3], AUTHORS_TOKEN, rtol=1e-3)
    for name, norm in AUTHORS_SCORERS.items():
        assert scorer.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-4)
    theirs, audio.grad = audio.grad, None
    scored_transport(scorer, audio, image, 500.0).mean().backward()  # the gradient of the loss
    assert (theirs - audio.grad).norm().item() == pytest.approx(AUTHORS_TRANSPORT, rel=1e-3)


def test_the_first_frame_where_asked(tmp_path):
    row = clips(1, frames=3)[0] | {"epoch": 0, "index": 0}
    collator = align(tmp_path, first_frame=True).data_collator
    first = collator([row | {"frames": row["frames"][:1]}])["pixel_values"]
    assert all(torch.equal(collator([row | {"epoch": epoch}])["pixel_values"], first) for epoch in range(5))
    tokens = align(tmp_path, clips(2, frames=3), first_frame=True, cache_image_tokens=str(tmp_path / "tokens"))
    cache = ImageTokenCache(tmp_path / "tokens")
    found = tokens.data_collator([row | {"epoch": epoch} for epoch in range(5)])["image_tokens"]
    first, middle = cache.read(0, None, first_frame=True), cache.read(0, None)
    assert not torch.equal(first, middle) and all(torch.equal(tokens, first) for tokens in found)


def test_frozen_towers_stay_in_eval_mode(tmp_path):
    trainer = align(tmp_path, max_steps=1)
    trainer.train()
    assert not trainer.model.vision_tower.training and trainer.model.audio_tower.training
    assert not any(parameter.requires_grad for parameter in trainer.model.vision_tower.parameters())


def test_the_result_is_a_dali_model_with_its_scorers_beside_it(tmp_path):
    trainer = align(tmp_path, max_steps=2, uniform_epochs=0.0)
    trainer.run()
    saved = DaliForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in trainer.dali.state_dict().items():
        assert torch.equal(saved[name], tensor)
    from safetensors.torch import load_file

    scorer = load_file(tmp_path / "scorer.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert not name.startswith("scorer.") or torch.equal(scorer[name], tensor)


def test_lambda_follows_the_epoch(tmp_path):
    trainer = align(tmp_path, num_train_epochs=6, per_device_train_batch_size=4)
    trainer.train()
    logged = {
        e["epoch"]: (e["entropy_weight"], e["uniform_weights"]) for e in trainer.state.log_history if "loss" in e
    }
    assert logged[0.5] == (500, 1) and logged[2.5] == (400, 0) and logged[3.0] == (300, 0)
    assert logged[5.0] == logged[6.0] == (100, 0)


@pytest.mark.parametrize("halve_scorers", [False, True])
def test_learning_rates(tmp_path, halve_scorers):
    rates = {"learning_rate": 1e-4, "scorer_learning_rate": 3e-4, "halve_scorers": halve_scorers}
    trainer = align(tmp_path, clips(20), num_train_epochs=20, per_device_train_batch_size=2, **rates)
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(20 * 10)
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.95, 0.999)
    rates = []
    for _ in range(200):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert rates[0] == [1e-4, 3e-4] == rates[99]
    once, twice = (1.5e-4, 7.5e-5) if halve_scorers else (3e-4, 3e-4)
    assert rates[100] == rates[149] == [5e-5, once] and rates[150] == rates[199] == [2.5e-5, twice]


def test_evaluation(tmp_path):
    trainer = align(tmp_path, eval_rows=clips(6), loss="ot", per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    again = trainer.evaluate()
    assert metrics["eval_loss"] == again["eval_loss"]
    assert 0 <= metrics["eval_audio_to_image_R@1"] <= metrics["eval_audio_to_image_R@5"] <= 1
    assert metrics["eval_modality_gap"] > 0
    uniform = align(tmp_path, eval_rows=clips(6), per_device_eval_batch_size=4).evaluate()  # attentive
    assert uniform["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_metrics_against_their_definition():
    rng = np.random.default_rng(0)
    audio = torch.from_numpy(rng.normal(size=(12, 7, 5)).astype(np.float32)) + 1
    image = torch.from_numpy(rng.normal(size=(12, 9, 5)).astype(np.float32)) - 1
    image += audio.mean(1, keepdim=True)
    sides = [moments(side).numpy() for side in (audio, image)]
    weights = np.ones(12)
    weights[3] = 0
    metrics = alignment_metrics(EvalPrediction(tuple(sides), weights))
    kept = np.arange(12) != 3
    a, i = audio[kept].flatten(0, 1).double(), image[kept].flatten(0, 1).double()
    spread = sum((side - side.mean(0)).square().sum(1).mean().sqrt() for side in (a, i)) / 2
    assert metrics["modality_gap"] == pytest.approx(float((a.mean(0) - i.mean(0)).norm() / spread), rel=1e-5)
    means = [torch.nn.functional.normalize(side[kept].mean(1), dim=1) for side in (audio, image)]
    scores = means[0] @ means[1].T
    top = scores.topk(5, dim=1).indices
    expected = np.mean([k in top[k] for k in range(11)])
    assert metrics["audio_to_image_R@5"] == pytest.approx(expected)
    top = scores.T.topk(1, dim=1).indices
    assert metrics["image_to_audio_R@1"] == pytest.approx(np.mean([k in top[k] for k in range(11)]))


def test_pairs_that_cannot_be_decoded_weigh_nothing(tmp_path):
    good = [{"id": str(i), "audio": wav(i), "image": picture(i)} for i in range(3)]
    broken = {"id": "x", "audio": {"bytes": b"no sound", "path": None}, "image": picture(5)}
    trainer = align(tmp_path, good, loss="mmd", max_skipped=0.5)
    trainer.model.eval()
    with_broken = trainer.compute_loss(trainer.model, trainer.data_collator.collator([*good, broken]))
    without = trainer.compute_loss(trainer.model, trainer.data_collator.collator(good))
    torch.testing.assert_close(with_broken, without)
    nothing = trainer.compute_loss(trainer.model, trainer.data_collator.collator([broken]))
    assert nothing == 0


def test_padding_is_left_out_where_asked(tmp_path):
    rows = [{"id": "a", "audio": wav(0, seconds=0.2), "image": picture(0)}]
    trainer = align(tmp_path, rows, loss="ot", mask_padding=True)
    trainer.model.eval()
    batch = trainer.data_collator.collator(rows)
    masked = trainer.compute_loss(trainer.model, batch)
    tokens = trainer.dali.model.get_audio_tokens(batch["input_features"])
    heard = trainer.dali.model.audio_token_mask(batch["input_features_mask"])[0]
    assert 0 < heard.sum() < len(heard)
    import ot

    image = trainer.dali.get_image_tokens(batch["pixel_values"])[0].detach().double().numpy()
    audio = tokens[0][heard].detach().double().numpy()
    expected = ot.emd2(ot.unif(len(audio)), ot.unif(len(image)), ot.dist(audio, image))
    assert masked.item() == pytest.approx(expected, rel=1e-4)


def test_cached_image_tokens_give_the_same_training(tmp_path):
    plain = align(tmp_path / "plain", num_train_epochs=3)
    plain.train()
    cached = align(tmp_path / "cached", num_train_epochs=3, cache_image_tokens=str(tmp_path / "tokens"))
    calls = []
    cached.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    cached.train()
    assert not calls
    assert losses(cached) == pytest.approx(losses(plain), rel=5e-3)  # fp8 tokens


def test_a_cache_goes_on_where_it_was_cut(tmp_path):
    folder = tmp_path / "tokens"
    align(tmp_path, cache_image_tokens=str(folder))
    expected = np.array(ImageTokenCache(folder).tokens)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r+")
    done = np.load(folder / "state.npy", mmap_mode="r+")
    tokens[5:9], done[5:9] = 0, 0
    tokens[0] = 7  # done: must not be made anew
    tokens.flush(), done.flush()
    align(tmp_path, cache_image_tokens=str(folder))
    found = ImageTokenCache(folder)
    np.testing.assert_array_equal(found.tokens[1:], expected[1:])
    assert (found.tokens[0] == 7).all() and (found.state == 1).all()


def test_a_cache_of_other_data_is_refused(tmp_path):
    align(tmp_path, cache_image_tokens=str(tmp_path / "tokens"))
    with pytest.raises(ValueError, match=r"other settings \(length was 8, is 9; rows was"):
        align(tmp_path, clips(9), cache_image_tokens=str(tmp_path / "tokens"))
    identity = json.loads((tmp_path / "tokens" / "cache.json").read_text())
    (tmp_path / "tokens" / "cache.json").write_text(json.dumps(identity | {"weights": "others"}))
    with pytest.raises(ValueError, match='weights was "others"'):
        align(tmp_path, cache_image_tokens=str(tmp_path / "tokens"))


def test_streams(tmp_path):
    stream = clips(12).to_iterable_dataset()
    trainer = align(tmp_path, stream, loss="mmd", num_train_epochs=3, train_rows=12, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.global_step == 9 and trainer.state.epoch == 3
    with pytest.raises(ValueError, match="needs `train_rows`"):
        align(tmp_path, stream)
    with pytest.raises(ValueError, match="needs a data set with a length"):
        align(tmp_path, stream, train_rows=12, cache_image_tokens=str(tmp_path / "tokens"))


def test_mixed_precision_and_checkpointing(tmp_path):
    plain = align(tmp_path, max_steps=2, loss="mmd")
    plain.train()
    trainer = align(tmp_path, max_steps=2, loss="mmd", bf16=True, activation_checkpointing=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.05)
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"`loss` is one of attentive_ot, .*, not 'emd'"):
        AlignmentConfig(output_dir="x", loss="emd")
