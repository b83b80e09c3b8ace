"""Every number that a paper or the authors' code gives, held against the recipe that uses it.

P is a paper (arXiv 2410.05997 for DALI, 2112.08995 for VIP-ANT), all else a file of the authors' repositories
(hugomalard/AnEyeForAnEar; zhaoyanpeng/vipant, branch beta). Where recipe and authors differ on purpose, the choice
stands under `CHOICES` with what it is instead, and in docs/deviations.md.
"""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Describe the sound that can be heard in this scene."

LARS = {  # configs/optimizer/standard.yaml; cvap/module/lars.py, lines 9 to 23
    "lars": True,
    "lars_weight_lr": 0.2,
    "lars_bias_lr": 0.0048,
    "weight_decay": 1e-6,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.001},
    "max_grad_norm": 0.0,
}
SOUND = {"num_frames": 1000, "frequency_mask": 32, "time_mask": 200}  # configs/running/audio/default.yaml
PUBLISHED = {
    "dali/prefix_tuning": {  # prefix_tuning.sh; LLaVA/llava/train/trainPrefixTuningAudio.py, line 1153; prefixDS.json
        "learning_rate": 1e-3,
        "num_train_epochs": 500,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "prefix_length": 16,
        "prefix_position": "after_media",
        "question": QUESTION,
    },
    "dali/alignment": {  # alignment.sh; cav-mae/src/traintest_distribution_alignment.py; models/cav_mae.py
        "loss": "attentive_ot",
        "learning_rate": 1e-4,
        "scorer_learning_rate": 1e-4,
        "adam_beta1": 0.95,
        "adam_beta2": 0.999,
        "weight_decay": 5e-7,
        "num_train_epochs": 20,
        "halve_after": 10,
        "halve_every": 5,
        "halve_scorers": False,
        "train_positions": True,
        "entropy_start": 500,
        "entropy_end": 100,
        "entropy_decay_end": 5,
        "entropy_staircase": True,
        "uniform_epochs": 1,  # P
        "scorer_heads": 8,
        "scorer_temperature": 20,
        "uniform_mix": 0.5,
    },
    "dali/pseudo_captions": {  # LLaVA/generate_pseudo_labels.py, lines 219 and 300 to 310
        "modality": "audio_image",
        "question": QUESTION,
        "temperature": 0.2,
        "top_k": 50,
        "max_new_tokens": 128,
    },
    "dali/distillation": {  # audio_vis_distil.sh
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "question": QUESTION,
    },
    "vipant/va_pretraining": LARS | SOUND | {"pairs": ["audio-image"], "fresh_logit_scales": True},
    "vipant/va_barlow_twins": LARS  # configs/model/loss/barlow.yaml
    | SOUND
    | {"loss": "barlow_twins", "barlow_projector": [2048, 4096, 4096], "barlow_redundancy_weight": 0.0051},
    "vipant/vat_joint": LARS | SOUND | {"pairs": ["audio-image", "audio-text"], "fresh_logit_scales": True},
    "vipant/at_gold_captions": LARS | SOUND | {"pairs": ["audio-text"], "fresh_logit_scales": True},
    "vipant/at_curated_captions": LARS | SOUND | {"pairs": ["audio-text"], "fresh_logit_scales": True},
    "vipant/tagging_esc50": LARS  # configs/running/esc50.yaml
    | SOUND
    | {"mixup": 0.0, "balanced": False, "num_train_epochs": 32},
    "vipant/tagging_audioset": LARS | SOUND | {"mixup": 0.5, "balanced": False},  # configs/running/audioset.yaml
}
# Clips or pairs of a step, over all processes; and how many processes a recipe says that it is for.
BATCHES = {
    "dali/prefix_tuning": (16, 1),
    "dali/alignment": (256, 4),
    "dali/distillation": (40, 4),
    "vipant/va_pretraining": (432, 1),  # configs/running/bimodal.yaml
    "vipant/va_barlow_twins": (432, 1),
    "vipant/vat_joint": (64, 1),  # bash/run_bimodal_at.sh, configs/running/trimodal.yaml
    "vipant/at_gold_captions": (64, 1),
    "vipant/at_curated_captions": (64, 1),
    "vipant/tagging_esc50": (50, 1),
    "vipant/tagging_audioset": (64, 1),
}
CHOICES = {  # ours, where the authors' code has the other
    "dali/alignment": {"first_frame": (False, True), "encoder_transport_gradient": (1, 2)},
}


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def test_every_recipe_is_held_against_what_was_published():
    found = {
        str(path.relative_to(ROOT / "recipes").with_suffix(""))
        for system in ("dali", "vipant")
        for path in (ROOT / "recipes" / system).glob("*.yaml")
    }
    assert found == set(PUBLISHED)


@pytest.mark.parametrize(("name", "numbers"), PUBLISHED.items())
def test_numbers(name, numbers):
    settings = recipe(name)
    assert {setting: settings.get(setting) for setting in numbers} == numbers


@pytest.mark.parametrize(("name", "batch"), BATCHES.items())
def test_batches(name, batch):
    settings = recipe(name)
    size, processes = batch
    assert settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1) * processes == size
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert processes == 1 or f"for {processes} GPUs" in text


@pytest.mark.parametrize("name", [name for name, numbers in PUBLISHED.items() if "lars" in numbers])
def test_lars_warms_up_for_ten_epochs(name):
    settings = recipe(name)
    assert settings["warmup_steps"] * settings["num_train_epochs"] == 10


def test_va_pretraining_reaches_the_epochs_of_the_published_checkpoints():
    """43681, 51623, 71478, 79420 and 83391 steps are 11, 13, 18, 20 and 21 epochs of 3971 steps of 432 clips."""
    assert [steps % 3971 for steps in (43681, 51623, 71478, 79420, 83391)] == [0] * 5
    assert recipe("vipant/va_pretraining")["num_train_epochs"] >= 83391 / 3971


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_choices_are_made_by_name_and_listed(name, choices):
    settings, page = recipe(name), (ROOT / "docs" / "deviations.md").read_text()
    for setting, (ours, theirs) in choices.items():
        assert settings[setting] == ours != theirs
        assert f"`{setting}: {str(theirs).lower()}`" in page
