"""Attention without a mask, by whichever library is fastest here.

A model is given its attention when it is loaded, as it is given its operations: :func:`attention_tuner` measures what
is installed, on the model's own shapes, and remembers the outcome in a file.
"""

from echo_rt.attention.backends import Attention, AttentionCandidate, AttentionShapes, implementations
from echo_rt.attention.select import (
    AttentionSelection,
    attention_tuner,
    attentions,
    available_attention,
    cache_file,
    known_selections,
    untried_attention,
)

__all__ = [
    "Attention",
    "AttentionCandidate",
    "AttentionSelection",
    "AttentionShapes",
    "attention_tuner",
    "attentions",
    "available_attention",
    "cache_file",
    "implementations",
    "known_selections",
    "untried_attention",
]
