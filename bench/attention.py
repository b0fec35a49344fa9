"""Every attention over the KV buffer at a model's shapes: ``python bench/attention.py --out DIR``.

Each one is held against float64 and timed as the steady state runs it, from a CUDA graph. Beside those that a model may
be given stands cuDNN's in float8, where nvidia-cudnn-frontend is installed. Exit code 0 if one was right and timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from torch import Tensor

from echo_rt.attention import AttentionShapes, implementations
from echo_rt.attention.select import AttentionCheck
from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.bench.environment import environment
from echo_rt.bench.settings import MODELS, RELEASED, TINY
from echo_rt.bench.tables import Column, check_results_folder, write_results
from echo_rt.bench.timing import HOST_CLOCK, HostTimer
from echo_rt.cli.arguments import parse_path
from echo_rt.errors import BackendError, EchoError
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import DTYPES, FLOAT8, model_context, parse_device
from echo_rt.utils.wording import first_line, plain

COLUMNS = (
    Column("name", "attention", text=True),
    Column("ms", "ms a call", ".4f"),
    Column("p99_ms", "p99", ".4f"),
    Column("tflops", "TFLOP/s", ".1f"),
    Column("error", "error", ".1e"),
    Column("note", "", text=True),
)
FLOAT8_BOUND = 6e-2  # that of the golden rollouts with float8 products
_CALLS = {"cuda": 30, "cpu": 3}


@dataclass(frozen=True)
class Row:
    """One attention; ``error`` is relative to float64, None is what was not measured, ``note`` says why."""

    name: str
    ms: float | None = None
    p99_ms: float | None = None
    tflops: float | None = None
    error: float | None = None
    note: str = ""


class CudnnFloat8:
    """cuDNN's attention of float8 tensors, through nvidia-cudnn-frontend.

    ``q, k, v`` are quantized when it is made, one scale a tensor: a runtime would quantize a key once, not once a pass.
    """

    name = "cudnn-float8"
    _SOFTMAX_SCALE = 256.0  # probabilities are at most 1, and float8's largest number is 448

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        try:
            import cudnn
        except ImportError as error:
            raise BackendError(f"nvidia-cudnn-frontend is not installed: {first_line(error)}") from None
        self._cudnn, self._handle = cudnn, cudnn.create_handle()
        types = cudnn.data_type
        self._out = torch.empty_like(q)
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=types.FP8_E4M3,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
        )
        arguments, self._tensors = {}, {}
        scales = {"scale_s": self._SOFTMAX_SCALE, "descale_s": 1 / self._SOFTMAX_SCALE, "scale_o": 1.0}
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            scale = tensor.abs().max().float() / torch.finfo(FLOAT8).max
            quantized = (tensor.float() / scale).to(FLOAT8)
            # [n, H, d] as it lies, seen as [1, H, n, d].
            seen = quantized.transpose(0, 1).unsqueeze(0)
            node = graph.tensor(dim=list(seen.shape), stride=list(seen.stride()), data_type=types.FP8_E4M3)
            arguments[name], self._tensors[node] = node, seen
            scales[f"descale_{name}"] = float(scale)
        for name, factor in scales.items():
            node = graph.tensor(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=types.FLOAT)
            arguments[name] = node
            self._tensors[node] = torch.full((1, 1, 1, 1), factor, device=q.device)
        out, _, *largest = graph.sdpa_fp8(**arguments, attn_scale=q.shape[-1] ** -0.5, generate_stats=False)
        seen = self._out.transpose(0, 1).unsqueeze(0)
        kind = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[q.dtype]
        out.set_output(True).set_dim(list(seen.shape)).set_stride(list(seen.stride())).set_data_type(kind)
        self._tensors[out] = seen
        for node in largest:
            node.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(types.FLOAT)
            self._tensors[node] = torch.empty(1, 1, 1, 1, device=q.device)
        graph.build([cudnn.heur_mode.A])
        self._graph = graph
        self._workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cudnn.set_stream(self._handle, torch.cuda.current_stream(q.device).cuda_stream)
        self._graph.execute(self._tensors, self._workspace, handle=self._handle)
        return self._out.flatten(-2)


def measure(name: str, load: Callable[[], Any], check: AttentionCheck, bound: float, device: torch.device) -> Row:
    """One attention, first right and then fast; whatever a library raises is the finding."""
    try:
        attention = load()
        error = check.error(attention)
        if not error <= bound:  # NaN is not
            return Row(name, error=error, note=f"wrong: expected an error of at most {bound:.1e}")
        if device.type == "cuda":
            watch = check.stopwatch(attention)
            ms = [watch() for _ in range(_CALLS["cuda"])]
        else:
            times = HostTimer().measure(lambda: attention(check.q, check.k, check.v), _CALLS["cpu"], 1)
            ms = [each / 1e3 for each in times.microseconds]
    except Exception as problem:
        return Row(name, note=first_line(problem))
    return Row(name, statistics.median(ms), max(ms), error=error)


def run(out: Path, shapes: AttentionShapes, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Measure and write; whether one was right and timed, and the page."""
    flops = 4 * shapes.queries * shapes.keys * shapes.heads * shapes.head_dim
    on_gpu = device.type == "cuda"
    clock = "device events around a CUDA graph" if on_gpu else HOST_CLOCK
    notes = [
        f"{shapes}; {plain(dtype)}; {flops / 1e12:.4g} TFLOP a call; {_CALLS[device.type]} calls; clock: {clock}.",
        f"{CudnnFloat8.name}: keys and values are in float8 already; its time has no quantization in it.",
    ]
    rows: list[Row] = []
    header = environment(str(device))

    def save(passed: bool) -> str:
        tables = {"Attention": (rows, COLUMNS)}
        return write_results(out, "attention", "Attention over the KV buffer", header, tables, notes, passed=passed)

    with torch.inference_mode(), model_context(device, dtype):
        check = AttentionCheck(shapes, device, dtype)
        loads: dict[str, tuple[Callable[[], Any], float]] = {}
        for kind in implementations(load_ops("cuda" if on_gpu else "torch")):
            if why := kind.obstacle(device, dtype, shapes) or ("" if kind.fused else "it holds all scores in memory"):
                rows.append(Row(kind.name, note=why))
            else:
                loads[kind.name] = kind.load, TOLERANCES[dtype]
        if on_gpu:
            loads[CudnnFloat8.name] = lambda: CudnnFloat8(check.q, check.k, check.v), FLOAT8_BOUND
        for name, (load, bound) in loads.items():
            row = measure(name, load, check, bound, device)
            rate = flops / row.ms / 1e9 if on_gpu and row.ms is not None else None
            rows.append(dataclasses.replace(row, tflops=rate))
            print(f"{name}: {row.note or f'{row.ms:.3f} ms'}", file=sys.stderr, flush=True)
            save(False)  # the time may run out
    passed = any(row.ms is not None for row in rows)
    return passed, save(passed)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    parser.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    arguments = parser.parse_args(argv)
    try:
        check_results_folder(arguments.out)
        device, dtype = parse_device(arguments.device), DTYPES[arguments.dtype]
        model = MODELS[arguments.size or (RELEASED if device.type == "cuda" else TINY).name]
        config, transformer = model.config, model.config.transformer
        shapes = AttentionShapes(
            config.tokens_per_block, config.cached_tokens, transformer.num_heads, transformer.head_dim
        )
        passed, text = run(arguments.out, shapes, device, dtype)
    except EchoError as error:
        print(f"attention.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
