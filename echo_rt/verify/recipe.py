"""A bundle of a recipe: files as they are published, through the public loader and a stream of the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.ops.backends import Backend, load_ops
from echo_rt.runtime import Runtime
from echo_rt.weights.choice import Taken


@dataclass(frozen=True)
class RecipeBundle:
    """``config`` and ``inputs`` of the bundle in ``folder``."""

    folder: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor]

    def latents(
        self,
        blocks: int,
        switches: Sequence[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None,
        graphs: bool | None,
        float8_except: Sequence[str],
    ) -> tuple[dict[str, Tensor], Backend, Taken]:
        """``latents.b`` of the first ``blocks``, with the prompts of ``switches``; the backend, and what was taken."""
        initial = self.inputs.get("initial_latents")
        stride = VaeConfig().spatial_stride
        shape = self._input("noise.0").shape
        if len(shape) != 4:
            raise WeightsError(f"{self.folder}: expected noise.0 with 4 dimensions, got {list(shape)}")
        *_, rows, columns = shape
        with (
            Runtime.from_pretrained(
                self._path("model"),
                checkpoint=self._path("checkpoint"),
                lora=None if self.config.get("lora") is None else self._path("lora"),
                recipe=self.config["recipe"],
                overrides=self.config.get("overrides"),
                width=stride * columns,
                height=stride * rows,
                device=device,
                dtype=dtype,
                backend=backend,
                graphs=graphs,
                float8_except=float8_except,
            ) as runtime,
            runtime.stream(
                prompt_embeds=self._input("prompt_embeds.0"),
                noise=self._noise,
                initial_latents=initial,
                include_initial=initial is None,
            ) as stream,
        ):
            given = stream.next_block  # of its blocks' numbers, which the bundle does not count
            for number, block in enumerate(switches, start=1):
                stream.set_prompt(prompt_embeds=self._input(f"prompt_embeds.{number}"), block=given + block)
            made = {f"latents.{block}": next(stream).latents for block in range(blocks)}
            return made, Backend(load_ops(runtime.backend), runtime.backend_reason), runtime.taken

    def _path(self, name: str) -> Path:
        """A file or folder of the bundle's, whose path is relative to the bundle."""
        path = self.config[name]
        if not isinstance(path, str):
            raise WeightsError(f"{self.folder}/config.json: expected {name} to be a path, got {path!r}")
        return self.folder / path

    def _noise(self, block: int, shape: tuple[int, ...]) -> Tensor:
        """The bundle's own noise ``[steps, B, C, h, w]`` of a block, in the place of the seed's."""
        names = [f"noise.{block}", *(f"renoise.{block}.{step}" for step in range(shape[0] - 1))]
        tensors = [self._input(name) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape != shape[1:]:
                raise WeightsError(f"{self.folder}: {name} has shape {tuple(tensor.shape)}, a block has {shape[1:]}")
        return torch.stack(tensors).float()

    def _input(self, name: str) -> Tensor:
        if name not in self.inputs:
            raise WeightsError(f"{self.folder}/inputs.safetensors: expected a tensor {name!r}, and it is not there")
        return self.inputs[name]
