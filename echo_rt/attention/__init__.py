"""Attention without a mask, by whichever library is fastest here.

A model is given its attention when it is loaded, as it is given its operations: :func:`choose_attention` measures what
is installed, on the model's own shapes, and remembers the outcome in a file.
"""

from echo_rt.attention.choice import (
    Choice,
    attentions,
    available_attention,
    choose_attention,
    kinds,
    known_choices,
    untried_attention,
)
from echo_rt.attention.kinds import Attention, Kind
from echo_rt.attention.remembered import cache_file
from echo_rt.attention.trials import AttentionShapes

__all__ = [
    "Attention",
    "AttentionShapes",
    "Choice",
    "Kind",
    "attentions",
    "available_attention",
    "cache_file",
    "choose_attention",
    "kinds",
    "known_choices",
    "untried_attention",
]
