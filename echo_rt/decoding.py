"""Which decoder makes pictures of a model's latents, and how it goes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.errors import ConfigError
from echo_rt.loading import LoadedModel
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.model.video_decoder import VideoDecoder
from echo_rt.ops import Ops


@dataclass(frozen=True)
class DecoderOptions:
    """What a user may choose of the decoder; checked when made.

    ``dtype``: what it decodes in. ``tiles``: in how many bands of rows the VAE decodes its two highest resolutions.
    """

    dtype: torch.dtype
    tiles: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tiles, bool) or not isinstance(self.tiles, int) or self.tiles < 1:
            raise ConfigError(f"vae_tiles must be an integer of 1 or more, got {self.tiles!r}")


def make_decoder(
    loaded: LoadedModel,
    tensors: Mapping[str, Tensor],
    ops: Ops,
    options: DecoderOptions,
    *,
    device: torch.device,
) -> VideoDecoder[Any]:
    """The decoder of a loaded model, of its ``tensors``; :class:`ConfigError` for options that it does not have."""
    vae = loaded.folder.vae_config()
    if loaded.tiny_vae is None:
        return VaeDecoder(vae, tensors, ops, device=device, dtype=options.dtype, tiles=options.tiles)
    if options.tiles != 1:
        raise ConfigError(f"vae_tiles must be 1 for a tiny decoder, which needs little memory; got {options.tiles}")
    return TinyDecoder(loaded.tiny_vae.config, tensors, vae, device=device, dtype=options.dtype)
