"""What can be measured: models, as configs that every size is derived from, and variants. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.options import RELEASED_SIZE, MemoryMode, latent_size


@dataclass(frozen=True)
class BenchModel:
    """A generator with its memory, and the VAE that decodes for it."""

    name: str
    config: ModelConfig
    vae: VaeConfig


def _model(name: str, size: tuple[int, int], transformer: TransformerConfig, vae: VaeConfig) -> BenchModel:
    height, width = latent_size(*size, vae, transformer)
    return BenchModel(name, ModelConfig(transformer, height, width, memory=MemoryConfig()), vae)


# Wan2.1-T2V-1.3B at the released size of the video; what is not named here is its default.
RELEASED = _model(
    "released",
    RELEASED_SIZE,
    TransformerConfig(dim=1536, ffn_dim=8960, freq_dim=256, num_heads=12, num_layers=30),
    VaeConfig(),
)
# The same shape of a model, small enough for kernels that run on the host one thread after the other.
TINY = _model(
    "tiny",
    (48, 32),
    TransformerConfig(dim=128, ffn_dim=256, freq_dim=32, num_heads=2, num_layers=2, text_dim=32, text_len=8),
    VaeConfig(base_dim=8),
)
MODELS = {model.name: model for model in (RELEASED, TINY)}


@dataclass(frozen=True)
class Variant:
    """One setting. ``mode`` None: the memory evolves, where there is one; ``torch``: in place of the chosen backend."""

    name: str
    mode: MemoryMode | None = None
    graphs: bool = True
    torch: bool = False


VARIANTS = (
    Variant("evolve", MemoryMode.EVOLVE),
    Variant("prior", MemoryMode.PRIOR),
    Variant("off", MemoryMode.OFF),
    Variant("no-graphs", graphs=False),
    Variant("torch", torch=True),
)
NAMES = tuple(variant.name for variant in VARIANTS)


def memory_evolves(wanted: Sequence[str] | None) -> bool:
    """Whether the chosen backend is to update a memory, where there is one, in a variant of ``wanted`` (None: all)."""
    chosen = (variant for variant in VARIANTS if wanted is None or variant.name in wanted)
    return any(not variant.torch and variant.mode in (None, MemoryMode.EVOLVE) for variant in chosen)


def plan(
    wanted: Sequence[str] | None, *, has_memory: bool, no_graphs: str, backend: str
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that can be measured, in a fixed order, and why each other one cannot.

    ``wanted`` None means all; ``no_graphs``: why there are no graphs, empty where there are. What is asked for by name
    and cannot be had is a :class:`ConfigError`, as is a name that is unknown.
    """
    unknown = [name for name in wanted or () if name not in NAMES]
    if unknown or (wanted is not None and not wanted):
        came = ", ".join(name or "''" for name in unknown) or "none"
        raise ConfigError(f"--variants: expected some of {', '.join(NAMES)}; got {came}")
    chosen: list[Variant] = []
    absent: dict[str, str] = {}
    for variant in VARIANTS:
        obstacle = ""
        if wanted is not None and variant.name not in wanted:
            obstacle = "not asked for"
        elif variant.mode not in (None, MemoryMode.OFF) and not has_memory:
            obstacle = "the weights have no memory encoder"
        elif not variant.graphs and no_graphs:
            obstacle = f"{no_graphs}, so no variant has any"
        elif variant.torch and backend == "torch":
            obstacle = "the backend of all variants is torch already"
        if not obstacle:
            chosen.append(variant)
        else:
            absent[variant.name] = obstacle
            if wanted is not None and variant.name in wanted:
                raise ConfigError(f"variant {variant.name!r} cannot be measured: {obstacle}")
    return chosen, absent


def turns_of(round_number: int, names: Sequence[str]) -> list[str]:
    """The order of a round: each is first in its turn, so that none always runs on a GPU that another has heated."""
    first = round_number % len(names) if names else 0
    return [*names[first:], *names[:first]]
