"""Checks of a VAE decoder that need no expected tensors: its frames in other precisions and in other groupings.

Two videos ``[F, H, W, C]``, clamped to [-1, 1], differ as a viewer sees them: by PSNR and SSIM, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.engine.build import fit_decoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.ops.schema import Ops
from echo_rt.options import VAE_DTYPE_NAMES
from echo_rt.utils.device import DTYPES, model_context
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.tensors import FingerprintedTensors

GROUPS = (1, 2, 3, 5)  # latents per call
MIXED = (1, 3, 2, 5)  # latents of successive calls
# For a model folder: enough latents to call each group more than once, and frames (width, height in pixels) that are
# large enough for SSIM's window and small enough for released weights on a CPU.
_LATENTS = sum(MIXED)
_SIZE = (64, 48)
# Window in pixels and constants of SSIM as published (Wang et al. 2004).
SSIM_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all frames, pixels and channels; infinite for equal videos, NaN if a
    value is NaN.
    """
    mean = _over_frames(lambda x, y: (x - y).square().mean(), video, reference)
    return math.inf if mean == 0 else -10 * math.log10(mean)


def ssim(video: Tensor, reference: Tensor) -> float | None:
    """Structural similarity, the mean over frames, channels and positions of an 11x11 Gaussian window; symmetric.

    1 for equal videos, None for frames smaller than the window.
    """
    return None if min(video.shape[1:3]) < SSIM_WINDOW else _over_frames(_frame_ssim, video, reference)


def _over_frames(measure: Callable[[Tensor, Tensor], Tensor], video: Tensor, reference: Tensor) -> float:
    frames = [measure(_wide(one), _wide(other)) for one, other in zip(video, reference, strict=True)]
    return float(torch.stack(frames).mean())


def _wide(frame: Tensor) -> Tensor:
    """``[H, W, C]`` as ``[C, 1, H, W]`` in float64, 0 for black and 1 for white."""
    return (frame.double().movedim(-1, 0).unsqueeze(1).clamp(-1, 1) + 1) / 2


def _frame_ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    steady_mean, steady_contrast = _K1**2, _K2**2  # of a range of 1
    luminance = (2 * mean_x * mean_y + steady_mean) / (mean_x**2 + mean_y**2 + steady_mean)
    contrast = (2 * covariance + steady_contrast) / (variance_x + variance_y + steady_contrast)
    return (luminance * contrast).mean()


def _windowed(x: Tensor) -> Tensor:
    """Gaussian means over the window at all positions inside the frame, as two 1-D passes."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return functional.conv2d(functional.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


@dataclass(frozen=True)
class Precision:
    """How close a video decoded in ``dtype`` is to the same one decoded in float32: :func:`psnr`, :func:`ssim`."""

    dtype: str
    psnr: float
    ssim: float | None


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
        reference, *others = (self.video(DTYPES[name], one_by_one) for name in VAE_DTYPE_NAMES)  # the first is float32
        return tuple(
            Precision(name, psnr(video, reference), ssim(video, reference))
            for name, video in zip(VAE_DTYPE_NAMES[1:], others, strict=True)
        )

    def in_groups(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode all latents in one call, and in each grouping, by name."""
        latents = len(self.latents)
        groupings = {f"in groups of {n}": [min(n, latents - at) for at in range(0, latents, n)] for n in GROUPS}
        groupings["in mixed groups"] = list(MIXED)
        at_once = self.video(dtype, [latents])
        return at_once, {name: self.video(dtype, groups) for name, groups in groupings.items()}


def folder_decoding(folder: Path, ops: Ops, device: torch.device) -> Decoding:
    """The VAE of a model folder and a few random latents; raises the errors of reading the folder."""
    model = ModelFolder.open(folder)
    config = model.vae.config()
    width, height = (pixels // config.spatial_stride for pixels in _SIZE)
    latents = torch.empty(_LATENTS, config.z_dim, height, width, device="cpu")
    fill_normal(latents, 0, 0, seed_words(0))
    tensors = FingerprintedTensors(model.vae.tensors(), f"{folder} (VAE)")
    return Decoding(config, tensors, ops, device, latents.to(device))
