"""Others' code beside ours: how it is called, and that what it cannot do ends nothing."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import baselines
import pytest
import torch
from baselines import Baseline, find_baselines
from safetensors.torch import load_file
from torch import Tensor

from echo_rt.bench import run as run_module
from echo_rt.bench import settings
from echo_rt.bench.run import open_model
from echo_rt.bench.settings import BenchModel, Request
from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.engine.build import Networks
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops import reference

CPU, FLOAT32 = torch.device("cpu"), torch.float32
SIZES = BenchModel(
    "tiny",
    ModelConfig(
        TransformerConfig(dim=24, ffn_dim=16, freq_dim=8, num_heads=2, num_layers=1, text_dim=8, text_len=4),
        latent_height=2,
        latent_width=2,
        memory=MemoryConfig(),
    ),
    VaeConfig(base_dim=4, num_res_blocks=1),
)


@pytest.fixture(scope="module")
def networks() -> Networks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.MODELS, "tiny", SIZES)
        request = Request(size="tiny", device="cpu", dtype="float32")
        return open_model(request, CPU).networks(reference, request)  # type: ignore[arg-type]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Makes a class the Wan VAE of a FlashDreams that is installed; the other peers are left out."""

    def put(vae: type) -> None:
        names = ("flashdreams", *(f"flashdreams.{n}" for n in ("recipes", "recipes.wan", "recipes.wan.autoencoder")))
        for name in (*names, f"{names[-1]}.vae"):
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules[f"{names[-1]}.vae"].WanVAE = vae  # type: ignore[attr-defined]
        monkeypatch.setattr(baselines, "_MAKERS", {"FlashDreams": baselines._flashdreams})

    return put


class Vae:
    """A streaming decoder behind FlashDreams' interface, as of 0.1.0. ``scale``: 1 is right."""

    scale = 1.0

    def __init__(self, vae_path: str, *, use_cuda_graph: bool, use_compile: bool, enable_encoder: bool, **sizes: Any):
        assert not (use_cuda_graph or use_compile or enable_encoder)
        self.config = VaeConfig(
            base_dim=sizes.pop("base_dim"),
            z_dim=sizes.pop("z_dim"),
            dim_mult=sizes.pop("dim_mult"),
            num_res_blocks=sizes.pop("num_res_blocks"),
            temporal_downsample=sizes.pop("temperal_downsample"),
            latents_mean=sizes.pop("latent_mean"),
            latents_std=sizes.pop("latent_std"),
        )
        assert not sizes
        tensors = load_file(vae_path)
        self.decoder = VaeDecoder(self.config, tensors, reference, device="cpu", dtype=FLOAT32)  # type: ignore[arg-type]
        self.calls = 0

    def to(self, device: torch.device, dtype: torch.dtype) -> Vae:
        return self

    def prepare_cache(self) -> Any:
        return self.decoder.new_state(2, 2, latents=1)

    def decode(self, latents: Tensor, cache: Any) -> Tensor:
        self.calls += 1
        video = self.decoder.decode(latents[0].transpose(0, 1), cache)
        return self.scale * video.permute(3, 0, 1, 2)[None].clamp(-1, 1)


class WrongVae(Vae):
    scale = 1.1


class OtherVae:
    def __init__(self, path: str) -> None:
        raise AssertionError("not reached: it takes no such options")


def test_flashdreams_is_driven_where_it_is_installed(networks: Networks, install: Callable[[type], None]) -> None:
    install(Vae)
    found, missing = find_baselines(networks, 0)
    assert missing == {} and [peer.name for peer in found] == ["FlashDreams"]
    assert found[0].ok and found[0].error < 2e-6 and "mid-stream" in found[0].what
    video = found[0].call()
    assert isinstance(video, Tensor) and video.shape == (12, 16, 16, 3)


def test_a_peer_that_computes_something_else_is_seen(networks: Networks, install: Callable[[type], None]) -> None:
    install(WrongVae)
    (found,), _ = find_baselines(networks, 0)
    assert not found.ok and found.error == pytest.approx(0.1, rel=1e-3)
    assert not Baseline("x", "", lambda: None, float("nan"), 1.0, CPU).ok


def test_a_peer_of_another_version_ends_nothing(networks: Networks, install: Callable[[type], None]) -> None:
    install(OtherVae)
    found, missing = find_baselines(networks, 0)
    assert found == [] and list(missing) == ["FlashDreams"]
    assert missing["FlashDreams"].startswith("did not run: TypeError: ") and "use_cuda_graph" in missing["FlashDreams"]


def test_what_is_not_installed_is_named(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, missing = find_baselines(networks, 0)
    assert found == [] and missing == {
        "diffusers AutoencoderKLWan": "diffusers is not installed: pip install diffusers",
        "FlashDreams": "flashdreams is not installed: pip install flashdreams",
    }


def test_without_a_checkout_none_is_there(networks: Networks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, missing = run_module.find_baselines(networks, 0)
    assert [*(each.name for each in found), *missing] == list(run_module.BASELINES) and len(found) == 1
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    found, missing = run_module.find_baselines(networks, 0)
    assert found == [] and list(missing) == list(run_module.BASELINES)
    assert all("only a checkout has bench/baselines.py" in why for why in missing.values())


def test_memory_that_is_not_there_is_no_fault_of_a_peer(networks: Networks, install: Callable[[type], None]) -> None:
    class Large:
        def __init__(self, *_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    install(Large)
    with pytest.raises(torch.OutOfMemoryError):
        find_baselines(networks, 0)
