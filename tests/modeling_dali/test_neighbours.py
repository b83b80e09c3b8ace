"""What people put around a model: adapters, offloading, quantised weights, trl's trainer."""

import copy

import pytest
import soundfile
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_dali import DaliForConditionalGeneration
from tests.modeling_dali.test_modeling_dali import MIXED, picture, prepare, sound
from tests.tiny import tiny_dali

PARTS = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
    "model.audio_tower",
    "model.audio_projection",
    "model.audio_projector",
    "lm_head",
]
# What stays as it is where the captioner's weights are made smaller: the ear, and what it is aligned with.
NOT_QUANTISED = ["model.audio_tower", "model.audio_projection", "model.audio_projector", "model.multi_modal_projector"]


@pytest.fixture
def saved(tmp_path):
    """A saved model with a prefix, inputs for it, and what it makes of them."""
    model, processor = tiny_dali(prefix=2)
    model.save_pretrained(tmp_path / "model")
    inputs = prepare(processor, MIXED)
    with torch.no_grad():
        return model, tmp_path / "model", inputs, model(**inputs).logits


def assert_same(model, inputs, logits, other):
    """`other` gives the logits, and writes the text, of `model`."""
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, logits)
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(other.generate(**inputs, max_new_tokens=4, do_sample=False), text)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT (prompt tuning: test_prefix.py)


def test_lora_on_everything(tmp_path):
    model, processor = tiny_dali()
    inputs = prepare(processor, [("audio_image", 0, 0)], suffix=["a dog barks"])
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    for part in PARTS[:-1]:
        assert any(part in name for name in names), part
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora" in n and ".audio_" in n)

    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapted(**inputs).logits
        assert torch.equal(PeftModel.from_pretrained(tiny_dali()[0], tmp_path)(**inputs).logits, logits)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_within_the_model():
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"transformers' `add_adapter` needs peft {MIN_PEFT_VERSION}")
    model, processor = tiny_dali()
    inputs = prepare(processor, MIXED)
    with torch.no_grad():
        before = model(**inputs).logits
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        assert not torch.equal(model(**inputs).logits, before)
        model.disable_adapters()
        assert torch.equal(model(**inputs).logits, before)


# ---------------------------------------------------------------------------------------------------------------------
# accelerate


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_disk(saved, part, tmp_path):
    model, folder, inputs, logits = saved
    places = dict.fromkeys([*PARTS, "model.prefix"], "cpu") | {part: "disk"}
    placed = DaliForConditionalGeneration.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert {p.device.type for p in placed.get_submodule(part).parameters()} == {"meta"}
    assert_same(model, inputs, logits, placed)


@pytest.mark.parametrize("memory", [150_000, 1_000])
def test_placed_by_memory(saved, memory, tmp_path):
    model, folder, inputs, logits = saved
    placed = DaliForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "disk"
    )
    assert "disk" in placed.hf_device_map.values()
    assert_same(model, inputs, logits, placed)


def test_everything_offloaded(saved, tmp_path):
    model, _, inputs, logits = saved
    copies = copy.deepcopy(model), copy.deepcopy(model)
    assert_same(model, inputs, logits, cpu_offload(copies[0], execution_device="cpu", offload_buffers=True))
    assert_same(model, inputs, logits, disk_offload(copies[1], tmp_path, execution_device="cpu", offload_buffers=True))


# ---------------------------------------------------------------------------------------------------------------------
# Quantised captioners


def bitsandbytes_8_bit():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*NOT_QUANTISED, "lm_head"])


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=NOT_QUANTISED)


@pytest.mark.parametrize("method", [bitsandbytes_8_bit, torchao_int8])
def test_8_bit_but_for_the_ear(saved, method, tmp_path):
    model, folder, inputs, logits = saved
    quantised = DaliForConditionalGeneration.from_pretrained(folder, quantization_config=method(), device_map="cpu")
    for name, module in quantised.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            is_plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
            assert is_plain == name.startswith(tuple(NOT_QUANTISED)), name
    features = inputs["input_features"]
    with torch.no_grad():
        heard = quantised.get_audio_features(features).pooler_output
        assert torch.equal(heard, model.get_audio_features(features).pooler_output)
        got = quantised(**inputs).logits
        real = inputs["attention_mask"].bool()
        assert torch.nn.functional.cosine_similarity(got[real].float(), logits[real], dim=-1).min() > 0.95
        quantised.save_pretrained(tmp_path / "quantised")
        loaded = DaliForConditionalGeneration.from_pretrained(tmp_path / "quantised", device_map="cpu")
        assert torch.equal(loaded(**inputs).logits, got)
    assert quantised.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


# ---------------------------------------------------------------------------------------------------------------------
# trl


def test_sft_on_the_assistants_words_alone(tmp_path):
    """trl's own collator reads pictures from its column and sounds from the messages."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = []
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", sound(i), 16_000)
        audio = {"type": "audio", "audio": str(tmp_path / f"{i}.wav")}
        question = [{"type": "image"}, audio, {"type": "text", "text": "What can be heard ?"}]
        answer = [{"type": "text", "text": ["a dog barks .", "rain falls ."][i]}]
        rows.append(
            {
                "images": [picture(i)],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )
    model, processor = tiny_dali()
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            assistant_only_loss=True,
            max_length=None,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == batch["input_features"].shape[0] == 2
    answers = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert sorted(answers) == ["a dog barks . </s>", "rain falls . </s>"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
