"""All stages with a captioner that is no LLaVA, each from the folder that the last one wrote: ears, never copies."""

import json

import pytest
import soundfile
import torch
from transformers import AutoModelForImageTextToText

from modeling_dali import DaliCaptionerProcessor, DaliForImageTextToText
from tests.tiny import tiny_audio_config, tiny_feature_extractor
from tests.tiny_captioners import save_gemma3, tiny_gemma3_processor
from tests.trainers.stages import clips, moved, picture, settings, state
from trainers.dali.alignment import AlignmentConfig, AlignmentTrainer, pad_tokens
from trainers.dali.cli import main as dali
from trainers.dali.distillation import DistillationConfig, DistillationTrainer, join_captions
from trainers.dali.evaluate import EvaluationConfig, evaluate
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer
from trainers.dali.pseudo_captions import PseudoCaptionConfig, read_pseudo_captions, write_pseudo_captions
from trainers.recipes import load_model

QUICK = {"num_train_epochs": 2, "save_strategy": "no", "per_device_train_batch_size": 4}


def untrained(folder):
    """A model whose captioner is on disk, as a recipe builds it, with a smaller ear."""
    processor = tiny_gemma3_processor()
    model = DaliForImageTextToText.from_captioner(
        save_gemma3(folder), audio_config=tiny_audio_config(), tokenizer=processor.tokenizer
    )
    return model, DaliCaptionerProcessor.for_model(model.config, processor, tiny_feature_extractor())


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_all_stages(tmp_path, capsys):
    rows = clips(8)
    model, processor = untrained(tmp_path / "captioner")
    before = state(model)
    options = {"loss": "attentive_ot", "uniform_epochs": 0.0, "cache_image_tokens": str(tmp_path / "tokens")}
    config = AlignmentConfig(**settings(tmp_path / "aligned", **QUICK, **options))
    metrics = AlignmentTrainer(model, config, processor, rows, rows).run()
    assert "eval_modality_gap" in metrics
    expected = ("ear.audio_tower.", "ear.audio_projection.")
    assert moved(model, before) and all(name.startswith(expected) for name in moved(model, before))
    assert {"ear.safetensors", "scorer.safetensors", "processor_config.json"} <= files(tmp_path / "aligned")
    assert "model.safetensors" not in files(tmp_path / "aligned")

    model, processor = load_model(str(tmp_path / "aligned"))
    config = PrefixTuningConfig(**settings(tmp_path / "prefix", **QUICK, prefix_length=3))
    before = state(model)
    PrefixTuningTrainer(model, config, processor, rows).run()
    assert moved(model, before | {"ear.prefix": torch.zeros(3, 32)}) == {"ear.prefix"}

    model, processor = load_model(str(tmp_path / "aligned"))
    model.load_prefix(tmp_path / "prefix")
    processor.follow(model.config)
    config = PseudoCaptionConfig(output=str(tmp_path / "captions"), batch_size=4, max_new_tokens=6)
    assert write_pseudo_captions(model, processor, rows, config)["skipped"] == 0
    assert set(read_pseudo_captions(tmp_path / "captions")) == set(rows["id"])

    model, processor = load_model(str(tmp_path / "aligned"))
    before = state(model)
    config = DistillationConfig(**settings(tmp_path / "model", **QUICK, learning_rate=1e-2))
    DistillationTrainer(model, config, processor, join_captions(rows, str(tmp_path / "captions"))).run()
    assert {name.rpartition(".")[0] for name in moved(model, before)} == {
        "ear.audio_projector.linear_1",
        "ear.audio_projector.linear_2",
    }
    assert "ear.safetensors" in files(tmp_path / "model") and "model.safetensors" not in files(tmp_path / "model")

    loaded, processor = load_model(str(tmp_path / "model"))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    config = EvaluationConfig(output=str(tmp_path / "scores"), max_new_tokens=6)
    assert evaluate(loaded, processor, rows, config)["clips"] == 8

    soundfile.write(tmp_path / "a.wav", torch.randn(8_000).numpy() * 0.1, 16_000)
    picture(0).save(tmp_path / "a.png")
    capsys.readouterr()
    arguments = [str(tmp_path / "a.wav"), "--model", str(tmp_path / "model"), "--image", str(tmp_path / "a.png")]
    assert dali(["caption", *arguments, "--format", "jsonl"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"file", "start", "end", "caption"}
    assert dali(["explain", *arguments, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "a.where.png").exists()


def test_a_captioner_by_name_gets_an_ear(tmp_path):
    model, processor = load_model(save_gemma3(tmp_path))
    assert isinstance(model, DaliForImageTextToText) and isinstance(processor, DaliCaptionerProcessor)
    assert model.config.base_model == str(tmp_path) and model.config.alignment_target == "projector_output"


def test_a_trained_captioner_is_saved_whole(tmp_path):
    model, processor = untrained(tmp_path / "captioner")
    config = DistillationConfig(**settings(tmp_path / "model", **QUICK, lora_rank=2))
    DistillationTrainer(model, config, processor, clips(4)).run()
    assert "ear.safetensors" not in files(tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "captioner").state_dict()
    changed = {name for name, tensor in loaded.captioner.state_dict().items() if tensor.shape == stock[name].shape}
    changed = {name for name in changed if not torch.equal(stock[name], loaded.captioner.state_dict()[name])}
    assert changed and all("language_model" in name and name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize("loss", ["mmd", "ot", "sinkhorn", "unbalanced_ot", "attentive_ot", "contrastive"])
def test_pictures_with_different_numbers_of_tokens(tmp_path, loss):
    """A batch of ragged tokens has the losses that its pairs have alone, whatever stands in the padding."""
    model, processor = untrained(tmp_path / "captioner")
    config = AlignmentConfig(**settings(tmp_path / "run", loss=loss))
    wrapper = AlignmentTrainer(model, config, processor, clips(2)).model.eval()
    features = torch.randn(2, 64, 32)
    ragged = [torch.randn(4, 32), torch.randn(6, 32)]
    weight = torch.ones(2)
    with torch.no_grad():
        together = wrapper(features, weight, image_tokens=ragged)
        for i in range(2):
            alone = wrapper(features[i : i + 1], weight[:1], image_tokens=ragged[i][None])
            if loss != "contrastive":  # which holds the pairs of a batch against each other
                torch.testing.assert_close(together["losses"][i], alone["losses"][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together["image"][i], alone["image"][0])
    padded, mask = pad_tokens(ragged)
    assert padded.shape == (2, 6, 32) and mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]


@pytest.mark.parametrize("stream", [False, True])
def test_audio_tokens_start_where_image_tokens_are(tmp_path, stream):
    model, processor = untrained(tmp_path / "captioner")
    rows = clips(8)
    config = AlignmentConfig(**settings(tmp_path / "run", augment=False, train_rows=8 if stream else None))
    trainer = AlignmentTrainer(model, config, processor, rows.to_iterable_dataset() if stream else rows)
    batch = trainer.data_collator([row | {"index": index} for index, row in enumerate(rows)])
    with torch.no_grad():
        audio = model.get_audio_tokens(batch["input_features"]).flatten(0, 1)
        image = model.get_image_tokens(pixel_values=batch["pixel_values"]).flatten(0, 1)
    torch.testing.assert_close(audio.mean(0), image.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((audio - audio.mean(0)).std(), (image - image.mean(0)).std(), atol=1e-4, rtol=1e-4)
    before = model.ear.audio_projection.weight.clone()
    AlignmentTrainer(model, config, processor, rows.to_iterable_dataset() if stream else rows)
    assert torch.equal(model.ear.audio_projection.weight, before)  # what has begun goes on from where it is
