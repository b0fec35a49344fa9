"""Whether a snapshot is of a runtime's model, said in the words in which its user chose the model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from echo_rt.config import MemoryConfig, SamplerConfig, WindowConfig
from echo_rt.snapshot.ways import WAYS
from echo_rt.utils.device import dtype_name
from echo_rt.weights.choice import TAKEN

WEIGHTS = "weights"
# Whose digests stand there, in this order, and by which options a user says what they are read from.
_PARTS = (
    ("weights of the transformer", "the model's folder, checkpoint, lora, ema"),
    ("weights of the memory encoder", "checkpoint, lora, ema"),
    ("weights of the video decoder", "the model's folder, vae"),
)
_OPTIONS_OF_PARTS = dict(_PARTS)
# The first of all that differs is told with its values: what a user named comes before what follows from it.
_FIRST = ("dtype", "vae_dtype", "vae", "memory", "width", "height")
_MOST_NAMES = 6  # of those that differ as well
# Facts of the memory that are options; the others come from its weights.
_MEMORY_OPTIONS = {
    "frames": "memory_frames",
    "rebuild_on_prompt_switch": "rebuild_on_prompt_switch",
    "reads": "memory_reads",
}
# What a snapshot meant that was written before there were these facts.
_UNSAID = {
    "first_block_steps": list(SamplerConfig.first_block_steps),
    "recache_sink": WindowConfig.recache_sink,
}
_UNSAID_OF_MEMORY = {"reads": MemoryConfig.reads}


def difference(snapshot: Mapping[str, Any], here: Mapping[str, Any], stride: int) -> str | None:
    """What of two models, described as in :attr:`Snapshot.model`, is not the same; None where all is.

    ``stride``: pixels on a side of a latent pixel.
    """
    theirs, own = (_in_words(model, stride) for model in (snapshot, here))
    names = sorted({*theirs, *own}, key=_rank)
    different = [name for name in names if name not in theirs or name not in own or theirs[name] != own[name]]
    if not different:
        return None
    first, *others = different
    more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    also = f"; also different: {', '.join(others[:_MOST_NAMES])}{more}" if others else ""
    if first in _OPTIONS_OF_PARTS:
        return f"the {first} are not those of the snapshot, look at {_OPTIONS_OF_PARTS[first]}{also}"
    was, is_now = (reprlib.repr(words[first]) if first in words else "not there" for words in (theirs, own))
    return f"{first} is {was} in the snapshot and {is_now} here{also}"


def _rank(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return _FIRST.index(name), ""
    parts = list(_OPTIONS_OF_PARTS)
    return len(_FIRST) + (1 + parts.index(name) if name in parts else 0), name


def _in_words(model: Mapping[str, Any], stride: int) -> dict[str, Any]:
    """The facts by the names of options and parts. A value may be anything: a snapshot's come from outside."""
    words: dict[str, Any] = {}
    for name, value in {**_UNSAID, **model}.items():
        if name == "memory_mode":
            words["memory"] = value
        elif name == "memory" and (value is None or isinstance(value, dict)):
            for fact, known in ({} if value is None else {**_UNSAID_OF_MEMORY, **value}).items():
                words[_MEMORY_OPTIONS.get(fact, f"{fact} of the memory encoder")] = known
        elif name in ("latent_width", "latent_height") and isinstance(value, int):
            words[name.removeprefix("latent_")] = stride * value
        elif name in ("dtype", "vae_dtype"):
            words[name] = dtype_name(value)
        elif name == WEIGHTS and isinstance(value, list) and len(value) == len(_PARTS):
            words |= zip(_OPTIONS_OF_PARTS, value, strict=True)
        elif name not in (WAYS, TAKEN):  # which are no part of what a model is
            words[name] = value
    return words
