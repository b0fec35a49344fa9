"""Which backend a model is given, and why: what was named, or what the device and the build allow."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streaming import load, require, video

import echo_rt
from echo_rt.engine import build as assembly
from echo_rt.errors import BackendError
from echo_rt.ops import backends
from echo_rt.ops.backends import BACKEND_VARIABLE, Backend, available_backends, choose_backend, load_ops
from echo_rt.verify.bundles import verify_bundle
from echo_rt.weights.tiny_model import write_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NOT_BUILT = "this build has the emulated kernels; with nvcc on the PATH (or CUDA_HOME set), install echo-rt again"
UPDATES = "updates the memory in bfloat16 or float16 with heads of (64, 128)"
BFLOAT16 = (torch.bfloat16, 128)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU, and a build with kernels for it, in place of what is here; a test changes one or the other."""
    kernels = pytest.importorskip("echo_rt.ops.kernels", exc_type=ImportError)
    facts: dict[str, Any] = {"status": "available", "capability": (9, 0)}
    monkeypatch.setattr(kernels, "name", "cuda")
    monkeypatch.delattr(echo_rt, "_ops", raising=False)
    monkeypatch.setitem(sys.modules, "echo_rt._ops", SimpleNamespace(CUDA_ARCHS="80 90a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(
        backends, "available_backends", lambda: {"torch": "available", "emulated": "no", "cuda": facts["status"]}
    )
    return facts


@pytest.mark.parametrize("memory", [None, BFLOAT16, (torch.float16, 64)])
def test_the_kernels_where_they_are_built_for_the_gpu(
    gpu: dict[str, Any], memory: tuple[torch.dtype, int] | None
) -> None:
    chosen = choose_backend(None, GPU, memory=memory)
    assert (chosen.name, chosen.reason) == ("cuda", "the kernels are built for cuda:0")
    assert not chosen.by_name and not chosen.fallback


@pytest.mark.parametrize(
    ("changes", "memory", "why"),
    [
        ({"status": NOT_BUILT}, BFLOAT16, f"backend 'cuda' is not available: {NOT_BUILT}"),
        ({"capability": (7, 5)}, BFLOAT16, "this build has kernels for sm_80, sm_90a, and cuda:0 is sm_75; where this"),
        (
            {},
            (torch.float32, 128),
            f"{UPDATES}, got float32 and 128",
        ),
        (
            {},
            (torch.bfloat16, 96),
            f"{UPDATES}, got bfloat16 and 96",
        ),
    ],
)
def test_torch_where_the_kernels_do_not_cover_it(
    gpu: dict[str, Any], changes: dict[str, Any], memory: tuple[torch.dtype, int], why: str
) -> None:
    """Where nothing was named: whoever names the kernels is told that they cannot be had."""
    gpu |= changes
    chosen = choose_backend(None, GPU, memory=memory)
    assert chosen.name == "torch" and chosen.fallback and why in chosen.reason
    assert "\n" not in chosen.reason and "or backend 'torch'" not in chosen.reason, "which it is"
    with pytest.raises(BackendError, match=re.escape(why)):
        choose_backend("cuda", GPU, memory=memory)


def test_torch_on_a_cpu(gpu: dict[str, Any]) -> None:
    chosen = choose_backend(None, CPU, memory=(torch.float32, 128))
    assert (chosen.name, chosen.reason, chosen.fallback) == ("torch", "the device is cpu", False)


def test_what_is_named_comes_first(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller, then by the snapshot, then by the environment, whatever the device."""
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    chosen = choose_backend(None, GPU, memory=BFLOAT16)
    assert (chosen.name, chosen.reason) == ("torch", f"{BACKEND_VARIABLE} names it")
    chosen = choose_backend(None, GPU, memory=BFLOAT16, prescribed="cuda")
    assert (chosen.name, chosen.reason, chosen.by_name) == ("cuda", "as in the snapshot", False)
    chosen = choose_backend("torch", GPU, memory=BFLOAT16, prescribed="cuda")
    assert (chosen.name, chosen.reason, chosen.by_name) == ("torch", "asked for by name", True)
    assert not chosen.fallback
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert choose_backend(None, GPU).name == "cuda"


@pytest.mark.parametrize(
    ("device", "memory", "words"),
    [
        (CPU, None, "backend 'cuda' runs on device 'cuda', got 'cpu'"),
        (GPU, (torch.float32, 128), "got float32 and 128; choose memory 'prior' or 'off', or backend 'torch'"),
    ],
)
def test_what_is_named_is_never_replaced(
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    memory: tuple[torch.dtype, int] | None,
    words: str,
) -> None:
    """And the error says who named it."""
    with pytest.raises(BackendError) as by_name:
        choose_backend("cuda", device, memory=memory)
    with pytest.raises(BackendError) as by_snapshot:
        choose_backend(None, device, memory=memory, prescribed="cuda")
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(BackendError) as by_environment:
        choose_backend(None, device, memory=memory)
    texts = [str(caught.value) for caught in (by_name, by_snapshot, by_environment)]
    assert all(words in text and "\n" not in text for text in texts)
    assert texts[1].startswith(texts[0]) and texts[2] == f"{BACKEND_VARIABLE}: {texts[0]}"
    assert texts[1].endswith("name another with backend= (--backend) to go on, rounded otherwise")


def test_backends_that_are_unknown_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^backend must be one of torch, emulated, cuda; got 'opencl'$"):
        load_ops("opencl")
    monkeypatch.setenv(BACKEND_VARIABLE, "opencl")
    with pytest.raises(BackendError, match=f"^{BACKEND_VARIABLE}: backend must be one of .*; got 'opencl'$"):
        choose_backend(None, CPU)
    for name, status in available_backends().items():
        if status != "available":
            with pytest.raises(BackendError, match=f"^backend '{name}' is not available: "):
                load_ops(name)


# ---- who asks, for what


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        ({}, (torch.float32, 64)),
        ({"dtype": "bfloat16"}, (torch.bfloat16, 64)),
        ({"dtype": "float8"}, (torch.bfloat16, 64)),
        ({"memory": "prior"}, None),
        ({"memory": "off"}, None),
    ],
)
def test_a_runtime_asks_for_what_it_is_loaded_with(
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    memory: tuple[torch.dtype, int] | None,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def noted(requested: str | None, device: torch.device, **facts: Any) -> Backend:
        asked.append((requested, device, facts))
        return choose_backend(requested, device, **facts)

    monkeypatch.setattr(assembly, "choose_backend", noted)
    with load(small_model, **options) as runtime:
        assert (runtime.backend, runtime.backend_reason) == ("torch", "the device is cpu")
        assert memory is None or memory[1] == runtime.config.transformer.head_dim
    assert asked == [(None, CPU, {"memory": memory, "prescribed": None})]


def test_the_first_lines_of_the_log(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was loaded is the one line at INFO, the backend a detail; but a warning where a GPU's kernels do not run."""
    with caplog.at_level(logging.DEBUG, "echo_rt"):
        load(small_model).close()
    (recipe,) = (record for record in caplog.records if record.levelno >= logging.INFO)
    assert recipe.name == "echo_rt.recipe" and len(caplog.records) > 2
    assert recipe.getMessage().startswith("recipe echo-infinity-long (the folder names it): ")
    (backend,) = (record for record in caplog.records if record.name == "echo_rt.runtime")
    assert backend.getMessage() == "backend torch: the device is cpu"
    caplog.clear()
    fallback = Backend(load_ops("torch"), "no kernels", fallback=True)
    monkeypatch.setattr(assembly, "choose_backend", lambda *_, **__: fallback)
    load(small_model).close()
    (warning,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.getMessage() == "backend torch: no kernels"


def test_one_that_is_not_there_is_refused_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="got 'opencl'"):
        load(tmp_path, backend="opencl")
    monkeypatch.setenv(BACKEND_VARIABLE, "opencl")
    with pytest.raises(BackendError, match=f"{BACKEND_VARIABLE}: .* got 'opencl'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("bundle", "dtype", "memory"),
    [
        ("rollout_small", "float32", (torch.float32, 128)),
        ("rollout_small", "float8", (torch.bfloat16, 128)),
        ("vae", "float32", None),
    ],
)
def test_a_bundle_is_verified_on_what_a_runtime_would_have(
    golden_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle: str,
    dtype: str,
    memory: tuple[torch.dtype, int] | None,
) -> None:
    asked: list[Any] = []

    def noted(requested: str | None, device: torch.device, **facts: Any) -> Backend:
        asked.append(facts.get("memory"))
        return choose_backend(requested, device, **facts)

    monkeypatch.setattr("echo_rt.verify.kinds.choose_backend", noted)
    report = verify_bundle(golden_dir / bundle, device="cpu", dtype=dtype)
    assert asked == [memory] and report.passed
    assert (report.backend.name, report.backend.reason) == ("torch", "the device is cpu")


@pytest.mark.skipif(available_backends()["emulated"] != "available", reason="this build has no emulated kernels")
@pytest.mark.parametrize(("width", "height"), [(16, 16), (16, 32), (32, 16)])
def test_the_kernels_make_a_video_one_token_wide(tmp_path: Path, width: int, height: int) -> None:
    """Of which transposes are views, where elsewhere they are copies."""
    write_tiny_model(tmp_path, width=width, height=height)
    videos = []
    for backend in ("torch", "emulated"):
        with load(tmp_path, backend=backend, memory="prior") as runtime:
            videos.append(video(runtime, 2))
    pairs = zip(*videos, strict=True)
    assert all((a.latents - b.latents).norm() < 1e-4 * a.latents.norm() for a, b in pairs)


@pytest.mark.cuda
def test_on_a_gpu(small_model: Path) -> None:
    device = require("cuda")
    if available_backends()["cuda"] != "available":
        pytest.skip("this build has no kernels for a GPU")
    for options, backend in (
        ({"dtype": "bfloat16"}, "cuda"),
        ({"dtype": "float32", "memory": "prior"}, "cuda"),
        ({"dtype": "float32"}, "torch"),
    ):
        with load(small_model, device=device, **options) as runtime:
            assert runtime.backend == backend, runtime.backend_reason
            assert len(video(runtime, 2)) == 2
