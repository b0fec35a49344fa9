"""The few-step flow schedule: timesteps and sigmas (arXiv 2606.04527; the shift is that of Wan2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from echo_rt.config import SamplerConfig


class Schedule:
    """The timesteps of all passes and the sigmas of all denoising steps, computed once.

    ``timesteps``: those of the denoising steps, then those of the first block where it has steps of its own, and last,
    at ``context``, the one of the context pass.
    ``sigmas``: float64 ``[denoising steps, 2]`` on ``device``, in the same order: sigma of the step and of the one
    after it in its block (0 after the last).
    """

    def __init__(self, config: SamplerConfig, device: torch.device) -> None:
        self._usual = range(len(config.denoising_steps))
        self._first = range(len(self._usual), len(self._usual) + len(config.first_block_steps)) or self._usual
        pairs = torch.cat([_sigmas(config, steps) for steps in (config.denoising_steps, config.first_block_steps)])
        self.timesteps: list[float] = (config.num_train_timesteps * pairs[:, 0]).tolist()
        self.timesteps.append(float(config.context_timestep))
        self.context = len(self.timesteps) - 1
        self.sigmas: Tensor = pairs.to(device, torch.float64)

    def steps(self, first: bool) -> range:
        """Where the denoising steps of a block are in ``timesteps`` and ``sigmas``; ``first``: of the first block."""
        return self._first if first else self._usual


def _sigmas(config: SamplerConfig, steps: Sequence[int]) -> Tensor:
    """float32 ``[steps, 2]``: sigma of each step and of the next."""
    # The published schedule is a float32 table; its rounding is kept, since what follows is sensitive to t.
    u = torch.tensor(steps, dtype=torch.float64, device="cpu") / config.num_train_timesteps
    sigmas = (config.timestep_shift * u / (1 + (config.timestep_shift - 1) * u)).float()
    return torch.stack((sigmas, pad(sigmas, (0, 1))[1:]), dim=1)
