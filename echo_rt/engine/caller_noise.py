"""Noise that a caller gives in the place of the seed's, so that a video can be compared with a published one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo_rt.errors import ConfigError
from echo_rt.utils.wording import plain, type_of

# (number of the generated block, [steps, B, C, h, w]) -> float32 of that shape: what the block begins with, then the
# fresh noise between its steps
CallerNoise = Callable[[int, tuple[int, ...]], Tensor]


def require_noise(noise: CallerNoise | None) -> None:
    """:class:`ConfigError` for what is neither None nor a function."""
    if noise is not None and not callable(noise):
        raise ConfigError(f"noise must be a function of a block and a shape, or None; got {noise!r}")


def noise_of(source: CallerNoise, block: int, shape: tuple[int, ...]) -> Tensor:
    """What ``source`` gives for ``block``, on the host; :class:`ConfigError` unless it is finite float32 ``shape``."""
    noise = source(block, shape)
    expected = f"noise for block {block}: expected a float32 tensor {list(shape)}"
    if not isinstance(noise, Tensor):
        raise ConfigError(f"{expected}, got {type_of(noise)}")
    if noise.dtype != torch.float32 or noise.shape != shape:
        raise ConfigError(f"{expected}, got {plain(noise.dtype)} {list(noise.shape)}")
    if noise.layout != torch.strided or noise.is_meta:
        raise ConfigError(f"{expected}, dense and with values, got {noise.layout} on {noise.device}")
    noise = noise.detach().cpu()
    if bad := int(torch.isfinite(noise).logical_not_().sum()):
        raise ConfigError(f"{expected} of finite values, got {bad} that are NaN or infinite")
    return noise
