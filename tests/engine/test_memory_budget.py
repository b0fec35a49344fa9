"""Videos that no memory holds: refused before anything is allocated, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import load, video

import echo_rt.engine.memory_budget
from echo_rt.bench.settings import RELEASED
from echo_rt.cli.main import main
from echo_rt.engine.build import ModelTensors, Networks
from echo_rt.engine.memory_budget import host_memory, require_capacity, video_bytes
from echo_rt.errors import ConfigError
from echo_rt.ops.backends import choose_backend
from echo_rt.options import RuntimeOptions
from echo_rt.weights.tensors import FingerprintedTensors

GIB = 2**30
# Refused by what the keys and values take, by what the frames take, and where no tensor has such a size.
IMPOSSIBLE = [
    {"width": 16, "height": 8 * 10**6},
    {"width": 8 * 10**6, "height": 1600},
    {"width": 8 * 10**6, "height": 8 * 10**6},
    {"lookahead": 10**9},
    {"lookahead": 10**9, "vae": "tiny"},
]


@pytest.mark.parametrize("options", IMPOSSIBLE, ids=str)
def test_what_no_machine_holds_is_refused_in_a_line(small_model: Path, options: dict[str, Any]) -> None:
    expected = r"^expected a video whose buffers fit into the \d+ GiB of this host, got one of \d+x\d+ with local_fr"
    with pytest.raises(ConfigError, match=expected) as caught:
        load(small_model, checkpoint=None, **options)
    there, needed = (int(number) for number in re.findall(r"(\d+) GiB", str(caught.value)))
    assert needed > there


@pytest.mark.parametrize(
    "options",
    [{}, {"vae": "tiny"}, {"vae_tiles": 2}, {"dtype": "bfloat16", "vae_dtype": "float32", "lookahead": 2}],
    ids=str,
)
def test_what_is_counted_is_what_is_made(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """All buffers, and the pixels before they are bytes; with a byte less than that the model is refused."""
    networks, loading = list[Networks](), Networks.load
    monkeypatch.setattr(Networks, "load", lambda self, config: (networks.append(self), loading(self, config)))
    with load(tiny_model, **options) as runtime:
        pipeline = runtime._engine.pipeline  # type: ignore[union-attr]
        figures = [slot.vitals for slot in pipeline._slots] + [pipeline._vitals]  # next to nothing
        made = sum(tensor.nbytes for tensor in pipeline.buffers().values()) - sum(each.nbytes for each in figures)
        pixels = pipeline._frames.numel() * runtime.vae_dtype.itemsize
        total = sum(video_bytes(runtime.config, networks[0], pipeline.depth))
    assert total == made + pixels
    monkeypatch.setattr(echo_rt.engine.memory_budget, "host_memory", lambda: total)
    with load(tiny_model, **options) as runtime:
        assert len(video(runtime, 1)) == 1
    monkeypatch.setattr(echo_rt.engine.memory_budget, "host_memory", lambda: total - 1)
    with pytest.raises(ConfigError, match="expected a video whose buffers fit into the 0 GiB of this host"):
        load(tiny_model, **options)


@pytest.mark.parametrize(("gpu", "host", "refused"), [(8, 1, ""), (1, 1, "cuda:0"), (8, 0, "this host")])
def test_a_gpu_and_its_host_have_their_own(monkeypatch: pytest.MonkeyPatch, gpu: int, host: int, refused: str) -> None:
    """The released sizes, in GiB: keys, values and the decoder on the GPU, the blocks in flight on the host."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gpu * GIB))  # what is free does not count
    monkeypatch.setattr(echo_rt.engine.memory_budget, "host_memory", lambda: host * GIB)

    def require() -> None:
        backend, nothing = choose_backend("torch", torch.device("cpu")), ModelTensors(FingerprintedTensors({}, ""))
        options = RuntimeOptions(dtype="bfloat16", device="cpu")
        networks = Networks(RELEASED.config, nothing, options, backend, vae=RELEASED.vae)
        networks.device = torch.device("cuda", 0)
        require_capacity(RELEASED.config, networks, 2)

    if not refused:
        return require()
    with pytest.raises(ConfigError, match=rf"of {refused}, got one of 832x480 with local_frames 9 and lookahead 1, "):
        require()


# ---------------------------------------------------------------- what there is


def machine(root: Path, *, groups: str, **limits: str) -> Path:
    """A ``/proc`` of 64 GiB and 2 of swap, in these control groups, and the files of their limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nSwapTotal: {2 * 2**20} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for path, limit in limits.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "gib"),
    [
        ("0::/\n", {}, 66),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": str(8 * GIB)}, 10),
        ("0::/a\n", {"a/memory.max": str(8 * GIB), "memory.max": str(4 * GIB)}, 6),
        ("0::/not/seen/from/inside\n", {"memory.max": str(4 * GIB)}, 6),
        ("3:cpu:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": str(GIB)}, 66),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": str(GIB)}, 3),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, 66),
    ],
)
def test_what_a_host_has(tmp_path: Path, groups: str, limits: dict[str, str], gib: int) -> None:
    assert host_memory(machine(tmp_path, groups=groups, **limits)) == gib * GIB


def test_this_host_has_some() -> None:
    assert host_memory() >= torch.ones(1).nbytes


def test_the_command_line_says_it_in_a_line(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(small_model), "--prompt", "x", "--memory", "off", "--size", "8000000x16000"]
    assert main(["generate", *arguments, "--quiet", "-o", str(tmp_path / "v.mp4")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("echo-rt: error: expected a video whose buffers fit into")
    assert list(tmp_path.iterdir()) == []
