"""Prompts: LLaVA's v1 conversation to the letter and to the token, and a captioner's own template where it has one."""

import io
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from modeling_dali import DaliProcessor
from modeling_dali.chat_templates import SYSTEM, hearing_template, llava_v1_template
from modeling_dali.convert_original import load_tokenizer
from tests.tiny import tiny_dali, tiny_tokenizer

QUESTION = "Describe the sound that can be heard in this scene."
MEDIA = ("<image>", "<audio>", "<prefix>")

# Templates as captioners on the Hub have them: pictures before texts, ChatML with typed items, and strings only.
PICTURES_FIRST = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRINGS_ONLY = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = {CHATML: "<|im_end|>\n<|im_start|>assistant\n", STRINGS_ONLY: "<|im_end|>\n<|im_start|>assistant\n"}


def processor_with(template, prefix=3):
    model, processor = tiny_dali(prefix=prefix)
    return DaliProcessor.for_model(
        model.config, processor.image_processor, processor.tokenizer, processor.feature_extractor, template
    )


def llava_v1(*turns):
    """LLaVA's v1 conversation by its rule: a sentence, then turns, a space behind questions, `</s>` behind answers."""
    text = f"{SYSTEM} "
    for number, turn in enumerate(turns):
        text += f"ASSISTANT: {turn}</s>" if number % 2 else f"USER: {turn} "
    return text if len(turns) % 2 == 0 else f"{text}ASSISTANT:"


def test_llava_v1_to_the_letter():
    _, processor = tiny_dali(prefix=3)
    assert processor.caption_prompt("audio_image") == llava_v1(f"<image><audio><prefix>\n{QUESTION}")
    turns = ["<image>\nWhat is it ?", "a dog", "What does it do ?", "it barks", "Where ?"]
    conversation = [
        {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": turn}]}
        for number, turn in enumerate(turns)
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == llava_v1(*turns)
    assert processor.apply_chat_template(conversation[:4]) == llava_v1(*turns[:4])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PICTURES_FIRST, "USER: <image>\n<audio><prefix>\n{} ASSISTANT:"),
        (CHATML, "<|im_start|>user\n<image><audio><prefix>\n{}<|im_end|>\n<|im_start|>assistant\n"),
        (STRINGS_ONLY, "<|im_start|>user\n<image><audio><prefix>\n{}<|im_end|>\n<|im_start|>assistant\n"),
    ],
    ids=["pictures_first", "chatml", "strings_only"],
)
def test_a_captioners_own_template_is_used(template, expected, tmp_path):
    processor = processor_with(template)
    assert processor.caption_prompt("audio_image") == expected.format(QUESTION)
    assert processor.caption_prompt("image", prefix=False).count("<audio>") == 0
    processor.save_pretrained(tmp_path)
    assert DaliProcessor.from_pretrained(tmp_path).caption_prompt("audio") == processor.caption_prompt("audio")


def test_a_templates_own_begin_of_text_is_not_doubled():
    processor = processor_with(STRINGS_ONLY)
    ids = processor(text=processor.caption_prompt("audio", prefix=False).replace("<audio>", ""))["input_ids"][0]
    assert ids[0] == processor.tokenizer.bos_token_id and ids.count(processor.tokenizer.bos_token_id) == 1


def test_sound_keeps_its_place_among_other_items():
    processor = processor_with(CHATML)
    items = [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "What ?"}, {"type": "audio"}]
    conversation = [{"role": "system", "content": "Listen."}, {"role": "user", "content": items}]
    expected = "<|im_start|>system\nListen.<|im_end|>\n<|im_start|>user\n<audio><image>What ?<audio><|im_end|>\n"
    assert processor.apply_chat_template(conversation) == expected
    assert items[2] == {"type": "text", "text": "What ?"}  # the caller's conversation stays as it was


@pytest.mark.parametrize("template", ["{{ messages[0]['role'] }}", "{{ undefined.attribute }}", "{% for %}"])
def test_templates_that_cannot_show_media_are_refused(template):
    with pytest.raises(ValueError, match="chat template cannot be used"):
        hearing_template(template, "<image>", tiny_tokenizer().special_tokens_map)


def test_a_template_that_hears_stays_as_it_is():
    template = llava_v1_template()
    assert hearing_template(template, "<image>", {"eos_token": "</s>"}) == template


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A sentencepiece model of Llama's kind, and the files that make transformers take it for Llama's."""
    folder = tmp_path_factory.mktemp("llama")
    lines = [SYSTEM, QUESTION, "USER: ASSISTANT: a dog barks in the distance while rain falls on a tin roof"] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_converted_model_reads_the_tokens_that_the_authors_read(llama_folder, tmp_path):
    """LLaVA's own code tokenises the pieces between media by themselves, each with sentencepiece."""
    tokenizer = load_tokenizer(llama_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MEDIA)})
    tokenizer.save_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    before, behind = llava_v1(f"<image>\n{QUESTION}").split("<image>")
    media = tokenizer.convert_tokens_to_ids(list(MEDIA))
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = loaded(before + "".join(MEDIA) + behind)["input_ids"]
        assert ids == [loaded.bos_token_id, *pieces.encode(before), *media, *pieces.encode(behind)]
        answered = loaded(behind + " a dog barks</s>", add_special_tokens=False)["input_ids"]
        assert answered == [*pieces.encode(behind + " a dog barks"), loaded.eos_token_id]
