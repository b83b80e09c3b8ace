import runpy
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import TrainingArguments

from modeling_dali import DaliForConditionalGeneration
from modeling_dali.chat_templates import SYSTEM
from tests.modeling_dali.test_chat_templates import CHATML
from tests.trainers.stages import ROOT, run_command, save_llava, save_world
from trainers.dali import alignment
from trainers.dali.alignment import AlignmentConfig
from trainers.dali.data_collator import DaliDataCollator
from trainers.dali.distillation import DistillationConfig
from trainers.dali.evaluate import EvaluationConfig
from trainers.dali.prefix_tuning import PrefixTuningConfig
from trainers.dali.pseudo_captions import PseudoCaptionConfig
from trainers.model_card import command_line
from trainers.processes import run_in_processes
from trainers.recipes import find_recipe, load_model, load_rows, parse_recipe, run_recipe

CONFIGS = {
    "prefix_tuning": PrefixTuningConfig,
    "alignment": AlignmentConfig,
    "pseudo_captions": PseudoCaptionConfig,
    "distillation": DistillationConfig,
    "evaluate": EvaluationConfig,
}
RECIPES = sorted((ROOT / "recipes" / "dali").glob("**/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipes_of_the_project_are_read(recipe):
    on_cpu = [] if recipe.stem == "pseudo_captions" else ["--bf16", "false"]
    config = parse_recipe(CONFIGS[recipe.stem], [str(recipe), "--seed", "7", *on_cpu])
    assert config.seed == 7
    for name, value in yaml.safe_load(recipe.read_text()).items():
        if name not in ("output_dir", "report_to", "bf16"):
            assert getattr(config, name) == value


def test_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nlearning_rate: 1e-3\nepsilon: 0.1\nreport_to: none\n")
    config = parse_recipe(AlignmentConfig, [str(recipe), "--epsilon", "0.2", "--augment", "false"])
    assert (config.learning_rate, config.epsilon, config.augment, config.loss) == (1e-3, 0.2, False, "attentive_ot")


def test_a_misspelt_field_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nlearning_rat: 1e-3\n")
    with pytest.raises(ValueError, match="there is no setting `learning_rat`: did you mean `learning_rate`"):
        parse_recipe(AlignmentConfig, [str(recipe)])
    with pytest.raises((SystemExit, ValueError)):
        parse_recipe(AlignmentConfig, ["--output_dir", "out", "--learning_rat", "1"])


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dali/alignment", "alignment", "alignment.yaml", str(ROOT / "recipes/dali/alignment.yaml")):
        assert find_recipe(name) == ROOT / "recipes" / "dali" / "alignment.yaml"
    (tmp_path / "alignment.yaml").write_text("epsilon: 0.1\n")
    assert parse_recipe(AlignmentConfig, ["alignment.yaml", "--output_dir", "out"]).epsilon == 0.1  # one's own first
    with pytest.raises(ValueError, match=r"no recipe alignmint: .* dali/alignment, dali/distillation"):
        find_recipe("alignmint")


def test_none_unsets_what_a_recipe_sets(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\naudio_encoder: ears.pth\nsave_total_limit: 3\n")
    config = parse_recipe(AlignmentConfig, [str(recipe), "--audio_encoder", "none", "--save_total_limit", "none"])
    assert config.audio_encoder is None and config.save_total_limit is None
    recipe.write_text("output_dir: out\naudio_encoder: null\n")
    assert parse_recipe(AlignmentConfig, [str(recipe)]).audio_encoder is None


@pytest.mark.parametrize("given", [["--loss", "emd"], ["--epsilon", "small"]])
def test_a_wrong_value_is_refused_in_one_line(given, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{given[0][2:]}: {given[1]}\n")
    for arguments in (given, [str(recipe)]):
        with pytest.raises(SystemExit) as ended:
            alignment.main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and line.startswith(f"error: argument {given[0]}: invalid ") and given[1] in line
    assert given[0] != "--loss" or ("attentive_ot" in line and "mmd" in line)


def test_errors_of_users_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        alignment.main(["--learning_rat", "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no setting `learning_rat`: did you mean `learning_rate`?\n"
    arguments = ["--dataset", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    assert alignment.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: There is no data set")
    with pytest.raises(ValueError, match="There is no data set"):
        alignment.main([*arguments, "--debug"])


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_help_explains_each_setting_of_a_stage(config_class, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run_recipe(config_class, lambda config: 0, ["--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 120
    inherited = {field.name for field in fields(TrainingArguments)}
    for field in fields(config_class):
        own = field.name not in inherited
        assert (f"--{field.name} " in shown) >= own, field.name
        assert not own or field.metadata["help"].split()[0] in shown, field.name
    if issubclass(config_class, TrainingArguments):
        assert "--adam_epsilon" not in shown and shown.index("--dataset") < shown.index("--learning_rate")
        with pytest.raises(SystemExit):
            run_recipe(config_class, lambda config: 0, ["--help_all"])
        assert "--adam_epsilon" in capsys.readouterr().out


def test_no_token_of_the_hub_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_secret", "--hub-token=hf_secret", "--seed", "1"])
    assert "secret" not in command_line() and command_line().endswith("--seed 1")


def test_data_sets(tmp_path):
    world = save_world(tmp_path)
    assert len(load_rows(world["dataset"])) == 8
    for split in ("test", "validation"):  # a split that is not there is not another one
        with pytest.raises(ValueError, match=f"has the splits train: not `{split}`"):
            load_rows(world["dataset"], split)
    parts = datasets.DatasetDict({"train": load_rows(world["dataset"]), "test": load_rows(world["dataset"]).take(2)})
    parts.save_to_disk(str(tmp_path / "parts"))
    assert len(load_rows(str(tmp_path / "parts"), "test")) == 2
    with pytest.raises(ValueError, match="train, test: choose one"):
        load_rows(str(tmp_path / "parts"))
    assert next(iter(load_rows(world["dataset"], streaming=True)))["id"] == "clip0"
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    assert load_rows(str(tmp_path / "rows.jsonl"))["id"][1] == "b"
    with pytest.raises(ValueError, match=r"There is no data set .*nowhere"):
        load_rows(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="No data set was given"):
        load_rows("")


def test_models(tmp_path):
    model, processor = load_model(save_llava(tmp_path / "llava"))
    assert model.config.model_type == "dali" and processor.audio_seq_length == 512
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.pth"):
        load_model(str(tmp_path / "llava"), audio_encoder=str(tmp_path / "broken.pth"))


def test_a_model_is_prompted_by_its_captioners_template(tmp_path):
    source = save_llava(tmp_path / "llava")
    assert load_model(source)[1].caption_prompt("image", "What ?") == f"{SYSTEM} USER: <image>\nWhat ? ASSISTANT:"
    (tmp_path / "llava" / "chat_template.jinja").write_text(CHATML)
    _, processor = load_model(source)
    expected = "<|im_start|>user\n<image><audio>\nWhat ?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.caption_prompt("audio_image", "What ?") == expected
    assert DaliDataCollator(processor, "audio_image", question="What ?").prompt == expected


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    world = save_world(tmp_path)
    config = Path(world["model"], "config.json")
    config.write_text(config.read_text().replace('"intermediate_size": 80', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=r"another shape: .*audio_tower\.layers\.0\.fc1"):
        load_model(world["model"])


def as_command(module: str, arguments: list[str], report) -> None:
    sys.argv = [module, *arguments]
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__")
    report(torch.distributed.is_initialized())


def test_a_command_leaves_its_group(tmp_path):
    """Else its processes abort at their end now and then, with everything saved."""
    world, left = save_world(tmp_path), []
    options = {"output_dir": str(tmp_path / "prefix"), "report_to": "none", "use_cpu": "true", "max_steps": "1"}
    arguments = [part for name, value in (world | options).items() for part in (f"--{name}", value)]
    run_in_processes(as_command, ("trainers.dali.prefix_tuning", arguments), 2, left.append)
    assert left == [False] and (tmp_path / "prefix" / "adapter_model.safetensors").exists()


def test_all_stages_by_their_commands(tmp_path):
    """The chain as a user types it, the alignment on two processes by accelerate."""
    world = save_world(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    shared = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 2}
    recipe.write_text(yaml.safe_dump(shared | {"dataset": world["dataset"]}))

    def options(**given):
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]

    prefix, aligned, pseudo, final = (str(tmp_path / name) for name in ("prefix", "aligned", "pseudo", "final"))
    run_command("-m", "trainers.dali.prefix_tuning", recipe, *options(model=world["model"], output_dir=prefix))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    run_command(*launch, "trainers.dali.alignment", recipe, *options(model=world["model"], output_dir=aligned))
    given = {"model": aligned, "prefix": prefix, "dataset": world["dataset"], "output": pseudo}
    run_command("-m", "trainers.dali.pseudo_captions", *options(max_new_tokens=5, temperature=5, **given))
    given = {"model": aligned, "captions": pseudo, "output_dir": final, "report_to": "tensorboard"}
    run_command("-m", "trainers.dali.distillation", recipe, *options(**given))
    DaliForConditionalGeneration.from_pretrained(final)
    card = Path(final, "README.md").read_text()
    assert "python -m trainers.dali.distillation" in card and world["dataset"] in card
    assert list(Path(final).glob("runs/*/events*"))
