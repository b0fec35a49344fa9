"""The latents of the world: a linear code of 8x8 pixels x 4 frames, found in closed form (PCA).

Generation never needs an encoder, so none has to be trained first: the principal components of the world's own patches
are the channels, the decoder learns to invert them, and an encoder in Wan's architecture learns to reproduce them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from training.world import BALLOON_COLOURS, DAY, LANES, OBJECT_COLOURS, PLACES, SHAPES, STARTS, Scene, render

PATCH, FRAMES, CHANNELS = 8, 4, 16  # pixels a side, frames, channels of a latent pixel
DAY_LATENTS = DAY // FRAMES

# Components that vary little keep a small spread: at unit spread they would only be noise to learn.
_LEAST_SPREAD = 0.18


@dataclass(frozen=True)
class LinearCode:
    """Latents are ``(x - mean) @ basis / scale``: ``mean [D]``, ``basis [D, CHANNELS]``, ``scale [CHANNELS]``."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Encode ``[1 + 4n, H, W, 3]``, or ``[4n, H, W, 3]`` from the middle of a video, to ``[T, C, h, w]``."""
        if len(video) % FRAMES:
            video = torch.cat((video[:1].expand(FRAMES - 1, -1, -1, -1), video))
        patches = _patches(video)
        coded = (patches - self.mean) @ self.basis / self.scale
        return coded.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``[T, C, h, w]`` to ``[4T, H, W, 3]``: what a linear decoder can do."""
        x = (latents.permute(0, 2, 3, 1) * self.scale) @ self.basis.T + self.mean
        x = x.unflatten(-1, (FRAMES, PATCH, PATCH, 3)).permute(0, 3, 1, 4, 2, 5, 6)
        return x.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _patches(video: Tensor) -> Tensor:
    """``[4T, H, W, 3]`` to ``[T, h, w, 4·8·8·3]``."""
    x = video.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).unflatten(0, (-1, FRAMES))
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3)


def all_scenes(colours: Iterable[str] = OBJECT_COLOURS) -> list[Scene]:
    """Return every scene of the world whose object has one of ``colours``, in a fixed order."""
    choices = itertools.product(colours, SHAPES, PLACES, BALLOON_COLOURS, range(len(LANES)), range(STARTS))
    return [Scene(*choice) for choice in choices]


def fit_code(scenes: Sequence[Scene], count: int = 96) -> LinearCode:
    """Fit the code to days of ``count`` random scenes."""
    chosen = random.Random(0).sample(list(scenes), count)
    patches = torch.cat([_patches(render([scene] * DAY)).flatten(0, 2) for scene in chosen])
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    basis = vectors[:, -CHANNELS:].flip(1)
    spread = values[-CHANNELS:].flip(0).clamp(min=0).sqrt()
    return LinearCode(mean, basis, spread.clamp(min=_LEAST_SPREAD))


@dataclass(frozen=True)
class World:
    """All scenes and their latents ``table [scenes, 1 + DAY_LATENTS, C, h, w]``: the first frame's, then a day's.

    ``calm``: the same of days on which the balloon stays down, for each object and place, where they are needed.
    """

    code: LinearCode
    scenes: list[Scene]
    table: Tensor
    calm: Tensor | None = None

    def clip(self, scene: int, first: int, count: int, calm_days: Container[int] = ()) -> Tensor:
        """Latents ``first .. first + count - 1`` of a scene's video, ``[count, C, h, w]``."""
        latents = self.of(self.table, scene, first, count)
        if self.calm is not None:
            balloons, starts = len(BALLOON_COLOURS) * len(LANES), STARTS
            row = scene // (balloons * starts) * starts + scene % starts
            is_calm = torch.tensor([(n - 1) // DAY_LATENTS in calm_days for n in range(first, first + count)])
            latents = torch.where(is_calm.view(-1, 1, 1, 1), self.of(self.calm, row, first, count), latents)
        return latents

    def with_calm_days(self) -> World:
        """Return this world with the latents of calm days, which are computed now (a minute)."""
        calm = [replace(scene, balloon=None) for scene in self.scenes if _first_balloon(scene)]
        return replace(self, calm=torch.stack([self.code.encode(render([scene] * (1 + DAY))) for scene in calm]))

    @staticmethod
    def of(table: Tensor, scene: int, first: int, count: int) -> Tensor:
        """The same rows of another table of all scenes."""
        return table[scene, _table_rows(first, count)]


def _first_balloon(scene: Scene) -> bool:
    return scene.balloon == next(iter(BALLOON_COLOURS)) and scene.lane == 0


def _table_rows(first: int, count: int) -> list[int]:
    # Latent n > 0 covers frames 4n-3 .. 4n, so the day's rows begin with that of frames 1 .. 4.
    return [0 if n == 0 else 1 + (n - 1) % DAY_LATENTS for n in range(first, first + count)]


def open_world(path: Path, colours: Collection[str] = OBJECT_COLOURS) -> World:
    """Load the latents of the world from ``path``, or compute them once (minutes) and save them there."""
    named, scenes = list(colours), all_scenes(colours)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved.get("colours") == named:
            return World(LinearCode(**saved["code"]), scenes, saved["table"])
    code = fit_code(all_scenes())
    table = torch.stack([code.encode(render([scene] * (1 + DAY))) for scene in scenes])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"code": vars(code), "colours": named, "table": table}, path)
    return World(code, scenes, table)
