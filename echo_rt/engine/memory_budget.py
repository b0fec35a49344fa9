"""Whether the buffers of a video fit into the memory of the machine: counted before the first of them is allocated.

A GPU refuses what it has no memory for; Linux kills the process that writes to it. The buffers that a stream keeps are
compared with all the memory there is, free or not: nothing is refused that could have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.engine.build import Networks
from echo_rt.engine.pipeline import frames_shape
from echo_rt.engine.state import RolloutState
from echo_rt.errors import ConfigError
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_decoder_shapes
from echo_rt.weights.tiny_vae import tiny_decoder_shapes

_META = torch.device("meta")  # tensors with a size and no bytes
_GIB = 2**30
_UNCOUNTED = 2**63  # bytes


def require_capacity(config: ModelConfig, networks: Networks, depth: int) -> None:
    """Raise :class:`ConfigError` for a video whose buffers do not fit into the memory of its device or of the host.

    ``depth``: how many blocks may be in flight.
    """
    device = networks.device
    on_device, on_host = video_bytes(config, networks, depth)
    if device.type == "cuda":
        wants = {str(device): (torch.cuda.mem_get_info(device)[1], on_device), "this host": (host_memory(), on_host)}
    else:
        wants = {"this host": (host_memory(), on_device + on_host)}
    for place, (capacity, wanted) in wants.items():
        if wanted > capacity:
            assert networks.vae is not None
            _, height, width, _ = frames_shape(config, networks.vae)
            raise ConfigError(
                f"expected a video whose buffers fit into the {capacity // _GIB} GiB of {place}, got one of "
                f"{width}x{height} with local_frames {config.window.local_frames} and lookahead {depth - 1}, "
                f"whose buffers need {-(-wanted // _GIB)} GiB or more"
            )


def video_bytes(config: ModelConfig, networks: Networks, depth: int) -> tuple[int, int]:
    """Bytes, of device and host, of all that a video keeps: rollout, decoder, and the buffers between it and the host.

    The same objects are made once more, of tensors without bytes.
    """
    vae, tiny = networks.vae, networks.tiny
    assert vae is not None
    pixels = math.prod(frames_shape(config, vae))
    latents = config.window.frames_per_block * math.prod(config.latent_shape)
    block = pixels + latents * torch.float32.itemsize
    try:
        ops = load_ops("torch")
        state = RolloutState(config, ops, device=_META, dtype=networks.dtype, float8_layers=networks.float8_layers)
        shapes = vae_decoder_shapes(vae) if tiny is None else tiny_decoder_shapes(tiny.config)
        tensors = {name: torch.empty(shape, device=_META) for name, shape in shapes.items()}
        history = networks.make_decoder(tensors, ops, _META).new_state(
            config.latent_height, config.latent_width, config.window.frames_per_block
        )
        made = [*vars(state).values(), *vars(state.rope).values(), *history.buffers().values()]
        kept = sum(value.nbytes for value in made if isinstance(value, Tensor))
    except RuntimeError as error:
        if "overflow" not in str(error):  # of a tensor with more bytes than torch can count
            raise
        kept = _UNCOUNTED
    return kept + block + pixels * networks.vae_dtype.itemsize, depth * block


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
