"""Attention without a mask, by whichever library is fastest here.

A model is given its attention when it is loaded, as it is given its operations: :func:`select_attention` measures what
is installed, on the model's own shapes, and remembers the outcome in a file.
"""

from echo_rt.attention.backends import Attention, AttentionCandidate, AttentionShapes, implementations
from echo_rt.attention.select import (
    AttentionSelection,
    attentions,
    available_attention,
    cache_file,
    known_selections,
    select_attention,
    untried_attention,
)

__all__ = [
    "Attention",
    "AttentionCandidate",
    "AttentionSelection",
    "AttentionShapes",
    "attentions",
    "available_attention",
    "cache_file",
    "implementations",
    "known_selections",
    "select_attention",
    "untried_attention",
]
