"""Tensors as the authors' files hold them, for figures that were made once with the authors' own functions."""

import numpy as np
import torch


def released_scorers(width: int) -> dict[str, torch.Tensor]:
    """The scorers with the released names; the same values wherever and whenever they are made."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("a_k", "a_q", "a_v", "i_k", "i_q", "i_v", "audio_scorer.out_proj", "image_scorer.out_proj"):
        shapes |= {f"{name}.bias": (width,), f"{name}.weight": (width, width)}
    for name in ("audio_scorer", "image_scorer"):
        shapes |= {f"{name}.in_proj_bias": (3 * width,), f"{name}.in_proj_weight": (3 * width, width)}
    return {name: seeded(shapes[name], 100 + i, 0.5) for i, name in enumerate(sorted(shapes))}


def seeded(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values that are the same on every machine and with every version of torch."""
    return torch.from_numpy((np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32))
