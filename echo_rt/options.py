"""What a user may choose, checked: names of modes and dtypes, seeds, sizes, facts of the rollout. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.config import TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.recipes import find_recipe

if TYPE_CHECKING:
    import torch

# Width and height of the released recipe's video, in pixels: what a stock Wan folder is used with.
RELEASED_SIZE = (832, 480)

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float8")
# What the VAE decodes in; its own choice, beside the transformer's.
VAE_DTYPE_NAMES = ("float32", "bfloat16", "float16")

# Which decoder makes the video: the model's own, or a tiny one beside it. A path says it as well.
WAN_VAE, TINY_VAE = "wan", "tiny"

# Facts of a rollout that a caller, or the object "echo_rt" in a model folder's config.json, may choose. The rest comes
# from the weights.
OVERRIDES = (
    "frames_per_block",
    "sink_frames",
    "local_frames",
    "max_temporal_id",
    "denoising_steps",
    "first_block_steps",
    "timestep_shift",
    "context_timestep",
    "memory_frames",
    "memory_reads",
    "rebuild_on_prompt_switch",
    "recache_sink",
)
# What a model folder may say beside them; the last one names what holds where it says no more.
RECIPE = "recipe"
FOLDER_FACTS = ("width", "height", "tiny_seed", RECIPE)

# LoRAs as callers name them: a path, or a sequence of paths of which each may have a strength.
Lora = str | Path | Sequence[str | Path | tuple[str | Path, float]] | None

_SEEDS = 2**64


class MemoryMode(str, Enum):
    """What the memory does: evolve with the video, stay at its learned start, or be left out."""

    EVOLVE = "evolve"
    PRIOR = "prior"
    OFF = "off"

    @classmethod
    def parse(cls, value: str | MemoryMode) -> MemoryMode:
        """The mode called ``value``; :class:`ConfigError` names the choices."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(f"memory must be one of {', '.join(m.value for m in cls)}; got {value!r}") from None


@dataclass(frozen=True)
class RuntimeOptions:
    """How a model is loaded and runs: what :meth:`echo_rt.Runtime.from_pretrained` takes and explains.

    What needs neither a device nor the model's files is checked here; raises :class:`ConfigError`.
    """

    checkpoint: str | Path | None = None
    lora: Lora = None
    lora_alpha: float | None = None
    ema: bool | None = None
    recipe: str | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    float8_except: Sequence[str] = ()
    vae_dtype: str | torch.dtype | None = None
    memory: str | MemoryMode | None = None
    vae: str | Path = WAN_VAE
    vae_tiles: int = 1
    backend: str | None = None
    attention: str | None = None
    convolution: str | None = None
    graphs: bool | None = None
    lookahead: int | None = None
    width: int | None = None
    height: int | None = None
    overrides: Mapping[str, Any] | None = None
    check: bool = False
    keep_text_encoder: bool = False

    def __post_init__(self) -> None:
        if self.recipe is not None:
            find_recipe(self.recipe)
        if isinstance(self.vae_tiles, bool) or not isinstance(self.vae_tiles, int) or self.vae_tiles < 1:
            raise ConfigError(f"vae_tiles must be an integer of 1 or more, got {self.vae_tiles!r}")
        if not isinstance(self.convolution, str | None):
            raise ConfigError(
                f"convolution must be text, names with commas between, or left out; got {self.convolution!r}"
            )
        loras, alpha = lora_files(self.lora), self.lora_alpha
        if alpha is not None and not (is_number(alpha) and alpha > 0):
            raise ConfigError(f"lora_alpha must be a number above 0, got {alpha!r}")
        if alpha is not None and not loras:
            raise ConfigError(f"lora_alpha is that of LoRAs without one: expected a LoRA beside lora_alpha={alpha:g}")
        ahead = self.lookahead
        if ahead is not None and (isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 0):
            raise ConfigError(f"lookahead must be a number of blocks, 0 or more, got {ahead!r}")

    def arguments(self) -> dict[str, Any]:
        """Return them by name, for :meth:`echo_rt.Runtime.from_pretrained`; of a subclass these fields alone."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(RuntimeOptions)}


def is_path(value: object) -> bool:
    """Return whether ``value`` is a path; an empty one, which would mean the working folder, is not."""
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite real number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lora_files(lora: Lora) -> tuple[tuple[Path, float], ...]:
    """The paths of LoRAs, each with its strength, which is 1 where none is given; raises :class:`ConfigError`."""
    entries: Any = lora if isinstance(lora, Sequence) and not isinstance(lora, str) else [lora]
    files = []
    for entry in [] if lora is None else entries:
        path, strength = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0)
        if not is_path(path):
            raise ConfigError(f"lora must be a path, a list of paths and (path, strength) pairs, or None; got {lora!r}")
        if not is_number(strength):
            raise ConfigError(f"the strength of a LoRA must be a finite number, got {strength!r} for {path}")
        files.append((Path(path), float(strength)))
    return tuple(files)


def lora_text(path: str | Path, strength: float) -> str:
    """A LoRA as the command line names it: ``FILE`` or ``FILE:STRENGTH``."""
    return str(path) if strength == 1 else f"{path}:{strength}"


def check_overrides(overrides: Mapping[str, Any], source: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """``overrides`` as a dict; :class:`ConfigError` for a name that is not in :data:`OVERRIDES` or ``also``."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{source} must be a mapping of names to values, got {overrides!r}")
    unknown = sorted(map(str, set(overrides) - {*OVERRIDES, *also}))
    if unknown:
        raise ConfigError(f"{source} may name {', '.join((*also, *OVERRIDES))}; got {', '.join(unknown)}")
    return dict(overrides)


def check_seed(seed: int) -> int:
    """``seed``, if it is an integer in 0 .. 2^64-1; :class:`ConfigError` otherwise."""
    try:
        whole = -1 if isinstance(seed, bool) else operator.index(seed)  # numpy's integers are integers too
    except TypeError:
        whole = -1
    if not 0 <= whole < _SEEDS:
        raise ConfigError(f"seed must be an integer in 0..2^64-1, got {seed!r}")
    return whole


def latent_size(width: int, height: int, vae: VaeConfig, transformer: TransformerConfig) -> tuple[int, int]:
    """Latent height and width of a video of ``width`` x ``height`` pixels; :class:`ConfigError` if there are none."""
    _, patch_rows, patch_columns = transformer.patch_size
    for name, pixels, step in (
        ("width", width, vae.spatial_stride * patch_columns),
        ("height", height, vae.spatial_stride * patch_rows),
    ):
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < step or pixels % step:
            raise ConfigError(f"the video's {name} must be a positive multiple of {step} pixels, got {pixels!r}")
    return height // vae.spatial_stride, width // vae.spatial_stride
