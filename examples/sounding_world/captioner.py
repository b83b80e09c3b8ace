"""A small LLaVA or Gemma 3 from nothing, for worlds as small as the sounding one, where no pretrained one can be had.

    python -m examples.sounding_world.captioner examples/sounding_world/recipes/captioner.yaml [--field value ...]

CLIP's image tower, LLaVA's projector and a Llama, all from random weights, train together on pictures with a
question and captions that answer it. Questions for what is seen and for what would be heard must both occur: sixteen
soft tokens can choose a style later, but not teach one.

Caption loss alone sticks on a plateau: the model learns the wording first, and the tower gets no gradient that tells
one thing from another. So each image token also names words by itself, and the strongest names of a picture are held
against the words of its captions. Only words that answer the same question elsewhere count: that no tree is heard does
not say that there is none.

Two things prepare the language model for audio tokens, which are more than those of a picture, in another order, and
never quite the same: half of the batches repeat their image tokens, shuffled, up to `most_tokens` times; and there is
noise on them, which also leaves the tower little room for what no caption tells, such as the colour of the sky. Where
the captioner reads pictures in a way of its own (Gemma 3 attends to all of one at once), repeated tokens stand in the
place of `<audio>` placeholders, where it reads as it will read sound.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.hf_argparser import HfArg
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from modeling_dali.ear_dali import fill_placeholders
from modeling_dali.processing_audio import IGNORED, QUESTION
from modeling_dali.processing_dali_captioner import image_placeholder
from trainers.recipes import load_rows
from trainers.rows import SkippedSamples, UnreadableSampleError, pick, read_image, sample_rng
from trainers.stage import StageArguments, StageTrainer, run_stage

GEMMA_SPECIALS = {"boi_token": "<boi>", "eoi_token": "<eoi>"}  # around the tokens of a picture
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<audio>", "<prefix>")
PROMPT = "USER: <image>\n{} ASSISTANT:"  # as the chat template renders it

# LLaVA's v1 conversation without its system sentence, whose words this world does not know.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}"
    "{% if not loop.first and loop.previtem['type'] != 'text' %}{{ '\n' }}{% endif %}{{ item['text'] }}"
    "{% else %}<{{ item['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
RARE = -4.0  # logit of a word before training: most words are in few pictures


@dataclass
class CaptionerConfig(StageArguments):
    """Settings of the captioner. The data set has `image`, `question` and `captions`."""

    # Model
    captioner: Literal["llava", "gemma3"] = HfArg(default="llava", help="Class of the captioner.")
    image_size: int = HfArg(default=48, help="Side of the pictures in pixels.")
    patch_size: int = HfArg(default=8, help="Side of the patches in pixels; divides image_size.")
    hidden_size: int = HfArg(default=128, help="Width of the image tower and the language model.")
    vision_layers: int = HfArg(default=3, help="Blocks of the image tower.")
    text_layers: int = HfArg(default=2, help="Blocks of the language model.")
    num_heads: int = HfArg(default=4, help="Attention heads of the two.")

    # Optimisation
    words_weight: float = HfArg(default=10.0, help="Weight of the loss by which image tokens learn to name words.")
    token_noise: float = HfArg(default=0.7, help="Noise on the image tokens, in standard deviations of theirs.")
    most_tokens: float = HfArg(
        default=2.8, help="How many times the tokens of a picture the language model must be able to read."
    )
    learning_rate: float = 2.5e-3
    max_steps: int = 800
    per_device_train_batch_size: int = 64
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    weight_decay: float = 0.01
    save_steps: float = 200
    save_total_limit: int | None = 2


def word_tokenizer(texts: Iterable[str], specials: Mapping[str, str] = {}) -> PreTrainedTokenizerFast:
    """
    A tokenizer of whole words in lower case, without punctuation.

    Args:
        texts: Whatever the captioner shall read and write.
        specials: Further special tokens, by their names.
    """
    words = {word for text in (*texts, PROMPT, QUESTION) for word in re.findall(r"\w+", text.lower())}
    vocabulary = {
        word: index
        for index, word in enumerate([*SPECIALS, *specials.values(), *sorted(words - {"image", "audio", "prefix"})])
    }
    for word in ("image", "audio", "prefix"):  # also the names of placeholders
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image>",
            "audio_token": "<audio>",
            "prefix_token": "<prefix>",
            **specials,
        },
    )


def new_captioner(config: CaptionerConfig, texts: Iterable[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    An untrained captioner and its processor.

    Args:
        config: Class and sizes.
        texts: Questions and captions, for the vocabulary.
    """
    return new_llava(config, texts) if config.captioner == "llava" else new_gemma3(config, texts)


def new_gemma3(
    config: CaptionerConfig, texts: Iterable[str]
) -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """An untrained Gemma 3 with SigLIP's image tower, and its processor."""
    tokenizer = word_tokenizer(texts, GEMMA_SPECIALS)
    width, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2
    sizes: dict[str, Any] = {"hidden_size": width, "num_attention_heads": config.num_heads}
    sizes["initializer_range"] = width**-0.5  # as in `new_llava`
    vision = SiglipVisionConfig(
        **sizes,
        intermediate_size=4 * width,
        num_hidden_layers=config.vision_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text = Gemma3TextConfig(
        **sizes,
        intermediate_size=8 * width // 3,
        num_hidden_layers=config.text_layers,
        num_key_value_heads=config.num_heads,
        head_dim=width // config.num_heads,
        query_pre_attn_scalar=width // config.num_heads,
        sliding_window=512,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    boi, eoi, image = tokenizer.convert_tokens_to_ids([*GEMMA_SPECIALS.values(), "<image>"])
    torch.manual_seed(config.seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=vision,
            text_config=text,
            mm_tokens_per_image=tokens,
            boi_token_index=boi,
            eoi_token_index=eoi,
            image_token_index=image,
        )
    )
    with torch.no_grad():  # the library starts it at zero, from which no picture would be seen for long
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=width**-0.5)
    set_generation(model, tokenizer)
    image_processor = Gemma3ImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    template = CHAT_TEMPLATE.replace(
        "{% else %}<{{ item['type'] }}>", "{% elif item['type'] == 'image' %}<boi>{% else %}<{{ item['type'] }}>"
    )
    return model, Gemma3Processor(image_processor, tokenizer, image_seq_length=tokens, chat_template=template)


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tells a captioner where its captions end."""
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
    )


def new_llava(config: CaptionerConfig, texts: Iterable[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained LLaVA with CLIP's image tower, and its processor."""
    tokenizer = word_tokenizer(texts)
    width = config.hidden_size
    sizes: dict[str, float] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": config.num_heads,
    }
    sizes["initializer_range"] = width**-0.5  # the usual 0.02 is for wide models: narrow ones would hardly move
    vision = CLIPVisionConfig(
        **sizes, num_hidden_layers=config.vision_layers, image_size=config.image_size, patch_size=config.patch_size
    )
    text = LlamaConfig(
        **sizes | {"intermediate_size": 8 * width // 3},  # three matrices in place of two
        num_hidden_layers=config.text_layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(config.seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            image_seq_length=(config.image_size // config.patch_size) ** 2,
            vision_feature_layer=-1,  # no layer is to spare
        )
    )
    set_generation(model, tokenizer)
    side = {"height": config.image_size, "width": config.image_size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, do_center_crop=False),
        tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


class CaptionerCollator:
    """
    Pictures, prompts and, as labels, one of the captions of each.

    Args:
        processor: The captioner's.
        image_tokens: Tokens per picture.
        most_tokens: Half of the training batches have up to so many times as many placeholders.
        seed: Seed of the choice of captions and of how many placeholders there are.
        answers: All captions by the question that they answer.
    """

    columns = [("image",), ("question",), ("captions",)]

    def __init__(
        self,
        processor: LlavaProcessor,
        image_tokens: int,
        most_tokens: float,
        seed: int,
        answers: Mapping[str, Iterable[str]],
    ):
        self.processor, self.image_tokens, self.seed = processor, image_tokens, seed
        tokenizer = processor.tokenizer
        image, audio = tokenizer.convert_tokens_to_ids(["<image>", "<audio>"])
        self.is_llava = image_placeholder(processor) == "<image>"
        around = [] if self.is_llava else tokenizer.convert_tokens_to_ids(list(GEMMA_SPECIALS.values()))
        self.picture = [*around[:1], *[image] * image_tokens, *around[1:]]
        self.repeated = image if self.is_llava else audio
        self.most_tokens = most_tokens
        self.skips = SkippedSamples(0.0)  # a world that is made on the spot has no damaged pictures
        self.word_ids: dict[str, list[int]] = {}
        self.answer_ids = {
            question: sorted({token for caption in captions for token in self.ids(caption)})
            for question, captions in answers.items()
        }

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; each is looked up once."""
        if text not in self.word_ids:
            self.word_ids[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.word_ids[text]

    def count_placeholders(self, row: dict) -> int:
        """Placeholders per picture in the batch that begins with a row."""
        rng = sample_rng(self.seed, row)
        if rng is None or rng.random() < 0.5:
            return self.image_tokens
        return int(rng.integers(self.image_tokens, int(self.most_tokens * self.image_tokens) + 1))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask`, `labels` [B, length]; `pixel_values` [B, 3, height, width]; `words`
            [B, vocabulary], 1 for words of any caption of the picture, 0 for other words that answer its question, NaN
            for words that never do.
        """
        tokenizer = self.processor.tokenizer
        pictures, prompts, answers = [], [], []
        words = torch.full((len(rows), len(tokenizer)), torch.nan)
        count = self.count_placeholders(rows[0])
        image = self.picture if count == self.image_tokens else [self.repeated] * count
        for index, row in enumerate(rows):
            if not row["captions"]:
                raise UnreadableSampleError(f"The picture {row.get('id', index)} has no caption.")
            pictures.append(read_image(row["image"]))
            before, after = PROMPT.format(row["question"]).split("<image>")
            prompts.append([tokenizer.bos_token_id, *self.ids(before), *image, *self.ids(after)])
            caption = pick(row["captions"], sample_rng(self.seed, row), 0)
            answers.append([*self.ids(caption), tokenizer.eos_token_id])
            words[index, self.answer_ids[row["question"]]] = 0
            words[index, [token for caption in row["captions"] for token in self.ids(caption)]] = 1
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORED)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[index, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            labels[index, length - len(answer) :] = torch.tensor(answer)
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        mask = (ids != tokenizer.pad_token_id).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels, "words": words}
        if not self.is_llava:
            batch["token_type_ids"] = (ids == self.picture[1]).long()
        return batch


class CaptionerModel(nn.Module):
    """
    A captioner, and a layer by which its image tokens name words; the layer is needed in training only.

    Args:
        llava: The captioner: a LLaVA, whose image tokens are disturbed before the projector, or another, behind it.
        words_weight: Weight of the words' loss.
        token_noise: Noise on the image tokens in training, in standard deviations of theirs.
    """

    def __init__(self, llava: PreTrainedModel, words_weight: float, token_noise: float):
        super().__init__()
        self.llava, self.words_weight, self.token_noise = llava, words_weight, token_noise
        self._no_split_modules = llava._no_split_modules  # for sharded training
        self.words = nn.Linear(llava.config.text_config.hidden_size, llava.config.text_config.vocab_size)
        nn.init.constant_(self.words.bias, RARE)
        self.audio_token = SPECIALS.index("<audio>")

    def forward(self, words: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
        """`loss`: caption loss and, by its weight, that of the words [B, vocabulary]."""
        count = int((inputs["input_ids"][0] == self.llava.config.image_token_index).sum())
        model, pixels = self.llava.model, inputs.pop("pixel_values")
        if isinstance(self.llava, LlavaForConditionalGeneration):
            features = model.vision_tower(pixels, return_dict=True)
            patches = features.last_hidden_state[:, 1:]  # what LLaVA takes: the last layer without its class token
            image = model.multi_modal_projector(self.disturb(patches, count))  # [B, tokens, width]
            features.pooler_output = list(image)
        else:
            features = self.llava.get_image_features(pixels, return_dict=True)
            image = features.pooler_output = self.disturb(features.pooler_output, count or self.count_slots(inputs))
        if count:
            outputs = self.llava(**inputs, mm_encoder_outputs={"image": features})
        else:
            outputs = self.read_as_sound(image, **inputs)
        names = self.words(image)  # [B, tokens, vocabulary]
        strongest = names.logsumexp(1) - torch.tensor(image.shape[1]).log()
        told = ~words.isnan()
        named = nn.functional.binary_cross_entropy_with_logits(strongest[told], words[told], reduction="sum")
        named = named / words.numel()
        return {"loss": outputs.loss + self.words_weight * named}

    def count_slots(self, inputs: dict[str, torch.Tensor]) -> int:
        """Placeholders for sound in each row."""
        return int((inputs["input_ids"][0] == self.audio_token).sum())

    def read_as_sound(self, image: torch.Tensor, input_ids: torch.Tensor, **inputs) -> Any:
        """The captioner's outputs with image tokens [B, m, width] in the place of `<audio>` placeholders."""
        mask = input_ids == self.audio_token
        hook = self.llava.get_input_embeddings().register_forward_hook(
            lambda _, given, words: fill_placeholders("audio", image.flatten(0, 1), mask, words)
        )
        try:
            return self.llava(input_ids=input_ids, **inputs)
        finally:
            hook.remove()

    def disturb(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """In training: image tokens [B, m, width] as `count` of them, shuffled if that is not m, and with noise."""
        if not self.training:
            return tokens
        own = tokens.shape[1]
        if count != own:
            rounds = -(-count // own)
            order = torch.cat([torch.randperm(own, device=tokens.device) for _ in range(rounds)])
            tokens = tokens[:, order[:count]]
        return tokens + self.token_noise * tokens.detach().std() * torch.randn_like(tokens)


class CaptionerTrainer(StageTrainer):
    """
    Trains all of a captioner.

    Args:
        model: An untrained captioner.
        args: Settings.
        processor: Its processor.
        train_dataset: Rows with `image`, `question` and `captions`.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: CaptionerConfig,
        processor: ProcessorMixin,
        train_dataset,
        **kwargs,
    ):
        torch.manual_seed(args.seed)
        tokens = (args.image_size // args.patch_size) ** 2
        collator = CaptionerCollator(processor, tokens, args.most_tokens, args.seed, answers_of(train_dataset))
        wrapper = CaptionerModel(model, args.words_weight, args.token_noise)
        if args.ddp_find_unused_parameters is None:  # CLIP's last norm is behind the tokens that LLaVA takes
            args.ddp_find_unused_parameters = True
        super().__init__(wrapper, args, ["llava", "words"], processor, train_dataset, None, collator, **kwargs)
        self.model_accepts_loss_kwargs = False

    def save_result(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Writes the captioner and its processor."""
        if state_dict is not None:
            state_dict = {n.removeprefix("llava."): t for n, t in state_dict.items() if n.startswith("llava.")}
        self.accelerator.unwrap_model(self.model).llava.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)


def answers_of(rows) -> dict[str, set[str]]:
    """All captions of a data set by the question that they answer."""
    answers: dict[str, set[str]] = {}
    for question, captions in zip(rows["question"], rows["captions"], strict=True):
        answers.setdefault(question, set()).update(captions)
    return answers


def texts_of(rows) -> list[str]:
    """All questions and captions of a data set."""
    answers = answers_of(rows)
    return [*answers, *set().union(*answers.values())]


def new_trainer(config: CaptionerConfig) -> CaptionerTrainer:
    """The trainer, with model and data, that the settings describe."""
    rows = load_rows(config.dataset, config.train_split)
    model, processor = new_captioner(config, texts_of(rows))
    return CaptionerTrainer(model, config, processor, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(CaptionerConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
