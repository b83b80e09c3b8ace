"""
Where in a picture the sound is, weights of the picture's tokens, and the plan that moves audio tokens onto them.

Where the sound is, an image token has more audio tokens near it than it would have if there were silence. Weights
alone do not tell: most audio tokens are at home on the background, as silence's are.

With the scorers of attentive optimal transport (`scorer.safetensors` beside the model) the weights are learned ones
and the plan is the optimal one between them. Without, each audio token goes to the image tokens it lies nearest to,
however many others do so too (optimal transport with only the audio side held to its marginal, and an entropic blur),
and an image token weighs what it gets.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ot
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import BatchFeature

BLUR = 0.05  # of the transport to nearest tokens, in mean costs
DARK, HOT = np.array([12, 16, 40]), np.array([255, 214, 60])  # colours of no weight and of the largest
PANEL = 384  # pixels a side


@dataclass(frozen=True)
class Explanation:
    """
    What went where between one sound and one picture.

    Attributes:
        where: [rows, columns] of the picture's tokens: log of what a token gets if every audio token goes to the image
            tokens nearest to it, over what it gets from silence; 0 where that is as much or more.
        image_weights: [rows, columns] of the picture's tokens, of sum 1.
        audio_weights: [rows (frequency, low first), columns (time)] of the sound's tokens, of sum 1; a single row
            where the audio encoder's tokens are no patches.
        plan: [audio tokens, image tokens], of sum 1.
        learned: Whether the weights come from learned scorers.
    """

    where: np.ndarray
    image_weights: np.ndarray
    audio_weights: np.ndarray
    plan: np.ndarray
    learned: bool


class Scorers:
    """
    The scorers of attentive optimal transport, as stage 1b saves them.

    Args:
        file: `scorer.safetensors`; its metadata may give `heads`, `temperature` and `uniform_mix`.

    Source: attentive optimal transport in *An Eye for an Ear* (arXiv 2410.05997).
    """

    def __init__(self, file: str | os.PathLike):
        with safe_open(file, "pt") as opened:
            settings = opened.metadata() or {}
            self.weights = {name.removeprefix("scorer."): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.heads = int(settings.get("heads", 8)) if "image_scorer.in_proj_weight" in self.weights else None
        self.temperature = float(settings.get("temperature", 20.0))
        self.uniform_mix = float(settings.get("uniform_mix", 0.5))

    def __call__(self, audio: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [n] and [m] of audio tokens [n, d] and image tokens [m, d]."""
        return self._weights("a", "i", "audio_scorer", audio, image), self._weights(
            "i", "a", "image_scorer", image, audio
        )

    def _weights(self, own: str, other: str, attention: str, tokens: torch.Tensor, others: torch.Tensor):
        w = self.weights
        query, key, value = (
            F.linear(given, w[f"{side}_{role}.weight"], w[f"{side}_{role}.bias"])
            for given, side, role in ((tokens, own, "q"), (others, other, "k"), (others, other, "v"))
        )
        if self.heads is not None:
            attended, _ = F.multi_head_attention_forward(
                query[:, None],
                key[:, None],
                value[:, None],
                tokens.shape[-1],
                self.heads,
                w[f"{attention}.in_proj_weight"],
                w[f"{attention}.in_proj_bias"],
                None,
                None,
                False,
                0.0,
                w[f"{attention}.out_proj.weight"],
                w[f"{attention}.out_proj.bias"],
                training=False,
                need_weights=False,
            )
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        scores = (attended.flatten(0, -2).mean(-1) / self.temperature).softmax(0)
        return torch.lerp(scores, torch.full_like(scores, 1 / len(scores)), self.uniform_mix)


def save_scorers(
    folder: str | os.PathLike,
    weights: dict[str, torch.Tensor],
    heads: int | None = 8,
    temperature: float = 20.0,
    uniform_mix: float = 0.5,
) -> None:
    """
    Writes `scorer.safetensors` into a model's folder, where `find_scorers` finds it.

    Args:
        folder: The model's folder.
        weights: Tensors by their names in `TransportScorer`.
        heads, temperature, uniform_mix: What weights do not tell; see `TransportScorer`.
    """
    metadata = {"heads": str(heads), "temperature": str(temperature), "uniform_mix": str(uniform_mix)}
    tensors = {f"scorer.{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, Path(folder) / "scorer.safetensors", metadata=metadata)


def find_scorers(model: str | os.PathLike) -> Scorers | None:
    """The scorers beside a model, if it is a folder that has any."""
    file = Path(model) / "scorer.safetensors"
    return Scorers(file) if file.is_file() else None


@torch.no_grad()
def explain(model, processor, samples, picture: Image.Image, scorers: Scorers | None = None) -> Explanation:
    """
    Explains one clip.

    Args:
        model, processor: A DALI model and its processor.
        samples: Mono sound [samples] at the rate of the feature extractor, one window at most.
        picture: One picture.
        scorers: Learned ones, if there are any.

    Raises:
        ValueError: if the image tokens are no square of patches.
    """
    samples = np.asarray(samples)
    features = processor.feature_extractor(
        [samples, np.zeros_like(samples)], sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt"
    )
    features = features[processor.feature_extractor.model_input_names[0]].to(model.device)
    pictures = BatchFeature(processor.image_inputs([picture])).to(model.device, model.dtype)
    audio, silence = model.get_audio_tokens(features).float().cpu()  # [n, d]
    image = model.get_image_tokens(**pictures)[0].float().cpu()  # [m, d]
    side = round(len(image) ** 0.5)
    if side * side != len(image):
        raise ValueError(f"{len(image)} image tokens are no square of patches: there is no place to draw them at.")
    nearest = log_nearest_plan(audio, image)
    where = (nearest.logsumexp(0) - log_nearest_plan(silence, image).logsumexp(0)).clamp(min=0).numpy()
    if scorers is None:
        plan = nearest.exp().numpy()
        alpha, beta = plan.sum(1), plan.sum(0)
    else:
        alpha, beta = (weights.double().numpy() for weights in scorers(audio, image))
        plan = ot.emd(alpha / alpha.sum(), beta / beta.sum(), squared_distances(audio, image))
    grid = processor.audio_grid or [1, len(audio)]
    square = (side, side)
    return Explanation(where.reshape(square), beta.reshape(square), alpha.reshape(grid), plan, scorers is not None)


def squared_distances(audio: torch.Tensor, image: torch.Tensor) -> np.ndarray:
    """Squared Euclidean distances [n, m]."""
    return torch.cdist(audio.double(), image.double()).square().numpy()


def log_nearest_plan(audio: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Logs of the plan [n, m] in which every audio token goes to the image tokens nearest to it."""
    cost = torch.from_numpy(squared_distances(audio, image))
    return (-cost / (BLUR * cost.mean())).log_softmax(1) - math.log(len(audio))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def heat(weights: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map of weights [rows, columns] in colours, smoothly enlarged to (width, height)."""
    scaled = (weights - weights.min()) / (np.ptp(weights) or 1)
    grey = Image.fromarray((255 * scaled).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = np.asarray(grey, dtype=np.float32)[..., None] / 255
    return Image.fromarray((DARK + share * (HOT - DARK)).astype(np.uint8))


def over_picture(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """The picture, bright where the weights [rows, columns] are large and dark where they are small."""
    picture = picture.convert("RGB").resize((PANEL, PANEL))
    scaled = (weights - weights.min()) / (np.ptp(weights) or 1)
    mask = Image.fromarray((55 + 200 * scaled).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.new("RGB", picture.size, tuple(DARK.tolist())), mask)


def spectrogram(features: np.ndarray, size: tuple[int, int] = (PANEL, PANEL)) -> Image.Image:
    """Log-mel frames [frames, bins] as a picture, time to the right and low frequencies below."""
    return heat(np.asarray(features).T[::-1], size)


def draw(picture: Image.Image, features: np.ndarray, explanation: Explanation) -> Image.Image:
    """
    One picture that tells it all: the frame, where the sound is in it, its weights, the spectrogram and its weights.

    Args:
        picture: The frame.
        features: Log-mel frames [frames, bins].
        explanation: Of both.
    """
    panels = [
        ("frame", picture.convert("RGB").resize((PANEL, PANEL))),
        ("where the sound is", over_picture(picture, explanation.where)),
        ("weights of the picture", over_picture(picture, explanation.image_weights)),
        ("spectrogram", spectrogram(features)),
        ("weights of the sound", heat(explanation.audio_weights[::-1], (PANEL, PANEL))),
    ]
    gap, top = 12, 26
    sheet = Image.new("RGB", (len(panels) * (PANEL + gap) + gap, PANEL + top + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(panels):
        left = gap + index * (PANEL + gap)
        sheet.paste(panel, (left, top))
        pen.text((left, 7), title, fill="black")
    return sheet
