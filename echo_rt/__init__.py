"""echo-rt: endless video from Wan2.1 with evolving memory.

with echo_rt.Runtime.from_pretrained("Wan2.1-T2V-1.3B", checkpoint="echo_infinity.pt") as runtime:
    for chunk in runtime.stream("a red fox in the snow", seed=7):
        show(chunk.frames)  # uint8 [T, height, width, 3]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from echo_rt.utils.build_info import __version__

if TYPE_CHECKING:
    from echo_rt.chunk import Chunk, ChunkStats, Vitals
    from echo_rt.engine.guard import Guard
    from echo_rt.engine.prompts import load_prompt_embeds, save_prompt_embeds
    from echo_rt.errors import (
        BackendError,
        CaptureError,
        ConfigError,
        EchoError,
        NumericalError,
        OutputError,
        PromptError,
        ResourceError,
        SnapshotError,
        SnapshotVersionError,
        StallError,
        SteadyStateError,
        StreamError,
        TargetError,
        WeightsError,
    )
    from echo_rt.options import MemoryMode
    from echo_rt.runtime import Runtime
    from echo_rt.snapshot.snapshot import Snapshot
    from echo_rt.stream import Feed, Stream
    from echo_rt.utils.threads import share_cpu

__all__ = [
    "BackendError",
    "CaptureError",
    "Chunk",
    "ChunkStats",
    "ConfigError",
    "EchoError",
    "Feed",
    "Guard",
    "MemoryMode",
    "NumericalError",
    "OutputError",
    "PromptError",
    "ResourceError",
    "Runtime",
    "Snapshot",
    "SnapshotError",
    "SnapshotVersionError",
    "StallError",
    "SteadyStateError",
    "Stream",
    "StreamError",
    "TargetError",
    "Vitals",
    "WeightsError",
    "__version__",
    "load_prompt_embeds",
    "save_prompt_embeds",
    "share_cpu",
]

_MODULES = {
    **dict.fromkeys(("Chunk", "ChunkStats", "Vitals"), "chunk"),
    **dict.fromkeys(("load_prompt_embeds", "save_prompt_embeds"), "engine.prompts"),
    "Guard": "engine.guard",
    "MemoryMode": "options",
    "Runtime": "runtime",
    "Snapshot": "snapshot.snapshot",
    **dict.fromkeys(("Feed", "Stream"), "stream"),
    "share_cpu": "utils.threads",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `echo-rt --help` and a mistyped option should not wait for it.
    if name not in __all__:
        raise AttributeError(f"module 'echo_rt' has no attribute {name!r}")
    return getattr(import_module(f"echo_rt.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
