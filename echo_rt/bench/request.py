"""What a run is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_rt.bench.model import Model, folder_model, random_model
from echo_rt.bench.settings import MODELS, RELEASED, TINY
from echo_rt.errors import ConfigError
from echo_rt.options import RuntimeOptions, check_seed

# Rounds, and blocks of a variant in each, by device.
_ROUNDS = {"cuda": 5, "cpu": 2}
_BLOCKS = {"cuda": 10, "cpu": 2}


# Options of a runtime that say nothing about a benchmark, which has a way of its own for each, or none.
_NOT_ASKED = ("vae_dtype", "memory", "vae", "width", "height", "overrides", "check", "keep_text_encoder")


@dataclass(frozen=True, kw_only=True)
class Request(RuntimeOptions):
    """All of it optional. None means: released sizes on a GPU, tiny ones on a CPU; every variant; what a runtime has.

    ``backend`` is that of all variants but ``torch``. ``rounds`` times ``blocks`` blocks of each variant are measured,
    at lookahead 0 and at ``lookahead``. The size, dtype and memory of the video are the model's and the variants'.
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
        for name in _NOT_ASKED:
            if getattr(self, name) != getattr(RuntimeOptions, name):
                raise ConfigError(f"{name}: expected it left out of a benchmark, got {getattr(self, name)!r}")
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("blocks", self.blocks, 1),
            ("vae_tiles", self.vae_tiles, 1),
            ("lookahead", self.lookahead, 0),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise ConfigError(f"{name} must be a whole number of {least} or more, got {value!r}")
        if self.size is not None and self.size not in MODELS:
            raise ConfigError(f"size must be one of {', '.join(MODELS)}; got {self.size!r}")
        if self.model is not None and self.size is not None:
            raise ConfigError("--size and --model: expected one of them, got both")
        for option in ("checkpoint", "lora", "recipe"):
            if getattr(self, option) is not None and self.model is None:
                raise ConfigError(f"--{option}: expected --model DIR with it, the folder that it belongs to, got none")
        if self.ema is not None and self.checkpoint is None:
            raise ConfigError("--ema: expected --checkpoint FILE with it, among whose weights it chooses, got none")
        check_seed(self.seed)
        super().__post_init__()

    def counts(self, device: torch.device) -> tuple[int, int]:
        """Rounds, and blocks in each."""
        return self.rounds or _ROUNDS[device.type], self.blocks or _BLOCKS[device.type]

    def load(self, device: torch.device) -> Model:
        """The model; :class:`ConfigError` for the released sizes on a CPU, and all errors of loading a folder."""
        if self.model is not None:
            return folder_model(self.model, self)
        size = self.size or (RELEASED.name if device.type == "cuda" else TINY.name)
        if size == RELEASED.name and device.type != "cuda":
            raise ConfigError(
                f"--size: the {size} sizes need a GPU, a block would take minutes on {str(device)!r}; use {TINY.name!r}"
            )
        return random_model(MODELS[size], device, self.seed)
