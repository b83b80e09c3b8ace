"""The whole demonstration, as small as can be: what it writes, that it resumes, repeats, leaves images alone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel

from examples.sounding_world import ablation, runner
from examples.sounding_world import demo as demo_module
from examples.sounding_world.ablation import AblationConfig
from examples.sounding_world.demo import RECIPES, Demo, DemoConfig, run
from examples.sounding_world.evaluation import area_under_roc, image_captions, must_hold, values_by_kind
from modeling_dali.audio_io import read_audio
from trainers.dali import cli
from trainers.dali.alignment import AlignmentConfig

QUICK = {"use_cpu": True, "max_steps": 3, "save_steps": 1, "logging_steps": 1}
TINY = {
    "captioner": {"per_device_train_batch_size": 8, "hidden_size": 32, "vision_layers": 1, "text_layers": 1},
    "prefix_tuning": {"prefix_length": 4},
    "audio_pretraining": {"per_device_train_batch_size": 4},
    "alignment": {"per_device_train_batch_size": 4},
    "distillation": {"per_device_train_batch_size": 4},
    "supervised": {"per_device_train_batch_size": 4},
}


def tiny_config(folder: Path) -> DemoConfig:
    """The project's recipes with few steps, and a world of few scenes."""
    recipes = folder / "recipes"
    recipes.mkdir()
    for path in RECIPES.glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if path.stem in TINY:
            recipe |= QUICK | TINY[path.stem]
        (recipes / path.name).write_text(yaml.safe_dump(recipe))
    sizes = {"captions": 24, "prefix": 4, "video": 8, "distillation": 6, "supervised": 6, "test": 4}
    audio = {"num_mel_bins": 32, "audio_width": 32, "audio_layers": 1}
    return DemoConfig(
        str(folder / "run"), str(recipes), processes=1, image_size=32, duration=1.28, frames=2, **sizes, **audio
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[DemoConfig, dict]:
    config = tiny_config(tmp_path_factory.mktemp("demo"))
    return config, run(config)


def test_writes_what_it_promises(finished):
    config, results = finished
    output = Path(config.output)
    assert json.loads((output / "results.json").read_text()) == results
    page = (output / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in page  # nothing beside it
    assert page.count('class="card clip"') == config.test and page.count("<audio") == config.test
    assert page.count("<svg") == 6 + 3 and "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert set(results["seconds"]) == {stage.name for stage in Demo(config).stages()} | {"all"}
    for name, scores in results["variants"].items():
        assert 0 <= scores["recall"] <= 1 and scores["clips"] == config.test, name
    assert {figure["what"] for figure in results["must_hold"]} and all("met" in f for f in results["must_hold"])


def test_another_captioner_goes_through_all_stages(tmp_path):
    config = replace(tiny_config(tmp_path), captioner="gemma3")
    results, output = run(config), Path(config.output)
    assert set(results["variants"]) >= {"after distillation", "supervised twin"}
    (same,) = (figure for figure in results["must_hold"] if "image" in figure["what"] and "same" in figure["what"])
    assert same["met"]
    for folder in ("untrained", "aligned", "model"):  # ears: the captioner stays where it is
        assert (output / folder / "ear.safetensors").exists() and not (output / folder / "model.safetensors").exists()
    model = AutoModel.from_pretrained(output / "model")
    assert model.config.captioner_config.model_type == "gemma3" and model.captioner_is_stock


def test_the_model_loads_and_captions(finished, capsys):
    config, _ = finished
    model = AutoModel.from_pretrained(f"{config.output}/model", trust_remote_code=True)
    assert model.config.model_type == "dali" and model.config.prefix_length == 0
    sounds = sorted(map(str, Path(config.output, "samples").glob("*.wav")))
    assert cli.main(["caption", *sounds, "--model", f"{config.output}/model"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == len(sounds) == 4
    videos = sorted(map(str, Path(config.output, "samples").glob("*.mp4")))
    assert cli.main(["caption", *videos, "--with-video", "--model", f"{config.output}/model"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    for sound, video in zip(sounds, videos, strict=True):  # they begin and end together, whatever AAC puts before it
        plain, coded = (read_audio(file)[0] for file in (sound, video))
        assert plain.shape == coded.shape and np.corrcoef(plain, coded)[0, 1] > 0.9


def test_image_captions_stay_as_they_are(finished):
    config, results = finished
    demo = Demo(config)
    before, after = image_captions(demo, "untrained"), image_captions(demo, "model")
    assert before[0] == after[0] and torch.equal(before[1], after[1])
    figure = next(f for f in results["must_hold"] if "image captions" in f["what"])
    assert figure["value"] == 1.0
    # The comparison can fail: another language model gives other logits.
    model, processor = demo.model("model")
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(f"{config.output}/changed")
    processor.save_pretrained(f"{config.output}/changed")
    assert not torch.equal(before[1], image_captions(demo, "changed")[1])


def test_no_sound_meets_a_text_before_the_test(finished):
    config, _ = finished
    demo = Demo(config)
    text = {"caption", "captions", "question", "labels", "seen_captions", "things"}
    for split in ("captions", "prefix"):
        assert "audio" not in demo.rows(split).column_names
    for split in ("video", "distillation"):
        assert not text & set(demo.rows(split).column_names)
    ids = [
        set(demo.rows(split)["id"]) for split in ("captions", "prefix", "video", "distillation", "supervised", "test")
    ]
    assert len(set().union(*ids)) == sum(map(len, ids))  # and no clip is in two splits


def test_the_aligned_model_never_saw_the_supervised_split(finished, monkeypatch):
    config, _ = finished
    used = []
    monkeypatch.setattr(Demo, "rows", lambda self, split, variant="standard": used.append(split) or [])
    monkeypatch.setattr(Demo, "train", lambda self, trainer: None)
    monkeypatch.setattr(demo_module, "AlignmentTrainer", lambda *args: None)
    monkeypatch.setattr(demo_module, "DistillationTrainer", lambda *args: None)
    monkeypatch.setattr(demo_module, "join_captions", lambda rows, folder: rows)
    demo = Demo(config)
    demo.alignment()
    demo.distillation()
    demo.audio_pretraining()
    assert used == ["video", "distillation", "video"]


def test_a_second_run_trains_nothing(finished, monkeypatch, capsys):
    config, results = finished
    monkeypatch.setattr(Demo, "train", lambda self, trainer: pytest.fail("a stage was trained again"))
    assert run(config) == results
    out = capsys.readouterr().out
    assert all(f"{stage.name}: already done in" in out for stage in Demo(config).stages())


def test_two_runs_with_one_seed_agree(finished, tmp_path):
    """Two runs with one seed agree in every metric and in every weight of the final model."""
    config, results = finished
    again = replace(config, output=str(tmp_path / "again"))
    repeated = run(again)
    assert repeated["variants"] == results["variants"] and repeated["must_hold"] == results["must_hold"]
    weights = [Demo(c).model("model")[0].state_dict() for c in (config, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_share_the_training_of_the_audio_encoder(finished, tmp_path, monkeypatch):
    """It comes out as from one process, but for rounding, and the bar hears of every step."""
    config, _ = finished
    demo = Demo(replace(config, output=str(tmp_path / "shared"), processes=2))
    for folder in ("world", "untrained"):
        shutil.copytree(Path(config.output, folder), tmp_path / "shared" / folder)
    told, show = [], Demo.show
    monkeypatch.setattr(Demo, "show", lambda self, *tells: told.append(tells) or show(self, *tells))
    demo.audio_pretraining()
    assert [share for share, _ in told] == [1 / 3, 2 / 3, 1] and told[1][1].startswith("loss ")
    assert 0.2 < demo.shared_memory < 20  # GiB, three processes with torch in them
    state = json.loads((tmp_path / "shared" / "pretrained" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 2  # of the recipe's 4
    shared, alone = (Demo(c).model("pretrained")[0].state_dict() for c in (demo.config, config))
    start = Demo(config).model("untrained")[0].state_dict()
    trained = [name for name in start if not torch.equal(alone[name], start[name])]
    assert trained and all("audio" in name for name in trained)
    for name in trained:
        if "qkv.bias" not in name:  # keys' biases have no gradient but rounding, of which Adam makes steps
            torch.testing.assert_close(shared[name], alone[name], rtol=0, atol=1e-4)


def test_a_batch_that_processes_cannot_share_is_an_error(finished, monkeypatch):
    config, _ = finished
    monkeypatch.setattr(AlignmentConfig, "world_size", 3)
    with pytest.raises(ValueError, match=r"alignment\.yaml: 3 processes cannot share a batch of 4"):
        Demo(config).train_audio_encoder("alignment", "untrained", "aligned", {})


def test_other_settings_do_not_mix(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(replace(config, seed=1))


def test_a_stage_that_was_cut_off_goes_on(finished, tmp_path, monkeypatch):
    """Killed in the middle of alignment, the next run takes the checkpoint and ends where the whole run ended."""
    config, results = finished
    output = tmp_path / "cut"
    cut = replace(config, output=str(output))
    original = runner.ShowProgress.on_step_end
    stage: list[str] = []

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        stage.append(self.progress.stage)
        if self.progress.stage == "alignment" and state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.ShowProgress, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert not (output / "results.json").exists() and (output / "aligned" / "checkpoint-2").is_dir()
    stage.clear()
    monkeypatch.setattr(
        runner.ShowProgress,
        "on_step_end",
        lambda self, args, state, control, **k: stage.append((self.progress.stage, state.global_step)),
    )
    assert run(cut)["variants"] == results["variants"]
    assert stage[0] == ("alignment", 3) and "captioner" not in {name for name, _ in stage}


def test_failed_stages_are_not_noted_as_done(tmp_path):
    def fail():
        raise OSError("the disk is full")

    demo = Demo(DemoConfig(str(tmp_path)))
    stages = [demo.stage("first", 1, lambda: None), demo.stage("second", 1, fail)]
    with pytest.raises(OSError, match="full"):
        demo.run_stages(stages, tmp_path / "done")
    assert [path.stem for path in (tmp_path / "done").iterdir()] == ["first"]


def test_bounds_are_held_against_the_figures():
    good, poor = {"recall": 0.9, "cider_d": 1.0}, {"recall": 0.1, "cider_d": 0.1}
    names = ("after distillation", "supervised twin", "after distillation, unseen combinations", "after stage 1b")
    names += ("after stage 1b, audio + image", "after distillation, audio + image")
    variants = dict.fromkeys(names, good)
    variants |= dict.fromkeys(("before alignment", "most frequent caption"), poor)
    assert all(figure["met"] for figure in must_hold(variants, True, 0.7))
    missed = [
        figure for figure in must_hold(variants | {"after distillation": poor}, False, None) if not figure["met"]
    ]
    assert len(missed) == 6
    assert sum(figure["met"] for figure in must_hold(dict.fromkeys(variants, poor), True, 0.69)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Ablation


def test_ablation_reuses_the_captioner_and_writes_a_table(finished, monkeypatch):
    config, _ = finished
    trained = []
    original = Demo.train
    monkeypatch.setattr(Demo, "train", lambda self, trainer: trained.append(trainer) or original(self, trainer))
    settings = AblationConfig(config.output, config.recipes, seeds="0,1", losses="attentive_ot,mmd")
    results = ablation.run(settings, config)
    kinds = [type(trainer).__name__ for trainer in trained]
    assert kinds.count("AlignmentTrainer") == 6 and kinds.count("DistillationTrainer") == 6 and len(kinds) == 12
    losses = [trainer.args.loss for trainer in trained if "Alignment" in type(trainer).__name__]
    assert losses == 2 * ["contrastive", "attentive_ot", "mmd"]
    names = ("start", "attentive_ot", "mmd", "bounds")
    assert set(results["runs"]) == {f"{name} {seed}" for name in names for seed in (0, 1)}
    assert len(results["runs"]["mmd 1"]) == 5 and set(results["above"]) == {
        "attentive_ot above mmd",
        "mmd above attentive_ot",
    }
    lines = Path(config.output, "ablation", "table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * 5 + 4 and all("±" in line and line.endswith("| 2 |") for line in lines[2:])
    page = Path(config.output, "report.html").read_text()
    assert "mmd (ablation)" in page and "ablation: supervised twin" in page
    trained.clear()
    assert ablation.run(settings, config)["runs"] == results["runs"] and not trained


def test_ablation_counts_the_ordering():
    def scores(recall):
        return {ablation.FINAL: {"recall": recall, "cider_d": -recall}}

    runs = {"mmd 0": scores(0.5), "ot 0": scores(0.4), "mmd 1": scores(0.2), "ot 1": scores(0.2)}
    counts = ablation.above(runs, ["mmd", "ot"], [0, 1])
    assert counts["mmd above ot"] == {"recall": "1 of 2", "cider_d": "0 of 2"}
    assert counts["ot above mmd"] == {"recall": "0 of 2", "cider_d": "1 of 2"}


def test_ablation_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="'mdd' is none of them"):
        AblationConfig(losses="attentive_ot,mdd")
    with pytest.raises(ValueError, match="must include attentive_ot"):
        AblationConfig(losses="mmd")


# ---------------------------------------------------------------------------------------------------------------------
# Weights of image tokens


def test_area_under_roc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 40).tolist(), rng.integers(0, 7, 30).tolist()
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert area_under_roc(positive, negative) == pytest.approx(np.mean(pairs))
    assert area_under_roc(positive, []) is None


def test_tokens_belong_to_the_things_that_cover_half_of_their_patch():
    def thing(sounds: bool, *covered: tuple[int, int, int, int]) -> dict:
        mask = Image.new("L", (40, 40))
        for box in covered:
            mask.paste(255, box)
        return {"mask": mask, "sounds": sounds}

    weights = np.arange(16.0).reshape(4, 4)  # patches of 10 pixels
    things = [thing(True, (0, 0, 16, 14)), thing(True, (0, 14, 10, 16)), thing(False, (14, 0, 40, 4), (30, 0, 40, 20))]
    found = values_by_kind(weights, things)
    # Of patch 4, two things that sound cover 40 % and 20 %; of patch 1, one that sounds 60 % and a silent one 24 %.
    assert found == {"sounding": [0, 1, 4], "silent": [3, 7], "background": [2, 5, 6, *range(8, 16)]}
    both = [thing(True, (0, 0, 10, 6)), thing(False, (0, 3, 10, 10))]
    assert values_by_kind(weights, both) == {"sounding": [], "silent": [], "background": list(range(1, 16))}
