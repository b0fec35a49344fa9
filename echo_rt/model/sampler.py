"""The few-step flow schedule: timesteps and sigmas (arXiv 2606.04527; the shift is that of Wan2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.config import SamplerConfig


class Schedule:
    """The timesteps of a block's passes and the sigmas of its steps, computed once.

    ``timesteps``: one for each denoising step and, last, the one of the context pass.
    ``sigmas``: float64 ``[steps, 2]`` on ``device``: sigma of the step and of the one after it (0 after the last).
    """

    def __init__(self, config: SamplerConfig, device: torch.device) -> None:
        # The published schedule is a float32 table; its rounding is kept, since what follows is sensitive to t.
        u = torch.tensor(config.denoising_steps, dtype=torch.float64, device="cpu") / config.num_train_timesteps
        sigmas = (config.timestep_shift * u / (1 + (config.timestep_shift - 1) * u)).float()
        timesteps: list[float] = (config.num_train_timesteps * sigmas).tolist()
        self.timesteps = [*timesteps, float(config.context_timestep)]
        following = torch.cat((sigmas[1:], sigmas.new_zeros(1)))
        self.sigmas: Tensor = torch.stack((sigmas, following), dim=1).to(device, torch.float64)

    @property
    def steps(self) -> int:
        """Denoising steps of a block; the index of the context pass in ``timesteps``."""
        return len(self.timesteps) - 1
