"""Whether a snapshot fits a runtime: the same model, computed by the same libraries and kernels.

Two implementations of the same operation differ in the last bits, and the autotuner may pick another one later or on
another machine. So a video that is to go on bit for bit is computed by those that its snapshot names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from echo_rt.autotune.tuner import Selection
from echo_rt.config import MemoryConfig, SamplerConfig, WindowConfig
from echo_rt.ops.backends import Backend
from echo_rt.utils.device import dtype_name
from echo_rt.weights.choice import TAKEN

Selected: TypeAlias = "Backend | Selection[Any]"
IMPLEMENTATIONS = "computed_by"  # entry of a snapshot's model: names of implementations by label
BACKEND = "backend"
ATTENTION, TEXT_ATTENTION, VAE_ATTENTION = "attention", "attention to the text", "attention of the VAE"
FLOAT8_ATTENTION = "attention in float8"
LINEAR, LINEAR_BEFORE = "linear layer of ", "torch"  # of each shape; what computed it where no label names it
WEIGHTS = "weights"
# The parts whose digests stand there, in this order, and the options that choose their files.
_OPTIONS_OF_PARTS = {
    "weights of the transformer": "the model's folder, checkpoint, lora, ema",
    "weights of the memory encoder": "checkpoint, lora, ema",
    "weights of the video decoder": "the model's folder, vae",
}
# The first difference is told with its values: what a user chose comes before what follows from it.
_FIRST = ("dtype", "float8_except", "vae_dtype", "vae", "memory", "width", "height")
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
    "float8_attention": [],
}
_DEFAULTS_OF_MEMORY = {"reads": MemoryConfig.reads}


def difference(snapshot: Mapping[str, Any], here: Mapping[str, Any], stride: int) -> str | None:
    """Name what differs between two models, described as in :attr:`Snapshot.model`; None where nothing does.

    ``stride``: pixels on a side of a latent pixel.
    """
    theirs, own = (_in_words(model, stride) for model in (snapshot, here))
    names = [*_FIRST, *sorted({*theirs, *own} - {*_FIRST, *_OPTIONS_OF_PARTS}), *_OPTIONS_OF_PARTS]
    different = [n for n in names if (n in theirs, theirs.get(n)) != (n in own, own.get(n))]
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


def implementations_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the implementations that a snapshot's model names, by label; an old snapshot has only a backend."""
    named = model.get(IMPLEMENTATIONS)
    pairs = named.items() if isinstance(named, dict) else ()
    known = {label: name for label, name in pairs if isinstance(label, str) and isinstance(name, str)}
    return {BACKEND: "torch"} | known  # the default of the versions that did not store it


def conflict(snapshot: Mapping[str, Any], here: Mapping[str, Selected]) -> str | None:
    """Name an implementation that differs from the snapshot's though nobody asked for it, and the remedy.

    ``snapshot``: its model; ``here``: the runtime's implementations by label.
    """
    names = implementations_of(snapshot)
    for label, own in here.items():
        theirs = names.get(label, LINEAR_BEFORE if label.startswith(LINEAR) else own.name)
        if theirs != own.name and not own.by_name:
            return (
                f"{label} was {theirs} for its video and is {own.name} here, which rounds otherwise: load the runtime "
                "with like=snapshot to go on bit for bit, or with backend=, attention=, linear=, convolution= by name"
            )
    return None
