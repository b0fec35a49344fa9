"""What the pipeline asks of a decoder, whichever it is."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor


class DecoderState(Protocol):
    """What a decoder remembers of one stream. All its tensors keep their addresses."""

    latents_seen: int

    def tensors(self) -> dict[str, Tensor]:
        """All that a stream needs to go on, beside ``latents_seen``, by name; live views."""

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that outlives a call, by name."""

    def reset(self) -> None:
        """Back to the start of a stream, in place."""


S = TypeVar("S", bound=DecoderState)


class VideoDecoder(Protocol[S]):
    """Latents to frames, a few at a time. The decoder has no state of its own: ``S`` is that of a stream."""

    def new_state(self, latent_height: int, latent_width: int, latents: int) -> S:
        """The state of a new stream of latents of this size, of which up to ``latents`` are decoded in one go."""

    def decode(self, latents: Tensor, state: S) -> Tensor:
        """The next ``latents [T, z, h, w]`` (normalized, any float dtype) as video ``[F, H, W, 3]``.

        The video is nominally in [-1, 1] and is not clamped. Raises :class:`ConfigError` for latents that are not of
        the state's size.
        """

    def decode_next(self, latents: Tensor, state: S, *, is_start: bool) -> Tensor:
        """:meth:`decode` without its checks and its count, so without anything that a captured graph could not do."""
