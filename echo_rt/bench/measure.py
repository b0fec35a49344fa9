"""What a block runner is measured beside: others' code, where this package lies in a checkout that drives it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from echo_rt.bench.environment import ROOT
from echo_rt.bench.rig import Parts
from echo_rt.errors import EchoError
from echo_rt.utils.wording import with_type

BASELINES = ("diffusers AutoencoderKLWan", "diffusers WanTransformer3DModel", "FlashDreams")
_SCRIPT = "bench/baselines.py"


@dataclass(frozen=True)
class Baseline:
    """Another's code. ``call`` does the work once; it stands ``beside`` our figure ``decode`` or ``pass``."""

    name: str
    what: str
    beside: str
    call: Callable[[], object]
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not


@dataclass(frozen=True)
class Missing:
    """A baseline that is not in the run, and why."""

    name: str
    why: str

    @classmethod
    def because(cls, name: str, error: Exception) -> Missing:
        """One that raised ``error``."""
        return cls(name, str(error) if isinstance(error, EchoError) else f"did not run: {with_type(error)}")


LEFT_OUT = tuple(Missing(name, "left out by --no-peers") for name in BASELINES)


def find_baselines(parts: Parts, prompt_embeds: Tensor, seed: int) -> tuple[list[Baseline], list[Missing]]:
    """The baselines that ``bench/baselines.py`` of a checkout finds; none is installed with this package."""
    script = ROOT / _SCRIPT
    if not script.is_file():
        why = f"only a checkout has {_SCRIPT}, which runs it; this package was installed without"
        return [], [Missing(name, why) for name in BASELINES]
    spec = importlib.util.spec_from_file_location("baselines", script)
    assert spec is not None and spec.loader is not None  # it is a Python file
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: tuple[list[Baseline], list[Missing]] = module.find_baselines(parts, prompt_embeds, seed)
    return found
