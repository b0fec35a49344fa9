"""What can be measured, and what a run is asked for: sizes of models, variants, :class:`Request`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.options import RELEASED_SIZE, MemoryMode, RuntimeOptions, check_seed, latent_size


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


def plan(
    wanted: Sequence[str] | None, *, has_memory: bool, no_graphs: str, backend: str
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that can be measured, and why each other one cannot; ``no_graphs``: why there are none, or empty.

    Raises :class:`ConfigError` for a name that is unknown, and for a variant that was named and cannot be measured.
    """
    unknown = [name for name in wanted or () if name not in NAMES]
    if unknown or (wanted is not None and not wanted):
        came = ", ".join(name or "''" for name in unknown) or "none"
        raise ConfigError(f"--variants: expected some of {', '.join(NAMES)}; got {came}")

    def absence(variant: Variant) -> str:
        if wanted is not None and variant.name not in wanted:
            return "not asked for"
        if variant.mode not in (None, MemoryMode.OFF) and not has_memory:
            return "the weights have no memory encoder"
        if not variant.graphs and no_graphs:
            return f"{no_graphs}, so no variant has any"
        return "the backend of all variants is torch already" if variant.torch and backend == "torch" else ""

    absent = {variant.name: why for variant in VARIANTS if (why := absence(variant))}
    for name in wanted or ():
        if name in absent:
            raise ConfigError(f"variant {name!r} cannot be measured: {absent[name]}")
    return [variant for variant in VARIANTS if variant.name not in absent], absent


def turns_of(round_number: int, names: Sequence[str]) -> list[str]:
    """The order of a round: each name is first in its turn, so that none always runs on a GPU that another heated."""
    first = round_number % len(names) if names else 0
    return [*names[first:], *names[:first]]


@dataclass(frozen=True, kw_only=True)
class Request(RuntimeOptions):
    """What a run is asked for. None means: released sizes on a GPU, tiny ones on a CPU; every variant; as a runtime.

    ``backend`` is that of all variants but ``torch``. ``rounds`` times ``blocks`` blocks of each variant are measured,
    at lookahead 0 and at ``lookahead``. Raises :class:`ConfigError`.
    """

    size: str | None = None
    model: str | None = None
    float8_except: tuple[str, ...] = ()
    variants: tuple[str, ...] | None = None
    rounds: int | None = None
    blocks: int | None = None
    lookahead: int = 1
    peers: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model is not None and self.size is not None:
            raise ConfigError("--size and --model: expected one of them, got both")
        for option in ("checkpoint", "lora", "recipe"):
            if getattr(self, option) and self.model is None:
                raise ConfigError(f"--{option}: expected --model DIR with it, the folder that it belongs to, got none")
        if self.ema is not None and self.checkpoint is None:
            raise ConfigError("--ema: expected --checkpoint FILE with it, among whose weights it chooses, got none")
        check_seed(self.seed)
        super().__post_init__()
