"""Checks of a VAE decoder that need no expected tensors: its frames in other precisions and in other groupings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.engine.build import fit_decoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.ops.schema import Ops
from echo_rt.options import VAE_DTYPE_NAMES
from echo_rt.utils.device import DTYPES, model_context
from echo_rt.verify.metrics import Quality, compare_videos
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.folder import ModelFolder

GROUPS = (1, 2, 3, 5)  # latents per call
MIXED = (1, 3, 2, 5)  # latents of successive calls
# For a model folder: enough latents to call each group more than once, and frames (width, height in pixels) that are
# large enough for SSIM's window and small enough for released weights on a CPU.
_LATENTS = sum(MIXED)
_SIZE = (64, 48)


@dataclass(frozen=True)
class Precision:
    """How close a video decoded in ``dtype`` is to the same one decoded in float32."""

    dtype: str
    quality: Quality


@dataclass(frozen=True)
class Decoding:
    """A VAE, the ``ops`` of a backend, and the latents ``[T, z, h, w]`` to decode."""

    config: VaeConfig
    tensors: Mapping[str, Tensor]
    ops: Ops
    device: torch.device
    latents: Tensor

    def video(self, dtype: torch.dtype, groups: Sequence[int]) -> Tensor:
        """Decode all latents, ``groups`` latents per call, to ``[F, H, W, 3]`` float32 on the host."""
        with model_context(self.device, dtype):
            _, _, height, width = self.latents.shape
            decoder = VaeDecoder(self.config, self.tensors, self.ops, device=self.device, dtype=dtype)
            fit_decoder(decoder, (max(groups), height, width), self.ops)  # as a stream's would be
            state = decoder.new_state(height, width, max(groups))
            parts = [decoder.decode(part, state) for part in self.latents.split(list(groups))]
            return torch.cat(parts).float().cpu()

    def precisions(self) -> tuple[Precision, ...]:
        """Compare every selectable precision with float32, decoding one latent per call."""
        one_by_one = [1] * len(self.latents)
        reference = self.video(torch.float32, one_by_one)
        return tuple(
            Precision(name, compare_videos(self.video(DTYPES[name], one_by_one), reference))
            for name in VAE_DTYPE_NAMES
            if DTYPES[name] is not torch.float32
        )

    def in_groups(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode all latents in one call, and in each grouping, by name."""
        latents = len(self.latents)
        groupings = {f"in groups of {n}": [min(n, latents - at) for at in range(0, latents, n)] for n in GROUPS}
        groupings["in mixed groups"] = list(MIXED)
        at_once = self.video(dtype, [latents])
        return at_once, {name: self.video(dtype, groups) for name, groups in groupings.items()}


def folder_decoding(folder: Path, ops: Ops, device: torch.device, seed: int = 0) -> Decoding:
    """The VAE of a model folder and a few random latents; raises the errors of reading the folder."""
    model = ModelFolder.open(folder)
    config = model.vae_config()
    width, height = (pixels // config.spatial_stride for pixels in _SIZE)
    latents = torch.empty(_LATENTS, config.z_dim, height, width, device="cpu")
    fill_normal(latents, 0, 0, seed_words(seed))
    tensors = FingerprintedTensors(model.vae_tensors(), f"{folder} (VAE)")
    return Decoding(config, tensors, ops, device, latents.to(device))
