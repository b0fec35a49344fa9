"""What the pipeline asks of a decoder, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError


class DecoderState:
    """What a decoder remembers of one stream: ``histories``, by name. All its tensors keep their addresses.

    ``latents_seen`` is the number of latents decoded so far. To go on bit for bit, copy it and :meth:`tensors` into a
    new state of the same size. At most ``max_latents`` of ``latent_shape`` are decoded at a time.
    """

    def __init__(self, histories: dict[str, Tensor], latent_shape: tuple[int, int, int], max_latents: int) -> None:
        self._histories, self.latent_shape, self.max_latents = histories, latent_shape, max_latents
        self.latents_seen = 0

    def tensors(self) -> dict[str, Tensor]:
        """All that a stream needs to go on, beside ``latents_seen``, by name; live views."""
        return dict(self._histories)

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that outlives a call, by name."""
        return self.tensors()

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers, in bytes."""
        return sum(tensor.nbytes for tensor in self.buffers().values())

    def reset(self) -> None:
        """Back to the start of a stream, in place."""
        for history in self._histories.values():
            history.zero_()
        self.latents_seen = 0


S = TypeVar("S", bound=DecoderState)


class VideoDecoder(ABC, Generic[S]):
    """Latents to frames. It holds no state of a stream (``S``), so one decoder serves any number of streams."""

    owner: str  # for messages

    @abstractmethod
    def new_state(self, latent_height: int, latent_width: int, latents: int) -> S:
        """Return the state of a new stream of latents of this size, decoded at most ``latents`` at a time."""

    @torch.no_grad()
    def decode(self, latents: Tensor, state: S) -> Tensor:
        """Decode the next ``latents [T, z, h, w]`` of a stream (normalized, any float dtype) to video ``[F, H, W, 3]``.

        The video has the decoder's dtype, is nominally in [-1, 1] and is not clamped. For Wan F is 4T, or 1 + 4(T-1)
        at the start of a stream. T may be any number. Raises :class:`ConfigError` for latents of another size than the
        state's.
        """
        if latents.dim() != 4 or len(latents) < 1 or latents.shape[1:] != state.latent_shape:
            sizes = ", ".join(map(str, state.latent_shape))
            expected = f"latents [T >= 1, {sizes}] (channels, height, width)"
            raise ConfigError(f"{self.owner}: expected {expected}, got {list(latents.shape)}")
        parts = []
        for part in latents.split(state.max_latents):
            parts.append(self.decode_next(part, state, is_start=state.latents_seen == 0))
            state.latents_seen += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def decode_next(self, latents: Tensor, state: S, *, is_start: bool) -> Tensor:
        """Decode as :meth:`decode` does, without its checks and its count, so that it can be captured in a graph."""


def latents_statistics(config: VaeConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and spread of latents before they are normalized, float32 ``[z]``."""
    mean, spread = torch.tensor((config.latents_mean, config.latents_std), device=device, dtype=torch.float32)
    return mean, spread
