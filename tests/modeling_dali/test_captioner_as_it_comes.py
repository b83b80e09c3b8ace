"""A captioner as its owner has it: another dtype, offloaded, with LoRA, in Trainer; and the ear that goes with it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import disk_offload
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

from modeling_dali import DaliCaptionerProcessor, DaliForConditionalGeneration, DaliForImageTextToText
from tests.modeling_dali.test_any_captioner import GREEDY, batch, row, with_ear
from tests.tiny import tiny_audio_config, tiny_dali, tiny_feature_extractor, tiny_llava
from tests.tiny_captioners import AUDIO, IMAGE, PREFIX, noise, save_gemma3, tiny_captioner, tiny_gemma3_processor

INDICES = {"audio_token_index": AUDIO, "prefix_token_index": PREFIX}


def hearing(name="qwen2_5_vl", prefix=2):
    """A captioner with an ear, and inputs with a picture, a sound and the prefix."""
    captioner = tiny_captioner(name)
    model = with_ear(captioner.model, prefix)
    parts = [("image", 0), ("audio", 0), *[PREFIX] * prefix]
    return model, batch(captioner, row(captioner, *parts), row(captioner, ("audio", 1)))


def labelled(inputs):
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100)}


# ---------------------------------------------------------------------------------------------------------------------
# The two classes


def test_a_llava_is_the_same_in_both_classes(tmp_path):
    """Logits, loss and every gradient of the ear, with prefix, to the last bit."""
    ours, processor = tiny_dali(prefix=3)
    with torch.no_grad():
        ours.model.prefix.mul_(1e3)
    llava = stock_llava(ours)
    theirs = DaliForImageTextToText.from_captioner(
        llava,
        audio_config=tiny_audio_config(),
        audio_token_index=ours.config.audio_token_index,
        prefix_token_index=ours.config.prefix_token_index,
    )
    theirs.set_prefix(ours.model.prefix.detach())
    parts = {name: t for name, t in ours.model.state_dict().items() if name in theirs.ear.state_dict()}
    theirs.ear.load_state_dict(parts)
    sounds = [noise(0, 8_000).numpy() * 0.1, noise(1, 25_000).numpy() * 0.1]
    inputs = processor(
        text=[processor.caption_prompt("audio")] * 2,
        audio=sounds,
        suffix=["a dog barks", "rain"],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    one, other = ours(**inputs), theirs(**inputs)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
    one.loss.backward()
    other.loss.backward()
    gradients = {name: p.grad for name, p in ours.model.named_parameters() if name in parts or name == "prefix"}
    for name, parameter in theirs.ear.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def stock_llava(model, tower="clip"):
    """The LLaVA within a model, in its own class."""
    llava = tiny_llava(tower)
    names = llava.state_dict().keys()
    llava.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    return llava


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_llava_model_can_be_an_ear_too(tower, tmp_path):
    model, processor = tiny_dali(tower, prefix=3)
    inputs = processor(text=processor.caption_prompt("audio"), audio=noise(0, 8_000).numpy(), return_tensors="pt")
    stock_llava(model, tower).save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="no name to load it by"):
        model.save_ear(tmp_path / "ear")
    model.config.base_model = str(tmp_path / "llava")
    model.save_ear(tmp_path / "ear")
    loaded = DaliForConditionalGeneration.from_pretrained(tmp_path / "ear")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.captioner_is_stock and not loaded.config.ear_only


# ---------------------------------------------------------------------------------------------------------------------
# The ear alone


def test_another_captioner_is_refused(tmp_path):
    captioner = tiny_captioner("gemma3").model
    captioner.save_pretrained(tmp_path / "captioner")
    model = with_ear(tmp_path / "captioner")
    model.save_ear(tmp_path / "ear")
    half = DaliForImageTextToText.from_captioner(captioner.to(torch.bfloat16), ear=tmp_path / "ear")
    assert half.ear.audio_projection.weight.dtype == torch.bfloat16  # the same in another dtype
    for part in (captioner.get_input_embeddings(), captioner.model.multi_modal_projector):
        other = copy.deepcopy(captioner)
        for parameter in (other.get_submodule(find(captioner, part))).parameters():
            parameter.data = parameter.data.flip(-1)
        with pytest.raises(ValueError, match=r"made for .*captioner.* This captioner is another one: its .* differ"):
            DaliForImageTextToText.from_captioner(other, ear=tmp_path / "ear")


def find(model, module):
    return next(name for name, found in model.named_modules() if found is module)


def test_the_card_of_an_ear_names_its_captioner(tmp_path):
    tiny_captioner("gemma3").model.save_pretrained(tmp_path / "captioner")
    model = with_ear(tmp_path / "captioner")
    model.config.base_model, model.config.base_model_revision = "someone/a-captioner", "0123abc"
    model.save_ear(tmp_path / "ear")
    card = ModelCard.load(tmp_path / "ear" / "README.md")
    assert card.data.base_model == "someone/a-captioner"
    assert "holds the ear alone" in card.text and "`someone/a-captioner` at `0123abc`" in card.text
    settings = json.loads((tmp_path / "ear" / "config.json").read_text())
    assert settings["ear_only"] and settings["base_model_revision"] == "0123abc"
    assert settings["auto_map"]["AutoModel"] == "modeling_dali_captioner.DaliForImageTextToText"


def test_push_ear_to_hub_uploads_the_ear(tmp_path, monkeypatch):
    tiny_captioner("gemma3").model.save_pretrained(tmp_path / "captioner")
    model, calls = with_ear(tmp_path / "captioner"), {}

    def uploaded(self, repo_id, folder_path, **kwargs):
        calls.update(repo=repo_id, files={path.name for path in Path(folder_path).iterdir()}, **kwargs)
        return "address"

    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: type("Repo", (), {"repo_id": "someone/an-ear"}))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, name, **k: name == "README.md")
    monkeypatch.setattr(HfApi, "upload_folder", uploaded)
    assert model.push_ear_to_hub("an-ear", create_pr=True) == "address"
    assert calls["repo"] == "someone/an-ear" and calls["create_pr"]
    assert {"ear.safetensors", "config.json", "modeling_dali_captioner.py"} <= calls["files"]
    assert "README.md" not in calls["files"] and "model.safetensors" not in calls["files"]


FRESH = """
import json, sys

class Absent:  # the project is not installed for whoever loads from the Hub
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("modeling_dali", "trainers", "datasets_scripts", "modeling_vipant"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Absent())
import numpy as np
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

captions = []
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
        sound = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1
        inputs = processor(text=processor.caption_prompt("audio"), audio=sound, return_tensors="pt")
        captions.append(model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist())
print(json.dumps(captions))
"""


def test_a_fresh_interpreter_loads_model_and_ear(tmp_path):
    processor = tiny_gemma3_processor()
    model = DaliForImageTextToText.from_captioner(
        save_gemma3(tmp_path / "captioner"),
        audio_config=tiny_audio_config(),
        tokenizer=processor.tokenizer,
        attn_implementation="eager",
    )
    model.set_attn_implementation("eager")
    processor = DaliCaptionerProcessor.for_model(model.config, processor, tiny_feature_extractor())
    model.save_pretrained(tmp_path / "whole")
    model.save_ear(tmp_path / "ear")
    for folder in ("whole", "ear"):
        processor.save_pretrained(tmp_path / folder)
    sound = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1
    inputs = processor(text=processor.caption_prompt("audio"), audio=sound, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, tmp_path / "whole", tmp_path / "ear"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Captioners as they come


def bitsandbytes_8_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_lora_on_the_captioner(name):
    captioner = tiny_captioner(name)
    plain = with_ear(copy.deepcopy(captioner.model))
    wrapped = get_peft_model(captioner.model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    model = with_ear(wrapped).eval()
    model.ear.load_state_dict(plain.ear.state_dict())
    inputs = batch(captioner, row(captioner, ("image", 0), ("audio", 0)), row(captioner, ("audio", 1)))
    with torch.no_grad():  # LoRA starts at nothing
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    before = copy.deepcopy(model.captioner.state_dict())
    if name == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()  # asked for in training
    model.train()(**labelled(inputs)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = model.captioner.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".lora_" in name for name in moved)
    with pytest.raises(ValueError, match="save the ear alone"):
        model.save_pretrained("nowhere")


def test_lora_on_the_whole():
    model, inputs = hearing()
    expected = model.generate(**inputs, **GREEDY)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    assert torch.equal(wrapped.generate(**inputs, **GREEDY), expected)
    wrapped(**labelled(inputs)).loss.backward()
    assert any(p.grad is not None and ".lora_" in name for name, p in wrapped.named_parameters())


def test_half_precision():
    model, inputs = hearing()
    with torch.no_grad():
        expected = model(**inputs).logits
        half = model.to(torch.bfloat16)
        logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    real = inputs["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits[real].float(), expected[real], dim=-1).min() > 0.95
    half.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("method", [bitsandbytes_8_bit, torchao_int8])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_captioner_in_8_bit(name, method, tmp_path):
    captioner = tiny_captioner(name)
    captioner.model.save_pretrained(tmp_path / "captioner")
    plain = with_ear(tmp_path / "captioner", prefix=2)
    plain.save_ear(tmp_path / "ear")
    model = DaliForImageTextToText.from_captioner(
        tmp_path / "captioner", ear=tmp_path / "ear", quantization_config=method(), device_map="cpu"
    )
    assert all(torch.equal(tensor, model.ear.state_dict()[name]) for name, tensor in plain.ear.state_dict().items())
    parts = [("image", 0), ("audio", 0), PREFIX, PREFIX]
    inputs = batch(captioner, row(captioner, *parts), row(captioner, ("audio", 1)))
    with torch.no_grad():
        logits, expected = model(**inputs).logits, plain(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits[real].float(), expected[real], dim=-1).min() > 0.95
    assert not torch.equal(logits, expected)
    model.generate(**inputs, **GREEDY)
    model(**labelled(inputs)).loss.backward()
    assert model.ear.audio_projection.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="save the ear alone"):
        model.save_pretrained(tmp_path / "whole")
    model.save_ear(tmp_path / "again")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_captioner_on_disk(name, tmp_path):
    captioner = tiny_captioner(name)
    plain = with_ear(copy.deepcopy(captioner.model))
    disk_offload(captioner.model, tmp_path / "offload")
    assert captioner.model.get_input_embeddings().weight.device.type == "meta"
    model = with_ear(captioner.model)
    model.ear.load_state_dict(plain.ear.state_dict())
    inputs = batch(captioner, row(captioner, ("image", 0), ("audio", 0)), row(captioner, ("audio", 1)))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    assert model.fingerprint() == plain.fingerprint()


def test_trainer_with_checkpointed_activations(tmp_path):
    model, inputs = hearing()
    model.captioner.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    rows = datasets.Dataset.from_dict({"index": [0, 1]})
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=lambda _: labelled(inputs)
    )
    assert trainer.model_accepts_loss_kwargs == model.accepts_loss_kwargs
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("ear.") for name in moved)


def test_what_else_generation_does():
    model, inputs = hearing()
    expected = model.generate(**inputs, **GREEDY)
    for way in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, **GREEDY, **way), expected), way
    alone = {name: value[:1] if name != "pixel_values" else value for name, value in inputs.items()}
    greedy = model.generate(**alone, **GREEDY)
    assert torch.equal(model.generate(**alone, **GREEDY, prompt_lookup_num_tokens=2), greedy)
    assert model.generate(**inputs, do_sample=True, max_new_tokens=4, repetition_penalty=1.2).shape[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_say_what_is_wrong():
    captioner = tiny_captioner("qwen2_5_vl")
    with pytest.raises(ValueError, match="two ids below 99"):
        DaliForImageTextToText.from_captioner(captioner.model)
    with pytest.raises(ValueError, match="two ids below 99"):
        DaliForImageTextToText.from_captioner(captioner.model, audio_token_index=90, prefix_token_index=99)
    with pytest.raises(ValueError, match="qwen2_5_vl captioner is not known to work token by token"):
        DaliForImageTextToText.from_captioner(captioner.model, **INDICES, alignment_target="projector_input")
    with pytest.raises(TypeError, match="dtype"):
        DaliForImageTextToText.from_captioner(captioner.model, **INDICES, dtype=torch.float16)
    model, inputs = hearing()
    with pytest.raises(TypeError, match="audio_features"):
        model(**inputs, audio_features=torch.zeros(1))
    with pytest.raises(ValueError, match="64 <audio> placeholders, but there are 32"):
        model(**inputs | {"input_features": inputs["input_features"][:1]})
    with pytest.raises(ValueError, match="64 <audio> placeholders, but there are 0"):
        model.generate(**{name: value for name, value in inputs.items() if name != "input_features"})
    with pytest.raises(ValueError, match="Give `input_ids`"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=8)
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    with pytest.raises(ValueError, match="prompt tuning does not reach the captioner"):
        tuned.generate(**inputs)


def test_a_captioner_keeps_its_attention():
    captioner = tiny_captioner("llava").model
    assert captioner.config._attn_implementation == "eager"
    model = with_ear(captioner)
    assert model.config.captioner_config.text_config._attn_implementation == "eager"
    assert model.captioner.model.language_model.config._attn_implementation == "eager"
