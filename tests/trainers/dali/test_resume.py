"""Runs that are killed, run twice, spread over processes or sharded give the weights of one that is not."""

import resource
import signal

import pytest
import torch

from datasets_scripts.files import Folder
from datasets_scripts.shards import commit_shard, finish, grouped
from modeling_dali import DaliForConditionalGeneration
from tests.trainers.dali.stage_worker import STAGES, build, start, train
from tests.trainers.stages import clips
from trainers.checkpoints import last_complete, read_manifest
from trainers.recipes import load_rows
from trainers.rows import without_decoding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and losses of uninterrupted runs, by stage."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        assert start(train, stage, folder / stage) == [0]
    return {stage: torch.load(folder / stage / "final.pt") for stage in STAGES}


def assert_same_bits(folder, expected):
    found = torch.load(folder / "final.pt")["weights"]
    assert found.keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert torch.equal(found[name], tensor), name


def without_noise_only(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """
    Leaves out what has a gradient of zero but for rounding, which Adam makes as large as any other: biases of keys
    (softmax does not see them), and biases that shift the scores of all tokens alike.
    """
    if "scorer" in name and "bias" in name:
        return tensor[:0]
    if name.endswith("qkv.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor


def assert_close(folder, expected):
    found = torch.load(folder / "final.pt")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(
            without_noise_only(name, found["weights"][name]), without_noise_only(name, tensor), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "stage, step", [("prefix_tuning", 5), ("alignment", 1), ("alignment", 3), ("alignment", 6), ("distillation", 3)]
)
def test_killed_at_a_step(stage, step, whole, tmp_path):
    assert start(train, stage, tmp_path, step) == [-signal.SIGKILL]
    assert start(train, stage, tmp_path) == [0]
    assert_same_bits(tmp_path, whole[stage])


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt"])
def test_killed_while_saving(file, whole, tmp_path):
    assert start(train, "alignment", tmp_path, 4, file) == [-signal.SIGKILL]
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert start(train, "alignment", tmp_path) == [0]
    assert_same_bits(tmp_path, whole["alignment"])


def test_killed_with_accumulation_and_cache(tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    for name, step in (("whole", 0), ("cut", 3), ("cut", 0)):
        cache = {"cache_image_tokens": str(tmp_path / f"{name}-tokens")}
        code = start(train, "alignment", tmp_path / name, step, **options, **cache)
        assert code == [-signal.SIGKILL if step else 0]
    assert_same_bits(tmp_path / "cut", torch.load(tmp_path / "whole" / "final.pt"))


def test_killed_on_a_stream(tmp_path):
    options = {"rows": clips().to_iterable_dataset(), "train_rows": 8, "loss": "mmd"}
    for name, step in (("whole", 0), ("cut", 5), ("cut", 0)):
        assert start(train, "alignment", tmp_path / name, step, **options) == [-signal.SIGKILL if step else 0]
    assert_same_bits(tmp_path / "cut", torch.load(tmp_path / "whole" / "final.pt"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve prepared clips, as the stages open them for streaming."""
    folder = Folder(tmp_path_factory.mktemp("shards"))
    for index, rows in enumerate(grouped(without_decoding(clips(12)), 5)):
        commit_shard(folder, index, ({**row, "duration": 0.64} for row in rows))
    finish(folder, {"settings": {"frames": 3}})
    return load_rows(folder.path, streaming=True)


@pytest.mark.parametrize("group", [{}, {"dataloader_num_workers": 2}, {"world": 2}], ids=["one", "workers", "two"])
def test_killed_in_mid_epoch_on_prepared_shards(group, shards, tmp_path):
    options = {"rows": shards, "train_rows": 10, "loss": "mmd", "per_device_train_batch_size": 2, "save_steps": 1}
    killed = [-signal.SIGKILL] * group.get("world", 1)
    for name, step in (("whole", 0), ("cut", 9), ("cut", 0)):  # in the midst of an epoch of 5 steps, or 3
        codes = start(train, "alignment", tmp_path / name, step, **options, **group)
        assert codes == (killed if step else [0] * len(killed))
    assert_same_bits(tmp_path / "cut", torch.load(tmp_path / "whole" / "final.pt"))


@pytest.mark.parametrize("stage", ["prefix_tuning", "distillation"])
def test_same_seed_same_weights(stage, whole, tmp_path):
    assert start(train, stage, tmp_path) == [0]
    assert_same_bits(tmp_path, whole[stage])


def test_same_seed_same_weights_whatever_the_workers(whole, tmp_path):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    assert start(train, "alignment", tmp_path, **options) == [0]
    assert_same_bits(tmp_path, whole["alignment"])


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(stage, whole, tmp_path):
    assert start(train, stage, tmp_path, world=2, per_device_train_batch_size=2) == [0, 0]
    assert_close(tmp_path, whole[stage])


def test_two_processes_are_one_for_a_loss_over_the_batch(tmp_path):
    options = {"loss": "contrastive", "save_strategy": "no"}
    assert start(train, "alignment", tmp_path / "one", **options) == [0]
    assert start(train, "alignment", tmp_path / "two", world=2, per_device_train_batch_size=2, **options) == [0, 0]
    assert_close(tmp_path / "two", torch.load(tmp_path / "one" / "final.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes that find GPUs share the training")
def test_processes_that_would_train_each_for_itself_are_refused(tmp_path):
    assert start(refused, tmp_path, world=2) == [0, 0]


def refused(folder, **group):
    with pytest.raises(ValueError, match="use_cpu: true"):
        train("distillation", folder, use_cpu=False, **group)


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_over_two_processes(stage, whole, tmp_path):
    options = {"world": 2, "per_device_train_batch_size": 2, "fsdp": True, "fsdp_config": {"version": 2}}
    assert start(train, stage, tmp_path, 3, **options) == [-signal.SIGKILL] * 2
    assert start(train, stage, tmp_path, **options) == [0, 0]
    found = torch.load(tmp_path / "final.pt")
    for name, tensor in whole[stage]["weights"].items():
        torch.testing.assert_close(
            without_noise_only(name, found["weights"][name]), without_noise_only(name, tensor), rtol=1e-5, atol=1e-5
        )
    if stage == "prefix_tuning":
        model = build(stage, tmp_path / "new").model
        model.load_prefix(tmp_path)
        torch.testing.assert_close(model.model.prefix.data, found["weights"]["model.prefix"])
    else:
        saved = DaliForConditionalGeneration.from_pretrained(tmp_path).state_dict()
        prefix = "model." if stage == "alignment" else ""
        for name, tensor in found["weights"].items():
            if not name.startswith("scorer."):
                torch.testing.assert_close(saved[prefix + name], tensor)
        assert (tmp_path / "modeling_dali.py").exists() and not (tmp_path / "_fsdp_api.py").exists()


def train_on_a_full_disk(stage, folder):
    """Files may grow to a size that checkpoints before the last one fit into."""
    size = max(file.stat().st_size for file in (folder / "checkpoint-2").iterdir())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    try:
        train(stage, folder)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / "error").write_text(str(error))


def test_a_full_disk_keeps_the_last_checkpoint(whole, tmp_path):
    assert start(train, "alignment", tmp_path, 3) == [-signal.SIGKILL]
    assert start(train_on_a_full_disk, "alignment", tmp_path) == [0]
    message = (tmp_path / "error").read_text()
    assert "checkpoint-4 could not be written" in message and "checkpoint-2 is complete" in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert start(train, "alignment", tmp_path) == [0]
    assert_same_bits(tmp_path, whole["alignment"])


def test_resuming_needs_the_same_weights(tmp_path):
    start(train, "alignment", tmp_path, 3)
    trainer = build("alignment", tmp_path, loss="mmd")
    with pytest.raises(ValueError, match=r"scorer.* does not train in this run"):
        trainer.run()
    trainer = build("alignment", tmp_path)
    name, parameter = next(iter(trainer.trained_parameters()))
    parameter.data = parameter.data[..., :1].clone()
    with pytest.raises(ValueError, match=f"{name} has the shape"):
        trainer.run()


def test_other_settings_are_named_on_resuming(tmp_path, caplog):
    start(train, "prefix_tuning", tmp_path, 3)
    trainer = build("prefix_tuning", tmp_path, learning_rate=1e-3)
    assert trainer.checkpoint_to_resume() == str(tmp_path / "checkpoint-2")
    assert "differ from the checkpoint's: learning_rate." in caplog.text
    trainer.args.resume_from_checkpoint = "false"
    assert trainer.checkpoint_to_resume() is None
    assert read_manifest(tmp_path / "checkpoint-2")["settings"]["learning_rate"] == 1e-2
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["checkpoint-2"]
