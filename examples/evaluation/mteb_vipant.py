"""
VIP-ANT as an encoder of MTEB (and MAEB, its tasks of sound).

    python -m examples.evaluation.mteb_vipant DIR_OR_ID TASK...

MTEB is not a dependency of this project: `pip install mteb`. The encoder itself needs nothing of it.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor


class VipAntEncoder:
    """
    An encoder by MTEB's protocol.

    Args:
        model_name (`str`): Folder or Hub id of a VIP-ANT model.
        revision (`str`, *optional*): Of a model on the Hub.
        device (`str`, *optional*): Where the model runs; a GPU if there is one by default.
    """

    mteb_model_meta = None  # MTEB looks for it, and takes this class for no encoder without it

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **kwargs: Any):
        trust = {"revision": revision, "trust_remote_code": True}
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(model_name, **trust, **kwargs).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(model_name, **trust)

    @torch.inference_mode()
    def encode(self, inputs: Iterable[Mapping[str, list]], **kwargs: Any) -> np.ndarray:
        """
        Embeds batches.

        Args:
            inputs: Batches with lists under `"text"`, `"image"` or `"audio"`, or several of these, whose embeddings
                are then added. Sounds are `{"array", "sampling_rate"}`; long ones are heard whole.
            kwargs: What MTEB says about the task; every task is embedded alike.

        Returns:
            `np.ndarray`: `[samples, dim]`, float32, of unit length.
        """
        return torch.cat([self.encode_batch(batch) for batch in inputs]).float().cpu().numpy()

    def encode_batch(self, batch: Mapping[str, list]) -> torch.Tensor:
        """Embeddings `[samples, dim]` of one batch."""
        calls = {
            "text": (self.model.get_text_features, "text"),
            "image": (self.model.get_image_features, "images"),
            "audio": (self.model.get_audio_features, "audio"),
        }
        given = {name: list(batch[name]) for name in calls if name in batch}
        if not given:
            raise ValueError(f"The batch has {', '.join(batch)}, but no text, image or audio.")
        embeds = []
        for name, values in given.items():
            features, argument = calls[name]
            prepared = self.processor(**{argument: values}, return_tensors="pt").to(self.device)
            embeds.append(features(**prepared).pooler_output)
        return torch.nn.functional.normalize(torch.stack(embeds).sum(0), dim=-1)

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        """Cosine similarities `[samples, samples]`."""
        return as_matrix(one) @ as_matrix(other).T

    def similarity_pairwise(self, one: Any, other: Any) -> torch.Tensor:
        """Cosine similarities `[samples]` of pairs."""
        return (as_matrix(one) * as_matrix(other)).sum(-1)


def as_matrix(embeddings: Any) -> torch.Tensor:
    """Embeddings `[samples, dim]` or `[dim]` as rows of unit length."""
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings, dtype=torch.float32)), dim=-1)


def main(arguments: list[str]) -> None:
    """Runs MTEB's tasks on a model and prints their main scores."""
    import mteb

    model, *names = arguments
    for result in mteb.evaluate(VipAntEncoder(model), mteb.get_tasks(tasks=names)):
        print(result.task_name, result.get_score())


if __name__ == "__main__":
    main(sys.argv[1:])
