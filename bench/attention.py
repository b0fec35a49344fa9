"""Every attention over the KV buffer at a model's shapes: ``python bench/attention.py --out DIR``.

Each one is held against float64 and timed as the steady state runs it, from a CUDA graph. Beside those that a model may
be given stands cuDNN's in float8, where nvidia-cudnn-frontend is installed. Exit code 0 if one was right and timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _checkout
import torch
from timing import HOST_CLOCK, HostTimer
from torch import Tensor

from echo_rt.attention import AttentionCheck, AttentionShapes, implementations
from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.bench.run import median_p99
from echo_rt.bench.tables import columns, environment
from echo_rt.errors import BackendError
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import DTYPES, FLOAT8, model_context, parse_device
from echo_rt.utils.wording import first_line, plain

COLUMNS = columns(
    "name|attention", "ms|ms a call|.4f", "p99_ms|p99|.4f", "tflops|TFLOP/s|.1f", "error|error|.1e", "note|"
)
FLOAT8_BOUND = 6e-2  # that of the golden rollouts with float8 products
_CALLS = {"cuda": 30, "cpu": 3}


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


def measure(load: Callable[[], Any], check: AttentionCheck, bound: float, on_gpu: bool) -> dict[str, Any]:
    """One attention, first right and then fast: entries of its row; whatever a library raises is the finding."""
    try:
        attention = load()
        error = check.error(attention)
        if not error <= bound:  # NaN is not
            return {"error": error, "note": f"wrong: expected an error of at most {bound:.1e}"}
        if on_gpu:
            watch = check.stopwatch(attention)
            ms = [watch() for _ in range(_CALLS["cuda"])]
        else:
            times = HostTimer().measure(lambda: attention(check.q, check.k, check.v), _CALLS["cpu"], 1)
            ms = [each / 1e3 for each in times.microseconds]
    except Exception as problem:
        return {"note": first_line(problem)}
    median, p99 = median_p99(ms)
    return {"ms": median, "p99_ms": p99, "error": error}


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Measure and write; whether one was right and timed, and the page."""
    device, dtype = parse_device(arguments.device), DTYPES[arguments.dtype]
    on_gpu, config = device.type == "cuda", _checkout.model_of(arguments).config
    heads, size = config.transformer.num_heads, config.transformer.head_dim
    shapes = AttentionShapes(config.tokens_per_block, config.cached_tokens, heads, size)
    flops = 4 * shapes.queries * shapes.keys * heads * size
    clock = "device events around a CUDA graph" if on_gpu else HOST_CLOCK
    notes = [
        f"{shapes}; {plain(dtype)}; {flops / 1e12:.4g} TFLOP a call; {_CALLS[device.type]} calls; clock: {clock}.",
        f"{CudnnFloat8.name}: keys and values are in float8 already; its time has no quantization in it.",
    ]
    rows: list[dict[str, Any]] = []
    header = environment(str(device))

    def add(name: str, found: dict[str, Any]) -> None:
        rows.append(dict.fromkeys(column.key for column in COLUMNS) | {"name": name, "note": ""} | found)
        if on_gpu and rows[-1]["ms"] is not None:
            rows[-1]["tflops"] = flops / rows[-1]["ms"] / 1e9

    def save(passed: bool) -> str:
        tables = {"Attention": (rows, COLUMNS)}
        title = "Attention over the KV buffer"
        return _checkout.save(arguments.out, "attention", title, header, tables, notes, passed=passed)

    with torch.inference_mode(), model_context(device, dtype):
        check = AttentionCheck(shapes, device, dtype)
        loads: dict[str, tuple[Callable[[], Any], float]] = {}
        for kind in implementations(load_ops("cuda" if on_gpu else "torch")):
            if why := kind.obstacle(device, dtype, shapes) or ("" if kind.fused else "it holds all scores in memory"):
                add(kind.name, {"note": why})
            else:
                loads[kind.name] = kind.load, TOLERANCES[dtype]
        if on_gpu:
            loads[CudnnFloat8.name] = lambda: CudnnFloat8(check.q, check.k, check.v), FLOAT8_BOUND
        for name, (load, bound) in loads.items():
            add(name, measure(load, check, bound, on_gpu))
            _checkout.say(f"{name}: {rows[-1]['note'] or format(rows[-1]['ms'], '.3f') + ' ms'}")
            save(False)  # the time may run out
    passed = any(row["ms"] is not None for row in rows)
    return passed, save(passed)


def main(argv: Sequence[str]) -> int:
    return _checkout.run(__file__, run, _checkout.parser(__doc__, dtypes=DTYPES).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
