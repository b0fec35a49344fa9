"""What others' own code takes for a part of the same work, where it is installed. Each says what is compared.

``echo-rt bench`` finds it here where it runs from a checkout; nothing of it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_rt.bench.run import BASELINES
from echo_rt.bench.runner import median_p99
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.build import Networks
from echo_rt.errors import BackendError
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.utils.device import model_context
from echo_rt.utils.wording import with_type
from echo_rt.verify.bundles import bound_between, relative_error
from echo_rt.weights.shapes import names_of, vae_modules

if str(Path(__file__).parent) not in sys.path:  # echo-rt bench loads this file alone
    sys.path.append(str(Path(__file__).parent))

from timing import timer_for

# Others round after every operation, where ours keeps some of them in one: their 16-bit results lie further off.
ROUNDINGS = 4
# FlashDreams runs two times as it is before it captures its graph, and once more is a replay.
_CALLS_TO_CAPTURE = 4


@dataclass(frozen=True)
class Baseline:
    """Another's decoder. ``call`` decodes a block."""

    name: str
    what: str
    call: Callable[[], object]
    error: float
    bound: float
    device: torch.device
    seconds: list[float] = field(default_factory=list)  # of each call that was timed

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not

    def measure(self, calls: int) -> None:
        """Time ``calls`` calls, by the timer of kernels: launches are not in it."""
        self.seconds.extend(each / 1e6 for each in timer_for(self.device).measure(self.call, calls, warmup=1))

    def row(self, ours_ms: float | None) -> dict[str, Any]:
        """Its row beside our time. ``ratio``: its time over ours."""
        row = {"peer": self.name, "ours_ms": ours_ms, "error": self.error, "what": self.what}
        if not self.ok:
            return row | {"what": f"not timed, as it differs from ours by more than {self.bound:.1e}; {self.what}"}
        if not self.seconds:
            return row
        ms, p99 = (1e3 * each for each in median_p99(self.seconds))
        return row | {"ms": ms, "p99_ms": p99, "ratio": None if ours_ms is None else ms / ours_ms}


def find_baselines(networks: Networks, seed: int) -> tuple[list[Baseline], dict[str, str]]:
    """The baselines that are installed, and why each other one is not in the run.

    They have the weights of ``networks``, whose backend they are held against. Whatever another's code raises is the
    reason why it is not in the run; memory that is not there is not its fault.
    """
    found: list[Baseline] = []
    missing: dict[str, str] = {}
    normalized, bound = first_noise(networks.config, networks.device, seed), ROUNDINGS * bound_between(networks.dtype)
    for name, make in _MAKERS.items():  # a function that decodes one more block ``[F, H, W, 3]``, and how it does
        try:
            with model_context(networks.device, networks.dtype):
                assert networks.vae is not None
                call, what = make(networks.vae, networks.tensors.vae, normalized, networks.dtype)
                call()  # begins the stream
                error = _decode_error(networks, normalized, call(), clamped=make is _flashdreams)
                for _ in range(_CALLS_TO_CAPTURE):
                    call()
            how = f"with the same weights, over the same {len(normalized)} latents in mid-stream"
            found.append(Baseline(name, f"its decoder, {how}; {what}", call, error, bound, networks.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the finding, whatever it is
            missing[name] = str(error) if isinstance(error, BackendError) else f"did not run: {with_type(error)}"
    return found, missing


def _require(package: str, module: str | None = None) -> Any:
    """Import ``module`` of ``package``, or all of it."""
    if importlib.util.find_spec(package) is None:
        raise BackendError(f"{package} is not installed: pip install {package}")
    return importlib.import_module(module or package)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> None:
    """The weights of our model into another's, under ``names``; one that it lacks is a ``KeyError``."""
    targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        target = targets[name if names is None else names[name]]
        target.copy_(tensor.reshape(target.shape))


def first_noise(config: ModelConfig, device: torch.device, seed: int = 0) -> Tensor:
    """The noise of block 0 as a rollout draws it, ``[B, C, h, w]`` float32 on the device."""
    noise = torch.empty(config.window.frames_per_block, *config.latent_shape, device="cpu")
    fill_normal(noise, 0, 0, seed_words(seed))
    return noise.to(device)


def _of_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[key] for key in tensors if key.startswith(("decoder.", "conv2."))}


def _sizes(config: VaeConfig) -> dict[str, Any]:
    """Of a VAE, as others name them."""
    same = {name: getattr(config, name) for name in ("base_dim", "z_dim", "dim_mult", "num_res_blocks")}
    return same | {"temperal_downsample": config.temporal_downsample}


def _decode_error(networks: Networks, normalized: Tensor, video: Tensor, *, clamped: bool) -> float:
    """Relative error of ``video [F, H, W, 3]``, of a block that comes after the same latents, against ours."""
    decoder: Any = networks.decoder
    state = decoder.new_state(*networks.config.latent_shape[1:], latents=1)
    decoder.decode(normalized, state)
    ours = decoder.decode(normalized, state).float()
    return relative_error(video.float(), ours.clamp(-1, 1) if clamped else ours)


class WanAutoencoder:
    """diffusers' ``AutoencoderKLWan`` with our decoder's weights, which decodes the same latents over and over.

    ``normalized``: float32 ``[T, z, h, w]``. Raises :class:`BackendError` where diffusers is not installed.
    """

    def __init__(self, config: VaeConfig, tensors: Mapping[str, Tensor], normalized: Tensor, dtype: torch.dtype):
        diffusers = _require("diffusers")
        with torch.device(normalized.device):
            sizes = _sizes(config) | {"latents_mean": config.latents_mean, "latents_std": config.latents_std}
            lists = {name: list(size) if isinstance(size, tuple) else size for name, size in sizes.items()}
            vae = diffusers.AutoencoderKLWan(**lists).to(dtype).requires_grad_(requires_grad=False)
            mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        fill(vae, _of_decoder(tensors), names_of(vae_modules(config)))
        vae.clear_cache()
        vae.encoder = None  # it takes no part, and would be counted among the bytes
        self._vae, self._cache = vae, vae._feat_map
        self._latents = (normalized * std + mean).transpose(0, 1)[None].to(dtype)

    def block(self) -> Tensor:
        """Decode them as the next of the stream, one at a time: the video ``[F, H, W, 3]``."""
        frames = []
        for latent in self._vae.post_quant_conv(self._latents).split(1, 2):
            starts = {"first_chunk": True} if self._cache[0] is None else {}
            frames.append(self._vae.decoder(latent, feat_cache=self._cache, feat_idx=[0], **starts))
        return torch.cat(frames, 2)[0].permute(1, 2, 3, 0)

    @property
    def state_bytes(self) -> int:
        """What it keeps of the stream."""
        return sum(tensor.nbytes for tensor in self._cache if isinstance(tensor, Tensor))


def _autoencoder(
    config: VaeConfig, tensors: Mapping[str, Tensor], normalized: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], str]:
    what = "its own cache kept from call to call; without the conversion to bytes, which ours does"
    return WanAutoencoder(config, tensors, normalized, dtype).block, what


def _flashdreams(
    config: VaeConfig, tensors: Mapping[str, Tensor], normalized: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], str]:
    module = _require("flashdreams", "flashdreams.recipes.wan.autoencoder.vae")
    with tempfile.TemporaryDirectory() as folder:  # it takes weights from a file alone
        path = Path(folder) / "vae.safetensors"
        save_file({key: t.to("cpu", dtype).contiguous() for key, t in _of_decoder(tensors).items()}, path)
        vae: Any = module.WanVAE(
            str(path),
            use_cuda_graph=normalized.is_cuda,
            use_compile=False,
            enable_encoder=False,
            latent_mean=config.latents_mean,
            latent_std=config.latents_std,
            **_sizes(config),
        )
        vae.to(normalized.device, dtype)
    latents, cache = normalized.transpose(0, 1)[None].to(dtype), vae.prepare_cache()
    what = "in one call, its own cache kept, its own graph replayed; without the conversion to bytes"
    return lambda: vae.decode(latents, cache=cache)[0].permute(1, 2, 3, 0), what


_MAKERS = dict(zip(BASELINES, (_autoencoder, _flashdreams), strict=True))
