"""A video or a picture that a stream begins with: checked, resized, encoded to latents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.prompts import check_dense
from echo_rt.errors import ConfigError, NumericalError, WeightsError
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.options import CROP, FITS, MOST_INITIAL_SECONDS, is_path
from echo_rt.recipes import RECIPES
from echo_rt.utils.device import give_memory_back, model_context
from echo_rt.utils.wording import counted, type_of
from echo_rt.weights.folder import ModelFolder

Frames = Tensor | NDArray[np.uint8]
InitialVideo = Frames | Iterable[Frames]
"""Frames uint8 ``[F, H, W, 3]`` RGB, whole or as an iterable of pieces."""


def check_whole_blocks(frames: int, frames_per_block: int, vae: VaeConfig) -> None:
    """Raise :class:`ConfigError` unless a number of frames is that of whole blocks of latent frames."""
    latents = 1 + (frames - 1) // vae.temporal_stride if frames else 0
    below, above = (vae.video_frames(frames_per_block * (latents // frames_per_block + more)) for more in (0, 1))
    if frames == below > 0:
        return
    message = (
        f"an initial video must fill blocks of {counted(frames_per_block, 'latent frame')}: "
        f"expected {f'{below} or {above}' if below else above} frames, got {frames}"
    )
    if frames == 1:
        recipes = ", ".join(name for name, recipe in RECIPES.items() if recipe.facts["frames_per_block"] == 1)
        message += f"; a picture begins a video only where a block is 1 latent frame, as in the recipes {recipes}"
    raise ConfigError(message)


class InitialVideoEncoder:
    """The VAE encoder of a model folder, loaded for each video and released after it.

    ``vae``: the VAE of the model's latents; ``dtype``: what it encodes in. Without a folder there is no encoder.
    """

    def __init__(
        self, folder: ModelFolder | None, config: ModelConfig, vae: VaeConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._folder, self._vae, self._device, self._dtype = folder, vae, device, dtype
        self._block = config.window.frames_per_block
        self._height = config.latent_height * vae.spatial_stride
        self._width = config.latent_width * vae.spatial_stride

    def check(
        self, video: InitialVideo | None, fit: str | None = None, included: bool = True, latents: Tensor | None = None
    ) -> None:
        """Check a video without encoding it; :class:`ConfigError` for one that the model cannot begin with.

        Pieces of an iterable are checked as they are read. ``latents``: given in place of a video, or None.
        """
        if fit not in (None, *FITS):
            raise ConfigError(f"fit must be {' or '.join(map(repr, FITS))}, or None; got {fit!r}")
        if not isinstance(included, bool):
            raise ConfigError(f"include_initial must be True or False, got {included!r}")
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise ConfigError(f"initial_latents must be a tensor or None, got {type_of(latents)}")
            if video is not None:
                raise ConfigError("give an initial_video or initial_latents, one of the two; got both")
            check_dense(latents, "initial_latents", ConfigError)
        elif video is None and not included:
            raise ConfigError("include_initial is about an initial_video: expected one, got None")
        if video is None and fit is not None:
            raise ConfigError("fit is about an initial_video: expected one, got None")
        if isinstance(video, (Tensor, np.ndarray)):
            self._check_frames(video, fit)
            self._check_count(len(video), whole=True)
        elif isinstance(video, (str, bytes, os.PathLike)) or not isinstance(video, Iterable | None):
            raise ConfigError(
                f"initial_video must be frames, uint8 [F, H, W, 3], or an iterable of such pieces; got {type_of(video)}"
                + ("; for a file, give echo_rt.output.VideoFile(path)" if is_path(video) else "")
            )

    def _check_count(self, frames: int, whole: bool) -> None:
        """Raise :class:`ConfigError` for too many frames; if they are the ``whole`` video, unless they fill blocks."""
        most = MOST_INITIAL_SECONDS * self._vae.frame_rate
        if frames > most:
            raise ConfigError(
                f"an initial video may have {most} frames at most, {MOST_INITIAL_SECONDS} s at "
                f"{self._vae.frame_rate} fps; got {frames} or more"
            )
        if whole:
            check_whole_blocks(frames, self._block, self._vae)

    def _check_frames(self, frames: Frames, fit: str | None) -> None:
        if not isinstance(frames, (Tensor, np.ndarray)):
            raise ConfigError(f"initial_video: expected pieces that are tensors or arrays, got {type_of(frames)}")
        shape = list(frames.shape)
        if frames.dtype not in (torch.uint8, np.uint8) or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
            kind = str(frames.dtype).removeprefix("torch.")
            raise ConfigError(f"initial_video: expected frames uint8 [F, H, W, 3], got {kind} {shape}")
        _, height, width, _ = shape
        if fit is None and (height, width) != (self._height, self._width):
            raise ConfigError(
                f"initial_video: expected frames of {self._width}x{self._height} pixels, got {width}x{height}; "
                f"fit={' or fit='.join(map(repr, FITS))} (on the command line --fit) scales them"
            )

    def encode(self, video: InitialVideo, fit: str | None = None) -> Tensor:
        """Encode a video that :meth:`check` has passed to normalized latents float32 ``[frames, C, h, w]``.

        On the host. Other memory does not grow with the video. Raises :class:`ConfigError` for frames of another size,
        :class:`WeightsError` where the VAE is missing, :class:`NumericalError` where its dtype overflows.
        """
        with model_context(self._device, self._dtype):
            try:
                latents = self._encode(video, fit)
            finally:
                give_memory_back(self._device)
        if not bool(torch.isfinite(latents).all()):
            raise NumericalError("the latents of the initial video are NaN or infinite; vae_dtype float32 may help")
        return latents

    def _encode(self, video: InitialVideo, fit: str | None) -> Tensor:
        encoder = self._load()
        state = encoder.new_state(self._height, self._width)
        return torch.cat([encoder.encode_next(group, state).cpu() for group in self._groups(video, fit)])

    def _load(self) -> VaeEncoder:
        if self._folder is None:
            raise ConfigError("expected no initial_video: this model has no folder with a VAE that encodes one")
        try:
            config, tensors = self._folder.vae.config(), self._folder.vae.tensors()
        except WeightsError as error:
            raise WeightsError(f"an initial video is encoded by the model's own VAE: {error}") from None
        expected, found = _latents_of(self._vae), _latents_of(config)
        if found != expected:  # possible beside a tiny decoder
            raise ConfigError(
                f"{self._folder.path}: expected a VAE of the decoder's latents, with channels, strides, means and "
                f"deviations {expected}; found {found}"
            )
        return VaeEncoder(config, tensors, device=self._device, dtype=self._dtype)

    def _groups(self, video: InitialVideo, fit: str | None) -> Iterator[Tensor]:
        """Yield frames for the encoder, ``[n, 3, H, W]`` in [-1, 1]: the first alone, then a group for each latent."""
        held: list[Tensor] = []
        count = 0
        for count, frame in enumerate(self._frames(video, fit), 1):
            held.append(frame)
            self._check_count(count, whole=False)
            if count == 1 or len(held) == self._vae.temporal_stride:
                yield self._fitted(torch.stack(held), fit)
                held.clear()
        self._check_count(count, whole=True)

    def _frames(self, video: InitialVideo, fit: str | None) -> Iterator[Tensor]:
        """Yield the frames one by one, ``[H, W, 3]``."""
        for piece in [video] if isinstance(video, (Tensor, np.ndarray)) else video:
            self._check_frames(piece, fit)
            for frame in piece:
                # Arrays are copied: they may be read-only or have negative strides.
                yield frame if isinstance(frame, Tensor) else torch.tensor(np.ascontiguousarray(frame), device="cpu")

    def _fitted(self, frames: Tensor, fit: str | None) -> Tensor:
        x = frames.to(self._device).permute(0, 3, 1, 2).float()
        height, width = x.shape[2:]
        if (height, width) != (self._height, self._width):
            ratios = self._height / height, self._width / width
            ratio = max(ratios) if fit == CROP else min(ratios)
            rows, columns = max(1, round(height * ratio)), max(1, round(width * ratio))
            x = functional.interpolate(x, (rows, columns), mode="bicubic", antialias=True).clamp_(0, 255)
            # Negative padding crops.
            above, left = (self._height - rows) // 2, (self._width - columns) // 2
            x = functional.pad(x, (left, self._width - columns - left, above, self._height - rows - above))
        return x / 127.5 - 1


def _latents_of(vae: VaeConfig) -> tuple[object, ...]:
    """What VAEs with the same latents have in common."""
    return vae.z_dim, vae.spatial_stride, vae.temporal_stride, vae.latents_mean, vae.latents_std
