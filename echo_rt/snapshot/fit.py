"""Compares a snapshot's model with a runtime's, in the words in which users choose a model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from echo_rt.config import MemoryConfig, SamplerConfig, WindowConfig
from echo_rt.snapshot.implementations import IMPLEMENTATIONS
from echo_rt.utils.device import dtype_name
from echo_rt.weights.choice import TAKEN

WEIGHTS = "weights"
# The parts whose digests stand there, in this order, and the options that choose their files.
_OPTIONS_OF_PARTS = {
    "weights of the transformer": "the model's folder, checkpoint, lora, ema",
    "weights of the memory encoder": "checkpoint, lora, ema",
    "weights of the video decoder": "the model's folder, vae",
}
# The first difference in this order is told with its values: what a user chose comes before what follows from it.
_ALL_OTHERS = ""
_ORDER = ("dtype", "vae_dtype", "vae", "memory", "width", "height", _ALL_OTHERS, *_OPTIONS_OF_PARTS)
_MOST_NAMES = 6  # of further differences
# Entries of the memory that are options; the others come from its weights.
_MEMORY_OPTIONS = {
    "frames": "memory_frames",
    "rebuild_on_prompt_switch": "rebuild_on_prompt_switch",
    "reads": "memory_reads",
}
# Values of entries that old snapshots do not have.
_DEFAULTS = {
    "first_block_steps": list(SamplerConfig.first_block_steps),
    "recache_sink": WindowConfig.recache_sink,
}
_DEFAULTS_OF_MEMORY = {"reads": MemoryConfig.reads}


def difference(snapshot: Mapping[str, Any], here: Mapping[str, Any], stride: int) -> str | None:
    """Name what differs between two models, described as in :attr:`Snapshot.model`; None where nothing does.

    ``stride``: pixels on a side of a latent pixel.
    """
    theirs, own = (_in_words(model, stride) for model in (snapshot, here))
    names = sorted({*theirs, *own}, key=lambda name: (_ORDER.index(name if name in _ORDER else _ALL_OTHERS), name))
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


def _in_words(model: Mapping[str, Any], stride: int) -> dict[str, Any]:
    """The entries of ``model`` by the names of options and parts. Values may be anything: snapshots come from files."""
    words: dict[str, Any] = {}
    for name, value in {**_DEFAULTS, **model}.items():
        if name == "memory_mode":
            words["memory"] = value
        elif name == "memory" and (value is None or isinstance(value, dict)):
            for entry, known in ({} if value is None else {**_DEFAULTS_OF_MEMORY, **value}).items():
                words[_MEMORY_OPTIONS.get(entry, f"{entry} of the memory encoder")] = known
        elif name in ("latent_width", "latent_height") and isinstance(value, int):
            words[name.removeprefix("latent_")] = stride * value
        elif name in ("dtype", "vae_dtype"):
            words[name] = dtype_name(value)
        elif name == WEIGHTS and isinstance(value, list) and len(value) == len(_OPTIONS_OF_PARTS):
            words |= zip(_OPTIONS_OF_PARTS, value, strict=True)
        elif name not in (IMPLEMENTATIONS, TAKEN):  # which do not say what the model is
            words[name] = value
    return words
