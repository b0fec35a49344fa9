"""Train the VAE's two halves apart: the decoder on the world's latents, then the encoder to reproduce them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import load, save
from training.latents import FRAMES, PATCH, World
from training.optimizer import MuonAndAdam
from training.vae import decode, encode, initial_decoder, initial_encoder
from training.world import DAY, render

DECODER_STEPS, ENCODER_STEPS = 4000, 900
_CLIPS = 4
_LATENTS = (3, 5)  # of a clip: two lengths, so that more than one step in time is seen from zeros
_CROP = (6, 7)  # latent pixels, rows and columns
_MOST_NOISE = 0.2
_BY_ADAM = ("decoder.head.2.weight", "encoder.head.2.weight")


Loss = Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor]]


def train_decoder(world: World, folder: Path, *, steps: int = DECODER_STEPS) -> dict[str, Tensor]:
    """Train with L1 and squared error, and noise on the latents in the second half; return the weights."""

    def loss(weights: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        latents, video = _batch(world, random.Random(f"decoder {step}"), noisy=2 * step > steps)
        error = decode(weights, latents) - video
        squared = error.square().mean()
        return 4 * squared + error.abs().mean(), squared / 4  # of pixels in 0 .. 1

    return _train(initial_decoder(), folder / "decoder.pt", steps, loss)


def train_encoder(world: World, folder: Path, *, steps: int = ENCODER_STEPS) -> dict[str, Tensor]:
    """Train to return the world's latents of a video; return the weights."""

    def loss(weights: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        latents, video = _batch(world, random.Random(f"encoder {step}"), noisy=False)
        squared = (encode(weights, video) - latents).square().mean()
        return squared, squared

    return _train(initial_encoder(), folder / "encoder.pt", steps, loss)


def _train(weights: dict[str, Tensor], path: Path, steps: int, loss: Loss, every: int = 50) -> dict[str, Tensor]:
    """Train ``weights`` for ``steps``, going on from ``path``; ``loss`` also gives the error to print."""
    for tensor in weights.values():
        tensor.requires_grad_()
    optimizer = MuonAndAdam(weights, muon_rate=0.005, adam_rate=1e-3, adam=_BY_ADAM)
    began, total = time.monotonic(), 0.0
    for step in range(load(path, weights, optimizer), steps):
        value, error = loss(weights, step)
        value.backward()
        optimizer.step(_rate(step / steps))
        total += float(error.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            decibels = -10 * math.log10(total / every)
            print(f"{path.stem} {step + 1}/{steps}  {decibels:.2f} dB  {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
            save(path, weights, optimizer, step + 1)
    return {name: tensor.detach() for name, tensor in weights.items()}


def _rate(part: float) -> float:
    return min(1.0, part / 0.02 + 0.05) * (1.0 if part < 0.6 else max(0.02, (1 - part) / 0.4))


def _batch(world: World, chance: random.Random, *, noisy: bool) -> tuple[Tensor, Tensor]:
    """Return latents ``[N, C, T, h, w]`` and their video ``[N, 3, F, H, W]`` in [-1, 1], cropped alike.

    A clip begins with a latent of one frame wherever it begins, as the decoder's stream does.
    """
    count = chance.choice(_LATENTS)
    pairs = []
    for _ in range(_CLIPS):
        scene = world.scenes[chance.randrange(len(world.scenes))]
        first = chance.randrange(DAY)
        video = render([scene] * (1 + FRAMES * (count - 1)), first)
        latents = world.code.encode(video)
        top = chance.randrange(latents.shape[2] - _CROP[0] + 1)
        left = chance.randrange(latents.shape[3] - _CROP[1] + 1)
        rows, columns = slice(top, top + _CROP[0]), slice(left, left + _CROP[1])
        pixels = [slice(PATCH * part.start, PATCH * part.stop) for part in (rows, columns)]
        pairs.append((latents[:, :, rows, columns].transpose(0, 1), video[:, pixels[0], pixels[1]].permute(3, 0, 1, 2)))
    latents, video = (torch.stack(part) for part in zip(*pairs, strict=True))
    if noisy:
        latents = latents + _MOST_NOISE * chance.random() * torch.randn_like(latents)
    return latents, 2 * video - 1
