import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_vipant import VipAntModel
from tests.tiny_vipant import NUM_BINS, NUM_FRAMES, tiny_clip, tiny_processor, tiny_tokenizer, tiny_vipant
from tests.trainers.stages import clips
from tests.trainers.vipant.contrastive_worker import SETTINGS, batch, model64, step, steps
from trainers.losses.barlow_twins import BarlowTwins
from trainers.processes import run_in_processes
from trainers.recipes import parse_recipe
from trainers.rows import without_decoding
from trainers.vipant.contrastive import SCALES, ContrastiveConfig, ContrastiveTrainer, load_model_and_processor
from trainers.vipant.tagging import TaggingConfig

REPO = Path(__file__).resolve().parents[3]


def assert_same_step(one: dict, other: dict) -> None:
    torch.testing.assert_close(one["loss"], other["loss"], atol=1e-5, rtol=0, check_dtype=False)
    assert one["grads"].keys() == other["grads"].keys() and one["grads"]
    for name, grad in one["grads"].items():
        torch.testing.assert_close(grad, other["grads"][name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def plain_loss(model: VipAntModel, inputs: dict, pairs: list[str]) -> torch.Tensor:
    """The objective written out, on one process and without any caching."""
    embeds = {
        "audio": model.get_audio_features(inputs["input_features"]).pooler_output,
        "image": model.get_image_features(inputs["pixel_values"]).pooler_output,
        "text": model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
    }
    total = torch.zeros(())
    for pair in pairs:
        one, other = (embeds[kind] for kind in pair.split("-"))
        logits = model.get_parameter(SCALES[pair]).exp() * one @ other.T
        targets = torch.arange(len(logits))
        total = total + F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
    return total


@pytest.mark.parametrize("name", ["va", "va-cached", "at-cached", "all-cached"])
def test_step_equals_the_objective_written_out(tmp_path, name):
    got = step(tmp_path, **SETTINGS[name])
    model = model64()
    loss = plain_loss(model, batch(), SETTINGS[name]["pairs"])
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if n in got["grads"]}
    assert_same_step(got, {"loss": loss.detach(), "grads": expected})


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_cached_gradients_equal_one_big_batch(tmp_path, micro_batch_size):
    settings = SETTINGS["all-cached"] | {"micro_batch_size": None}
    whole = step(tmp_path, **settings)
    assert_same_step(step(tmp_path, **settings | {"micro_batch_size": micro_batch_size}), whole)


def test_cached_gradients_repeat_dropout(tmp_path):
    """With dropout, step 3 must see the masks of step 1: the gradient is then that of the very loss reported."""
    settings = {"pairs": ["audio-image"], "micro_batch_size": 4}
    got = step(tmp_path, dropout=0.3, **settings)
    model = model64().train()
    for module in model.audio_model.modules():
        if hasattr(module, "scale") and hasattr(module, "dropout"):
            module.dropout = 0.3
    model.vision_model.eval()
    torch.manual_seed(3)
    audio = torch.cat([model.get_audio_features(part).pooler_output for part in batch()["input_features"].split(4)])
    image = model.get_image_features(batch()["pixel_values"]).pooler_output
    logits = model.audio_image_logit_scale.exp() * audio @ image.T
    targets = torch.arange(8)
    loss = F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if n in got["grads"]}
    assert_same_step(got, {"loss": loss.detach(), "grads": expected})


def test_barlow_twins_of_embeddings_before_they_are_given_unit_length(tmp_path):
    got = step(tmp_path, **SETTINGS["barlow"])
    model = model64()
    with torch.random.fork_rng():
        torch.manual_seed(42)  # the trainer's
        loss = BarlowTwins(24, (12, 20, 20), 0.0051).double()
    inputs = batch()
    audio = model.get_audio_features(inputs["input_features"], normalize=False).pooler_output
    image = model.get_image_features(inputs["pixel_values"], normalize=False).pooler_output
    value = loss(audio, image)
    value.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if name.startswith("audio_")}
    expected = {name: grad for name, grad in trained.items() if grad is not None}
    expected |= {f"barlow_twins.{name}": parameter.grad for name, parameter in loss.named_parameters()}
    assert_same_step(got, {"loss": value.detach(), "grads": expected})


def test_two_processes_equal_one(tmp_path):
    run_in_processes(steps, (tmp_path,), 2, print)
    two = torch.load(tmp_path / "results.pt")
    for name, settings in SETTINGS.items():
        assert two[name]["processes"] == 2
        assert_same_step(two[name], step(tmp_path, **settings))


class Pairs(torch.utils.data.Dataset):
    """Sounds whose spectrogram has the brightness of their image: what training must find out."""

    def __init__(self, size: int = 16):
        generator = torch.Generator().manual_seed(11)
        self.patterns = torch.randn(size, NUM_FRAMES, 1, generator=generator)
        self.images = torch.randn(size, 3, 28, 28, generator=generator)

    def __len__(self):
        return len(self.patterns)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return {"audio": self.patterns[i].expand(-1, NUM_BINS), "image": self.images[i]}


def collate(rows):
    return {
        "input_features": torch.stack([row["audio"] for row in rows]),
        "pixel_values": torch.stack([row["image"] for row in rows]),
        "pair_weight": torch.ones(len(rows)),
    }


def new_trainer(model, rows=None, **settings):
    """A trainer on made-up features and pixels, which need no decoding."""
    quick = {"use_cpu": True, "report_to": [], "per_device_train_batch_size": 8, "learning_rate": 2e-3}
    config = ContrastiveConfig(**quick | {"disable_tqdm": True} | settings)
    trainer = ContrastiveTrainer(model, config, tiny_processor(), Pairs() if rows is None else rows)
    trainer.data_collator.collator = collate
    return trainer


def train(tmp_path, model, **settings):
    defaults = {"max_steps": 12, "logging_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path)}
    trainer = new_trainer(model, **defaults | settings)
    trainer.train()
    return trainer


def moved(before: dict, model) -> set[str]:
    """Parts of a model that changed, or that were not there."""
    now = model.state_dict().items()
    return {name.split(".")[0] for name, tensor in now if name not in before or not torch.equal(before[name], tensor)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"audio_model", "audio_projection", "audio_image_logit_scale"}),
        (
            {"loss": "barlow_twins", "barlow_projector": [12, 20, 20]},
            {"audio_model", "audio_projection", "barlow_twins"},
        ),
        ({"lars": True, "lars_weight_lr": 5.0}, {"audio_model", "audio_projection", "audio_image_logit_scale"}),
        ({"train_towers": ["image"]}, {"vision_model", "visual_projection", "audio_image_logit_scale"}),
    ],
)
def test_only_what_is_trained_moves(tmp_path, settings, expected):
    model = tiny_vipant()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(tmp_path, model, max_steps=2, **settings)
    assert moved(before, model) == expected
    trainer.save_model(tmp_path / "result")
    assert set(load_file(tmp_path / "result" / "model.safetensors")) == set(before)
    assert not trainer.model.text_model.training


def test_training_lowers_the_loss(tmp_path):
    trainer = train(tmp_path, tiny_vipant(), micro_batch_size=4)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


def test_lars_rates_follow_the_global_batch(tmp_path):
    trainer = train(tmp_path, tiny_vipant(), lars=True, max_steps=1, lr_scheduler_type="constant")
    weights, biases = trainer.optimizer.param_groups
    assert weights["lr"] == pytest.approx(0.2 * 8 / 256)
    assert biases["lr"] == pytest.approx(0.0048 * 8 / 256)
    assert min(p.ndim for p in weights["params"]) == 2 and max(p.ndim for p in biases["params"]) == 1


def test_the_seeds_schedule(tmp_path):
    """Warm-up over a share of the steps, then cosine to 0.1 %, for both groups alike."""
    trainer = train(
        tmp_path,
        tiny_vipant(),
        lars=True,
        max_steps=10,
        warmup_steps=0.2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.001},
    )
    rates = [entry["learning_rate"] / (0.2 * 8 / 256) for entry in trainer.state.log_history if "loss" in entry]
    expected = [0, 0.5] + [0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize("fresh", [True, False])
def test_logit_scales_start_anew(tmp_path, fresh):
    model = tiny_vipant()
    for name in SCALES.values():
        model.get_parameter(name).data.fill_(1.0)
    train(tmp_path, model, max_steps=1, fresh_logit_scales=fresh, learning_rate=1e-6)
    assert model.audio_image_logit_scale.item() == pytest.approx(math.log(1 / 0.07) if fresh else 1.0, abs=1e-4)
    assert model.audio_text_logit_scale.item() == model.logit_scale.item() == 1.0  # of other pairs


@pytest.mark.parametrize("pair", ["audio-image", "audio-text"])
def test_a_result_gives_both_of_sounds_pairs_the_trained_scale(tmp_path, pair):
    model = tiny_vipant()
    config = ContrastiveConfig(output_dir=str(tmp_path), use_cpu=True, pairs=[pair])
    trainer = ContrastiveTrainer(model, config, tiny_processor())
    model.get_parameter(SCALES[pair]).data.fill_(3.25)
    trainer.save_model(tmp_path / "result")
    found = VipAntModel.from_pretrained(tmp_path / "result")
    assert found.audio_image_logit_scale.item() == found.audio_text_logit_scale.item() == 3.25
    assert found.logit_scale.item() == pytest.approx(2.6592)


@pytest.mark.parametrize("bound", [None, 15.0])
def test_logit_scales_have_a_bound_only_where_one_is_given(tmp_path, bound):
    model = tiny_vipant()
    model.audio_image_logit_scale.data.fill_(math.log(200.0))
    train(tmp_path, model, max_steps=2, max_logit_scale=bound, fresh_logit_scales=False)
    assert model.audio_image_logit_scale.item() == pytest.approx(math.log(bound or 200.0), abs=0.01)
    assert bound is None or model.audio_image_logit_scale.item() <= math.log(bound) + 1e-6


def test_evaluation_reports_loss_and_retrieval_both_ways(tmp_path):
    model = tiny_vipant()
    trainer = train(tmp_path, model, max_steps=1)
    metrics = trainer.evaluate(Pairs(7))
    assert metrics["eval_loss"] > 0
    model.eval()
    inputs = collate([Pairs(7)[i] for i in range(7)])
    with torch.no_grad():
        output = model(input_features=inputs["input_features"], pixel_values=inputs["pixel_values"])
    scores = output.audio_embeds @ output.image_embeds.T
    for name, matrix in (("audio_to_image", scores), ("image_to_audio", scores.T)):
        hits = [(row > row[i]).sum().item() < 5 for i, row in enumerate(matrix)]
        assert metrics[f"eval_{name}_r@5"] == pytest.approx(np.mean(hits))


def test_resumed_training_equals_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = tiny_vipant()
    train(tmp_path / "whole", whole, **settings)
    resumed = tiny_vipant()
    trainer = new_trainer(resumed, output_dir=str(tmp_path / "again"), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": ["audio-video"]}, "pairs=.*audio-video.*choose among"),
        ({"train_towers": ["text"]}, "choose among audio, image"),
        ({"loss": "triplet"}, "`loss` is one of contrastive, barlow_twins, not 'triplet'"),
        ({"micro_batch_size": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_recipes_are_strict_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pairs: [audio-text]\nlearning_rate: 1.0e-4\nlars: true\nuse_cpu: true\n")
    config = parse_recipe(ContrastiveConfig, [str(recipe), "--learning_rate", "2e-4", "--output_dir", str(tmp_path)])
    assert (config.pairs, config.learning_rate, config.lars) == (["audio-text"], 2e-4, True)
    recipe.write_text("learning_rte: 1.0e-4\n")
    with pytest.raises(ValueError, match="no setting `learning_rte`: did you mean `learning_rate`"):
        parse_recipe(ContrastiveConfig, [str(recipe)])
    with pytest.raises((SystemExit, ValueError)):
        parse_recipe(ContrastiveConfig, ["--learning_rte", "1", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("recipe", sorted((REPO / "recipes" / "vipant").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(tmp_path, recipe):
    config_class = TaggingConfig if recipe.stem.startswith("tagging") else ContrastiveConfig
    parse_recipe(config_class, [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"])


def test_starting_from_a_clip_folder(tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_processor().image_processor.save_pretrained(tmp_path)
    model, processor = load_model_and_processor(str(tmp_path), num_frames=64)
    assert model.config.audio_config.num_frames == processor.feature_extractor.num_frames == 64


def rows_with_a_damaged_clip():
    rows = without_decoding(clips(5)).to_list()
    rows[2]["audio"] = {"bytes": b"no sound", "path": None}
    return rows


@pytest.mark.parametrize("loss", ["contrastive", "barlow_twins"])
def test_a_clip_that_cannot_be_decoded_weighs_nothing(tmp_path, loss):
    rows = rows_with_a_damaged_clip()
    config = ContrastiveConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], loss=loss, train_towers=["audio"])
    trainer = ContrastiveTrainer(tiny_vipant(), config, tiny_processor(), rows)
    trainer.model.eval()

    def gradient(embeds: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        leaves = {"audio": embeds.clone().requires_grad_(), "image": images}
        return torch.autograd.grad(trainer._loss(leaves, weight), leaves["audio"])[0]

    batch = trainer.data_collator.collator(rows)
    assert batch["pair_weight"].tolist() == [1, 1, 0, 1, 1] and trainer.skips.skipped == 1
    embeds = trainer._embed(trainer.model, batch, ["audio", "image"])
    audio, images = embeds["audio"].detach(), embeds["image"].detach()
    own = gradient(audio, batch["pair_weight"])
    if loss == "barlow_twins":  # as if it were not there
        assert (own[2] == 0).all()
        kept = batch["pair_weight"] > 0
        images = images[kept]
        torch.testing.assert_close(own[kept], gradient(audio[kept], torch.ones(4)), rtol=1e-3, atol=1e-5)
    else:  # its own losses do not count, as a negative it stays
        logits = trainer.model.audio_image_logit_scale.exp() * F.normalize(audio, dim=1) @ F.normalize(images, dim=1).T
        both = [F.cross_entropy(side, torch.arange(5), reduction="none") for side in (logits, logits.T)]
        expected = (sum(both) * batch["pair_weight"]).sum() / 4
        weighed = trainer._loss({"audio": audio, "image": images}, batch["pair_weight"])
        torch.testing.assert_close(weighed, expected)


def test_a_run_that_was_cut_off_goes_on_by_itself(tmp_path):
    settings = {"use_cpu": True, "report_to": [], "save_steps": 1, "per_device_train_batch_size": 4, "time_mask": 8}
    settings |= {"disable_tqdm": True, "lr_scheduler_type": "constant", "frequency_mask": 4}
    weights = []
    for folder, ends in (("whole", [4]), ("cut", [2, 4])):
        for max_steps in ends:
            config = ContrastiveConfig(output_dir=str(tmp_path / folder), max_steps=max_steps, **settings)
            trainer = ContrastiveTrainer(tiny_vipant(), config, tiny_processor(), clips(8))
            trainer.run()
        weights.append(VipAntModel.from_pretrained(tmp_path / folder).state_dict())
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
