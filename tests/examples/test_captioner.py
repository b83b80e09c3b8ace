"""The small captioner: tokenizer, batches, what its losses teach, what is saved."""

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from datasets_scripts.sounding_world import HEARD_QUESTIONS, sounding_world, vocabulary
from examples.sounding_world.captioner import (
    CaptionerCollator,
    CaptionerConfig,
    CaptionerModel,
    CaptionerTrainer,
    answers_of,
    new_captioner,
    texts_of,
    word_tokenizer,
)
from modeling_dali.processing_audio import IGNORED, QUESTION
from tests.trainers.stages import moved, settings, state
from trainers.recipes import load_model

SIZES = {"image_size": 32, "hidden_size": 32, "vision_layers": 1, "text_layers": 1, "seed": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sounding_world("captions", 16, image_size=32, cache_dir=tmp_path_factory.mktemp("world"))


@pytest.fixture
def captioner(rows, tmp_path):
    config = CaptionerConfig(**settings(tmp_path / "out"), **SIZES, max_steps=4, per_device_train_batch_size=8)
    return config, *new_captioner(config, texts_of(rows))


def test_tokenizer_knows_words_of_prompts_and_captions_and_takes_punctuation_off():
    tokenizer = word_tokenizer(vocabulary())
    for text in ("A bell rings, and the wind howls.", f"USER: {QUESTION} ASSISTANT:", *HEARD_QUESTIONS):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer("A Bell rings.")["input_ids"], skip_special_tokens=True) == "a bell rings"
    assert tokenizer.convert_tokens_to_ids("<image>") != tokenizer.convert_tokens_to_ids("image")
    assert tokenizer("violins")["input_ids"][1] == tokenizer.unk_token_id


def test_batches_are_what_the_processor_would_make(captioner, rows):
    _, model, processor = captioner
    batch = CaptionerCollator(processor, model.config.image_seq_length, 3.0, 0, answers_of(rows))([rows[0], rows[1]])
    for index, row in enumerate((rows[0], rows[1])):
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[f"{prompt} {row['captions'][0]}"], images=[row["image"]], return_tensors="pt")
        kept = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][kept].tolist() == [*inputs["input_ids"][0].tolist(), 2]  # 2 ends the text
        torch.testing.assert_close(batch["pixel_values"][index], inputs["pixel_values"][0])
        answer = batch["labels"][index][batch["labels"][index] != IGNORED]
        assert processor.tokenizer.decode(answer[:-1]) == row["captions"][0] and answer[-1] == 2
        words, absent = (
            set(processor.tokenizer.convert_ids_to_tokens((batch["words"][index] == value).nonzero()[:, 0].tolist()))
            for value in (1, 0)
        )
        assert words == {word for caption in row["captions"] for word in caption.split()}
        answers = [caption for other in rows if other["question"] == row["question"] for caption in other["captions"]]
        assert words | absent == {word for caption in answers for word in caption.split()} and not words & absent


def test_training_rows_draw_their_captions_from_seed_and_epoch(captioner, rows):
    _, model, processor = captioner
    collator = CaptionerCollator(processor, model.config.image_seq_length, 3.0, 0, answers_of(rows))

    def draw(epoch):
        labels = collator([{**rows[0], "epoch": epoch}])["labels"][0]
        return tuple(labels[labels != IGNORED].tolist())

    drawn = [draw(epoch) for epoch in range(12)]
    assert drawn == [draw(epoch) for epoch in range(12)] and 1 < len(set(drawn)) <= 5


def test_noise_is_for_training_only_and_words_reach_the_tower(captioner, rows):
    _, model, processor = captioner
    batch = CaptionerCollator(processor, model.config.image_seq_length, 3.0, 0, answers_of(rows))(
        [rows[i] for i in range(4)]
    )
    noisy, plain = CaptionerModel(model, 10.0, 0.7), CaptionerModel(model, 0.0, 0.0)
    noisy.eval()
    assert noisy(**batch)["loss"] == noisy(**batch)["loss"]
    noisy.train()
    assert noisy(**batch)["loss"] != noisy(**batch)["loss"]
    # A loss on words alone moves the tower, whatever the caption loss would do.
    only_words = noisy(**batch)["loss"] - plain(**batch)["loss"]
    only_words.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_words_that_never_answer_a_question_do_not_count(captioner, rows):
    _, model, processor = captioner
    collator = CaptionerCollator(processor, model.config.image_seq_length, 3.0, 0, answers_of(rows))
    batch = collator([next(row for row in rows if row["question"] in HEARD_QUESTIONS)])
    wrapper = CaptionerModel(model, 10.0, 0.0).eval()
    wrapper(**batch)["loss"].backward()
    silent, absent = processor.tokenizer.convert_tokens_to_ids(["house", "bell"])
    assert batch["words"][0, silent].isnan() and not batch["words"][0, absent].isnan()
    moves = wrapper.words.bias.grad != 0
    assert not moves[silent] and moves[absent] and torch.equal(moves, ~batch["words"][0].isnan())


def test_the_language_model_meets_up_to_three_times_the_tokens(captioner, rows):
    _, model, processor = captioner
    collator = CaptionerCollator(processor, 16, 3.0, 0, answers_of(rows))
    wrapper = CaptionerModel(model, 10.0, 0.0).train()
    seen = []
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    counts = []
    for epoch in range(30):
        batch = collator([{**rows[i], "epoch": epoch} for i in range(2)])
        counts.append(int((batch["input_ids"][0] == model.config.image_token_index).sum()))
        if epoch < 6:
            wrapper(**batch)
            assert seen[-1].shape[1] == counts[-1]
            # Each picture's own tokens, each at least once.
            plain = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
            distances = torch.cdist(plain, seen[-1])
            assert distances.amin(2).max() < 1e-2 and distances.amin(1).max() < 1e-2
    assert min(counts) == 16 and 32 < max(counts) <= 48 and 8 < counts.count(16) < 22


def test_trains_everything_and_saves_a_llava(captioner, rows, tmp_path):
    config, model, processor = captioner
    before = state(model)
    CaptionerTrainer(model, config, processor, rows).run()
    assert "lm_head.weight" in moved(model, before) and len(moved(model, before)) > 0.8 * len(before)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    _, hearing = load_model(str(tmp_path / "out"))
    prompts = [hearing.caption_prompt(modality, "What ?", prefix=True) for modality in ("image", "audio_image")]
    assert prompts == [f"USER: <image>{sound}<prefix>\nWhat ? ASSISTANT:" for sound in ("", "<audio>")]
    text = "USER: <image>\nDescribe the image. ASSISTANT:"
    inputs = [p(text=[text], images=[rows[0]["image"]], return_tensors="pt") for p in (processor, again)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    assert torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
