"""Alignment losses between token sets: one loss a file, [B] losses from [B, n, d] audio and [B, m, d] image tokens."""

from .attentive_transport import EntropySchedule, TransportScorer, attentive_transport, entropy
from .contrastive import contrastive, mean_tokens
from .mmd import mmd
from .optimal_transport import Transport, optimal_transport

__all__ = [
    "EntropySchedule",
    "Transport",
    "TransportScorer",
    "attentive_transport",
    "contrastive",
    "entropy",
    "mean_tokens",
    "mmd",
    "optimal_transport",
]
