"""Whether the buffers of a video fit into the memory of the machine: counted before the first of them is allocated.

A GPU refuses what it has no memory for; Linux kills the process that writes to it. The buffers that a stream keeps are
compared with all the memory there is, free or not: nothing is refused that could have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.pipeline import frames_shape
from echo_rt.engine.state import state_sizes
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import VideoDecoder
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_decoder_shapes
from echo_rt.weights.tiny_vae import TinyVaeConfig, tiny_decoder_shapes

_META = torch.device("meta")  # tensors with a size and no bytes
_GIB = 2**30


def require_capacity(
    config: ModelConfig,
    vae: VaeConfig,
    tiny: TinyVaeConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    vae_tiles: int = 1,
    depth: int,
    float8_layers: int = 0,
) -> None:
    """Raise :class:`ConfigError` for a video whose buffers do not fit into the memory of ``device`` or of the host.

    ``tiny``: the tiny decoder in place of the VAE, if any; ``depth``: how many blocks may be in flight;
    ``float8_layers``: how many layers attend in float8.
    """
    on_device, on_host = rollout_bytes(
        config, vae, dtype=dtype, vae_dtype=vae_dtype, depth=depth, float8_layers=float8_layers
    )
    capacities = {"this host": host_memory()}
    if device.type == "cuda":
        capacities = {str(device): torch.cuda.mem_get_info(device)[1]} | capacities
    # First without the decoder, whose bytes are counted with tensors: some sizes are too large even for those.
    for with_decoder in (False, True):
        on_device += decoder_bytes(config, vae, tiny, vae_dtype, vae_tiles) if with_decoder else 0
        wanted = [on_device, on_host] if device.type == "cuda" else [on_device + on_host]
        for (place, capacity), bytes_wanted in zip(capacities.items(), wanted, strict=True):
            if bytes_wanted > capacity:
                _, height, width, _ = frames_shape(config, vae)
                raise ConfigError(
                    f"expected a video whose buffers fit into the {capacity // _GIB} GiB of {place}, got one of "
                    f"{width}x{height} with local_frames {config.window.local_frames} and lookahead {depth - 1}, "
                    f"whose buffers need {-(-bytes_wanted // _GIB)} GiB or more"
                )


def rollout_bytes(
    config: ModelConfig,
    vae: VaeConfig,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    depth: int,
    float8_layers: int = 0,
) -> tuple[int, int]:
    """Bytes, of device and host, of the rollout's state and of the buffers between it, the decoder and the host."""
    tensors = state_sizes(config, dtype, float8_layers)
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in tensors.items()}
    pixels = math.prod(frames_shape(config, vae))
    block = pixels + sizes["x"]  # its frames as bytes, and its latents
    video = pixels * vae_dtype.itemsize  # the decoder's output
    return sum(sizes.values()) + block + video, depth * block


def decoder_bytes(
    config: ModelConfig, vae: VaeConfig, tiny: TinyVaeConfig | None, dtype: torch.dtype, tiles: int
) -> int:
    """Bytes of the decoder's history and scratch buffers."""
    shapes = vae_decoder_shapes(vae) if tiny is None else tiny_decoder_shapes(tiny)
    tensors = {name: torch.empty(shape, device=_META) for name, shape in shapes.items()}
    decoder: VideoDecoder[Any]
    if tiny is None:
        decoder = VaeDecoder(vae, tensors, load_ops("torch"), device=_META, dtype=dtype, tiles=tiles)
    else:
        decoder = TinyDecoder(tiny, tensors, vae, device=_META, dtype=dtype)
    return decoder.new_state(config.latent_height, config.latent_width, config.window.frames_per_block).nbytes


def has_room(device: torch.device) -> bool:
    """Whether an eighth of the memory of ``device`` is free: for the graphs and workspaces of a stream, and others."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free, total = host_memory_free(), host_memory()
    return free > total // 8


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can have at most: the memory of the machine, or of its control group, and the swap.

    ``root``: the folder of ``/proc`` and ``/sys``.
    """
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _ in _groups(root))]) + _meminfo(root, "SwapTotal")


def host_memory_free(root: Path = Path("/")) -> int:
    """Bytes that this process can have without swapping, beside those in use."""
    free = [limit - int(used.read_text(encoding="ascii")) for limit, used in _groups(root)]
    return min([_meminfo(root, "MemAvailable"), *free])


def _meminfo(root: Path, name: str) -> int:
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Limit in bytes and file of the use of the process's control groups and those around them; versions 1 and 2."""
    mounts = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = mounts, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = PurePosixPath(path)
        for each in (group, *group.parents):
            limit, used = (base / each.relative_to("/") / name for name in names)
            # A container sees its own group as the root, and has no files of the groups around it.
            if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
                yield int(most), used
