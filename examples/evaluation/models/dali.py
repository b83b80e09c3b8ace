"""DALI as a model of lmms-eval, which this project does not depend on."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

# What lmms-eval may set that `generate` takes; the rest of a task's settings is for other models.
GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


@register_model("dali")
class Dali(lmms):
    """
    A DALI model that answers questions about sounds, pictures or both.

    Args:
        pretrained (`str`): Folder or Hub id of the model.
        device (`str`, *optional*): A GPU if there is one by default.
        batch_size (`int`): Questions that are answered together.
    """

    def __init__(self, pretrained: str, device: str | None = None, batch_size: int | str = 1):
        super().__init__()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForMultimodalLM.from_pretrained(pretrained, dtype="auto", trust_remote_code=True)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests."""
        answers = []
        for batch in tqdm(list(self.batches(requests)), desc="Answering", disable=self.rank != 0):
            settings = batch[0].args[1]
            inputs = self.prepare([self.conversation(*request.args) for request in batch])
            generate = {name: settings[name] for name in GENERATION if settings.get(name) is not None}
            if "temperature" in generate:
                generate["do_sample"] = generate["temperature"] > 0
                if not generate["do_sample"]:
                    del generate["temperature"]
            captions = self.processor.decode_captions(self.model.generate(**inputs, **generate), inputs)
            answers += [cut(caption, settings.get("until", ())) for caption in captions]
        return answers

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its answer, and whether it is the one that greedy decoding gives."""
        results = []
        for request in tqdm(requests, desc="Scoring", disable=self.rank != 0):
            _, target, _, doc_id, task, split = request.args
            answer = target(self.task_dict[task][split][doc_id]) if callable(target) else target
            inputs = self.prepare([self.conversation(*request.args)], suffix=[answer])
            labels = inputs.pop("labels")[:, 1:]
            scores = self.model(**inputs).logits[:, :-1].float().log_softmax(-1)
            kept = labels != -100
            likelihood = scores[kept].gather(-1, labels[kept][:, None]).sum().item()
            results.append((likelihood, bool((scores.argmax(-1) == labels)[kept].all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not to be had: DALI was trained on single questions."""
        raise NotImplementedError("DALI answers single questions; choose tasks of one round.")

    def batches(self, requests: list[Instance]) -> Iterator[Sequence[Instance]]:
        """Neighbouring requests with the same settings, `batch_size` at a time."""
        for _, group in groupby(requests, key=lambda request: request.args[1]):
            same = list(group)
            yield from (same[start : start + self.batch_size] for start in range(0, len(same), self.batch_size))

    def conversation(
        self, question: str, _: Any, doc_to_visual: Callable, doc_id: Any, task: str, split: str
    ) -> list[dict]:
        """One question with its sounds and pictures, as a chat."""
        content = []
        for medium in doc_to_visual(self.task_dict[task][split][doc_id]):
            kind = "image" if isinstance(medium, Image.Image) else "audio"
            content.append({"type": kind, kind: medium})
        content.sort(key=lambda item: item["type"], reverse=True)  # pictures first, as in training
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def prepare(self, conversations: list[list[dict]], **kwargs: Any):
        """What the model takes."""
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=kwargs,
        ).to(self.device)


def cut(text: str, stops: str | Sequence[str]) -> str:
    """A text up to the first of its stops."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.partition(stop)[0]
    return text.strip()
