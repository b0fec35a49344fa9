"""echo-rt: endless video from Wan2.1 with evolving memory.

with echo_rt.Runtime.from_pretrained("Wan2.1-T2V-1.3B", checkpoint="echo_infinity.pt") as runtime:
    for chunk in runtime.stream("a red fox in the snow", seed=7):
        show(chunk.frames)  # uint8 [T, height, width, 3]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from echo_rt.utils.build_info import __version__ as __version__

if TYPE_CHECKING:
    from echo_rt.chunk import Chunk as Chunk
    from echo_rt.chunk import ChunkStats as ChunkStats
    from echo_rt.chunk import Vitals as Vitals
    from echo_rt.engine.guard import Guard as Guard
    from echo_rt.engine.prompts import load_prompt_embeds as load_prompt_embeds
    from echo_rt.engine.prompts import save_prompt_embeds as save_prompt_embeds
    from echo_rt.errors import BackendError as BackendError
    from echo_rt.errors import CaptureError as CaptureError
    from echo_rt.errors import ConfigError as ConfigError
    from echo_rt.errors import EchoError as EchoError
    from echo_rt.errors import NumericalError as NumericalError
    from echo_rt.errors import OutputError as OutputError
    from echo_rt.errors import PromptError as PromptError
    from echo_rt.errors import ResourceError as ResourceError
    from echo_rt.errors import SnapshotError as SnapshotError
    from echo_rt.errors import SnapshotVersionError as SnapshotVersionError
    from echo_rt.errors import StallError as StallError
    from echo_rt.errors import SteadyStateError as SteadyStateError
    from echo_rt.errors import StreamError as StreamError
    from echo_rt.errors import TargetError as TargetError
    from echo_rt.errors import WeightsError as WeightsError
    from echo_rt.options import MemoryMode as MemoryMode
    from echo_rt.runtime import Runtime as Runtime
    from echo_rt.snapshot.snapshot import Snapshot as Snapshot
    from echo_rt.stream import Feed as Feed
    from echo_rt.stream import Stream as Stream
    from echo_rt.utils.threads import share_cpu as share_cpu

# Imported when they are asked for: torch takes seconds, and `echo-rt --help` should not wait for it.
_HOMES = {
    "chunk": "Chunk ChunkStats Vitals",
    "engine.guard": "Guard",
    "engine.prompts": "load_prompt_embeds save_prompt_embeds",
    "errors": "BackendError CaptureError ConfigError EchoError NumericalError OutputError PromptError ResourceError "
    "SnapshotError SnapshotVersionError StallError SteadyStateError StreamError TargetError WeightsError",
    "options": "MemoryMode",
    "runtime": "Runtime",
    "snapshot.snapshot": "Snapshot",
    "stream": "Feed Stream",
    "utils.threads": "share_cpu",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'echo_rt' has no attribute {name!r}")
    return getattr(import_module(f"echo_rt.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
