"""All that a measurement depends on: while it is the same, the outcome holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from echo_rt.utils.build_info import __version__


class Kind(Protocol):
    """An implementation that may be chosen; ``version`` is None where that of torch or echo-rt says it all."""

    @property
    def name(self) -> str: ...

    def version(self) -> str | None: ...


def machine_facts(device: torch.device, kinds: Iterable[Kind]) -> dict[str, Any]:
    """The GPU and the versions of whatever takes part, as JSON."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "echo_rt": __version__,
        "kinds": {kind.name: kind.version() for kind in kinds},
    }


def _driver() -> str | None:
    """None where the driver's library of facts is not there, as in some containers."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
