"""Whether the buffers of a video fit into the memory that is there: counted before the first of them is made.

A GPU says so when it has no more. A host does not: Linux promises memory that it does not have, and ends the process
that writes to it. What is counted is what a stream holds on to, which is less than it takes while it computes, and
what it is held against is all the memory there is, whoever has it now: nothing is refused that could have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.pipeline import frames_shape
from echo_rt.engine.state import state_sizes
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import DecoderState
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import Shapes, vae_decoder_shapes
from echo_rt.weights.tiny_vae import TinyVaeConfig, tiny_decoder_shapes

_META = torch.device("meta")  # tensors with a size and no bytes
_GIB = 2**30
_KIBIBYTE = 1024  # the unit of /proc/meminfo
_NO_LIMIT = "max"


@dataclass(frozen=True)
class Need:
    """Bytes, of a GPU and of the host: what a stream holds on to beside the weights, or what there is."""

    device: int
    host: int


def require_room(
    config: ModelConfig,
    vae: VaeConfig,
    tiny: TinyVaeConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    vae_tiles: int = 1,
    depth: int,
) -> None:
    """:class:`ConfigError` for a video that has no room, however little else there is.

    ``tiny``: the tiny decoder in place of the VAE, if any; ``depth``: how many blocks may be in flight.
    """
    room = Need(device=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0, host=host_memory())
    need = rollout_bytes(config, vae, dtype=dtype, vae_dtype=vae_dtype, depth=depth)
    # Apart, as these are counted with tensors, and there are sizes that not even a tensor without bytes can have.
    _require(need, room, config, vae, device, depth)
    need = Need(need.device + decoder_bytes(config, vae, tiny, vae_dtype, vae_tiles), need.host)
    _require(need, room, config, vae, device, depth)


def _require(need: Need, room: Need, config: ModelConfig, vae: VaeConfig, device: torch.device, depth: int) -> None:
    if device.type != "cuda":
        need = Need(device=0, host=need.device + need.host)
    for place, wanted, there in ((device, need.device, room.device), ("this host", need.host, room.host)):
        if wanted > there:
            _, height, width, _ = frames_shape(config, vae)
            raise ConfigError(
                f"expected a video whose buffers fit into the {there // _GIB} GiB of {place}, got one of "
                f"{width}x{height} with local_frames {config.window.local_frames} and lookahead {depth - 1}, "
                f"whose buffers need {-(-wanted // _GIB)} GiB or more"
            )


def rollout_bytes(
    config: ModelConfig, vae: VaeConfig, *, dtype: torch.dtype, vae_dtype: torch.dtype, depth: int
) -> Need:
    """Of the rollout, and of what is between it, the decoder and the host."""
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in state_sizes(config, dtype).items()}
    pixels = math.prod(frames_shape(config, vae))
    block = pixels + sizes["x"]  # its frames as bytes, and its latents
    video = pixels * vae_dtype.itemsize  # the frames before they are bytes
    return Need(device=sum(sizes.values()) + block + video, host=depth * block)


def decoder_bytes(
    config: ModelConfig, vae: VaeConfig, tiny: TinyVaeConfig | None, dtype: torch.dtype, tiles: int
) -> int:
    """Of what the decoder remembers and works in, as it makes it."""
    size = (config.latent_height, config.latent_width, config.window.frames_per_block)
    state: DecoderState
    if tiny is not None:
        tensors = _empty(tiny_decoder_shapes(tiny))
        state = TinyDecoder(tiny, tensors, vae, device=_META, dtype=dtype).new_state(*size)
    else:
        tensors = _empty(vae_decoder_shapes(vae))
        wan = VaeDecoder(vae, tensors, load_ops("torch"), device=_META, dtype=dtype, tiles=tiles)
        state = wan.new_state(*size)
    return sum(tensor.nbytes for tensor in state.buffers().values())


def _empty(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device=_META) for name, shape in shapes.items()}


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can have at most: all that the machine has, or its control group, and what is swapped.

    ``root``: where ``/proc`` and ``/sys`` are.
    """
    facts = dict(line.split(":") for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    memory, swap = (int(facts[name].split()[0]) * _KIBIBYTE for name in ("MemTotal", "SwapTotal"))
    return min([memory, *_group_limits(root)]) + swap


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of the control groups that the process is in, of either version, the outer ones included."""
    mounts = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = mounts, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mounts / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for each in (group, *group.parents):
            file = base / each.relative_to("/") / name
            # A container sees its own group as the root, and no file where those above it are named.
            if file.is_file() and (limit := file.read_text(encoding="ascii").strip()) != _NO_LIMIT:
                yield int(limit)
