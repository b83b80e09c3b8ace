"""Captioners of every class hear: what they say of pictures and text stays theirs, and batches equal their rows."""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, DynamicCache

from modeling_dali import DaliForImageTextToText
from tests.tiny import tiny_audio_config
from tests.tiny_captioners import AUDIO, CLASSES, IMAGE, PREFIX, TinyCaptioner, noise, tiny_captioner

CLIP = 32  # audio tokens
QUESTION = [9, 10, 11]
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def with_ear(captioner, prefix: int = 0, **kwargs) -> DaliForImageTextToText:
    torch.manual_seed(1)
    indices = {"audio_token_index": AUDIO, "prefix_token_index": PREFIX}
    model = DaliForImageTextToText.from_captioner(captioner, audio_config=tiny_audio_config(), **indices, **kwargs)
    if prefix:
        model.set_prefix(noise(5, prefix, 32))
    return model


def sound(seed: int) -> torch.Tensor:
    return noise(100 + seed, 1, 64, 32)


def row(captioner: TinyCaptioner, *parts: tuple[str, int] | int) -> tuple[list[int], list, list]:
    """Ids of a prompt, and its pictures and sounds; a part is an id, `("image", seed)` or `("audio", seed)`."""
    ids, pictures, sounds = [1], [], []
    for part in parts:
        match part:
            case ("image", seed):
                ids += captioner.block
                pictures.append(captioner.pixels(seed))
            case ("audio", seed):
                ids += [AUDIO] * CLIP
                sounds.append(sound(seed))
            case _:
                ids.append(part)
    return [*ids, *QUESTION], pictures, sounds


def batch(captioner: TinyCaptioner, *rows) -> dict[str, torch.Tensor]:
    """Rows, padded on the left."""
    length = max(len(ids) for ids, *_ in rows)
    ids = torch.tensor([[3] * (length - len(ids)) + ids for ids, *_ in rows])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, *_ in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if captioner.has_token_types:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    pictures = [picture for _, pictures, _ in rows for picture in pictures]
    sounds = [sound for *_, sounds in rows for sound in sounds]
    if pictures:
        inputs |= {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    return inputs | ({"input_features": torch.cat(sounds)} if sounds else {})


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_and_text_are_the_captioners_own(name):
    captioner = tiny_captioner(name)
    stock = copy.deepcopy(captioner.model)
    model = with_ear(captioner.model)
    for inputs in (
        batch(captioner, row(captioner, 7, ("image", 0), 8), row(captioner, ("image", 1))),
        batch(captioner, row(captioner, 7, 8, 12), row(captioner, 13)),
    ):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("name", CLASSES)
def test_a_padded_batch_equals_its_rows(name):
    captioner = tiny_captioner(name)
    model = with_ear(captioner.model, prefix=2)
    rows = [
        row(captioner, 7, ("image", 0), ("audio", 0), PREFIX, PREFIX),
        row(captioner, ("image", 1), 8),
        row(captioner, ("audio", 1), 12, ("audio", 2), 13, 14, 15),
        row(captioner, 7, 8),
    ]
    together = batch(captioner, *rows)
    ways = [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
    said = [model.generate(**together, **GREEDY, **way)[:, together["input_ids"].shape[1] :] for way in ways]
    with torch.no_grad():
        logits = model(**together).logits
        for i, one in enumerate(rows):
            alone = batch(captioner, one)
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[i, -length:], model(**alone).logits[0], atol=1e-5, rtol=1e-5)
            for texts, way in zip(said, ways, strict=True):
                text = model.generate(**alone, **GREEDY, **way)[:, length:]
                several = way.get("num_return_sequences", 1)
                expected = texts[i * several : (i + 1) * several, : text.shape[1]]
                assert torch.equal(text, expected), way


@pytest.mark.parametrize("name", CLASSES)
def test_a_second_turn_on_the_cache(name):
    captioner = tiny_captioner(name)
    model = with_ear(captioner.model)
    first = row(captioner, ("image", 0), ("audio", 0))
    both = row(captioner, ("image", 0), ("audio", 0), *QUESTION, 20, 21, ("audio", 1))
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**batch(captioner, first), past_key_values=cache, use_cache=True)
    whole = batch(captioner, both)
    expected = model.generate(**whole, **GREEDY)
    read = {name: value for name, value in whole.items() if name not in captioner.pixels(0)}
    assert torch.equal(model.generate(**read, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_training_reaches_the_ear_alone(name):
    captioner = tiny_captioner(name)
    model = with_ear(captioner.model.requires_grad_(False), prefix=2).train()
    model.gradient_checkpointing_enable()
    before = copy.deepcopy(model.captioner.state_dict())
    inputs = batch(captioner, row(captioner, ("image", 0), ("audio", 0), PREFIX, PREFIX), row(captioner, ("audio", 1)))
    if name in ("gemma3", "paligemma"):  # they ask for it in training
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    optimizer = torch.optim.SGD(model.ear.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.ear.parameters())
        assert model.ear.prefix.grad.abs().sum() > 0 and model.ear.audio_projection.weight.grad.abs().sum() > 0
        optimizer.step()
    assert losses[0] != losses[1]
    assert all(torch.equal(before[key], value) for key, value in model.captioner.state_dict().items())


@pytest.mark.parametrize("name", CLASSES)
def test_whole_or_as_an_ear_it_loads_again(name, tmp_path):
    captioner = tiny_captioner(name)
    captioner.model.save_pretrained(tmp_path / "stock")
    model = with_ear(tmp_path / "stock", prefix=2, attn_implementation="eager").eval()
    model.set_attn_implementation("eager")
    inputs = batch(captioner, row(captioner, ("image", 0), ("audio", 0), PREFIX, PREFIX), row(captioner, ("audio", 1)))
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "whole")
        model.save_ear(tmp_path / "ear")
        for loaded in (
            AutoModel.from_pretrained(tmp_path / "whole", attn_implementation="eager"),
            AutoModel.from_pretrained(tmp_path / "ear", attn_implementation="eager"),
            DaliForImageTextToText.from_captioner(captioner.model, ear=tmp_path / "ear").eval(),
        ):
            assert isinstance(loaded, DaliForImageTextToText)
            loaded.set_attn_implementation("eager")
            assert torch.equal(loaded(**inputs).logits, expected)
    assert not list((tmp_path / "ear").glob("model*.safetensors"))


@pytest.mark.parametrize("name", CLASSES)
def test_image_tokens_are_what_projector_or_language_model_reads(name):
    captioner = tiny_captioner(name)
    model = with_ear(captioner.model)
    pictures = [captioner.pixels(0), captioner.pixels(1)]
    inputs = {key: torch.cat([picture[key] for picture in pictures]) for key in pictures[0]}
    with torch.no_grad():
        tokens = model.get_image_tokens(**inputs)
        for picture, expected in zip(pictures, tokens, strict=True):
            torch.testing.assert_close(model.get_image_tokens(**picture)[0], expected)
        assert tokens.shape[0] == 2 and tokens.shape[2] == model.get_audio_tokens(sound(0)).shape[2]
        read = model.captioner.get_image_features(**inputs, return_dict=True).pooler_output
        if model.config.alignment_target == "projector_output":
            assert torch.equal(tokens, torch.stack(list(read)))
        elif name not in ("llava_next", "llava_onevision"):  # which place tiles and line ends
            projected = DaliForImageTextToText.from_captioner(
                captioner.model, audio_config=tiny_audio_config(), audio_token_index=AUDIO, prefix_token_index=PREFIX
            ).ear.audio_projector(tokens)
            torch.testing.assert_close(projected, torch.stack(list(read)))


def test_the_table_in_the_documentation():
    page = Path(__file__).resolve().parents[2] / "docs" / "captioners.md"
    targets = {"before": "projector_input", "behind": "projector_output"}
    told = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in targets:
            told |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), targets[cells[1]])
    assert told == {name: with_ear(tiny_captioner(name).model).config.alignment_target for name in CLASSES}
