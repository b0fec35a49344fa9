"""Every kernel at the sizes of a model: ``python bench/kernel_times.py --out DIR`` writes kernel_times.json and .md.

A row is an operation in one way of calling it: held against the torch backend, then timed beside it, a copy of as many
bytes and the best library call. Exit code 0 if every result was right and every kernel was timed, 1 if not, 2 for
arguments that cannot be had. An unmet target is a number like any other, and no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import _checkout
import torch
from library_calls import library_calls, result_of
from op_inputs import IN8, OPS, Variant, linear_layers, variants
from roofline import Work, copy_rate, measure_ceilings, memory_update_work, work_of
from timing import Timer, timer_for
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from echo_rt.bench.runner import median_p99
from echo_rt.bench.settings import RELEASED, BenchModel
from echo_rt.bench.tables import columns, environment
from echo_rt.model.linear import Linear
from echo_rt.model.linear_products import LinearShape, gelu_tanh, select_linear
from echo_rt.model.memory import MemoryEncoder
from echo_rt.ops.backends import BACKENDS, check_device, load_ops
from echo_rt.ops.float8 import product, quantize_rows
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import DTYPES, FLOAT8, parse_device
from echo_rt.utils.wording import counted, plain, with_type
from echo_rt.verify.bundles import BOUNDS as ROLLOUT_BOUNDS
from echo_rt.weights.shapes import memory_shapes
from echo_rt.weights.tiny_model import RandomTensors

MEMORY_UPDATE, LIBRARY = "memory_update", "library"
QUERY_NORM = "rms_norm of the queries to the text"
SEARCHED = "cuBLASLt searched"  # in the name of a call that the autotuner selected
MEMORY_SHARE = 0.85  # of the copy rate, the target of kernels that memory limits
# Timed calls and calls before them: quick or not, by device.
_COUNTS = {("cuda", False): (200, 20), ("cuda", True): (50, 5), ("cpu", False): (10, 1), ("cpu", True): (3, 0)}
# Twice what tests/ops/test_ops.py allows between a backend and the formula: here both sides are rounded.
# float8 is quantized from float32 results that differ by their last bits: some values lie on two sides of a tie.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4, FLOAT8: 4e-3}
# A library rounds on the way where the definition does not.
LIBRARY_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, FLOAT8: 3e-2}
_CHUNK = 2**26  # elements widened to float64 at a time: the KV buffer would not fit in that precision

COLUMNS = columns(
    "op|operation", "variant|call", "calls|calls a block|", "median_us|µs|.1f", "p99_us|p99|.1f", "rate|rate|.1f",
    "unit|", "share|of ceiling|.0%", "copy_share|of a copy|.0%", "torch_ratio|x torch|.2f",
    "library_ratio|x library|.2f", "library|best library call", "error|error|.1e", "verdict|",
)  # fmt: skip
_UNSEEN = ("bytes", "flops", "limit", "copy_us", "torch_us", "library_us", "error_bound")  # in the JSON alone
CEILING_COLUMNS = columns(
    "name|ceiling", "value|rate|.1f", "unit|", "median_us|µs|.1f", "p99_us|p99|.1f", "how|measured by"
)


# ---- whether two results agree


def difference(actual: Any, expected: Any) -> float:
    """``‖actual - expected‖ / ‖expected‖``; of whole numbers the share that differs; 0 where neither is a tensor."""
    if not isinstance(expected, Tensor):
        return float("nan") if isinstance(actual, Tensor) else 0.0
    if not isinstance(actual, Tensor) or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return float("nan")
    if not expected.is_floating_point():
        return float((actual != expected).sum()) / max(1, expected.numel())
    apart = size = 0.0
    for a, e in zip(actual.reshape(-1).split(_CHUNK), expected.reshape(-1).split(_CHUNK), strict=True):
        wide = e.double()
        apart += float((a.double() - wide).square().sum())
        size += float(wide.square().sum())
    return 0.0 if apart == 0.0 else (apart / size) ** 0.5 if size else float("inf")


def copies(args: Sequence[Any]) -> list[Any]:
    """The arguments with tensors of their own."""
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def compare(actual: Sequence[Any], expected: Sequence[Any], bounds: dict[torch.dtype, float]) -> tuple[float, float]:
    """Of what two calls returned and wrote: error and bound of the tensor furthest beyond its bound.

    Whole numbers must be the same: their bound is 0.
    """
    pairs = zip(actual, expected, strict=True)
    found = [(difference(a, e), bounds.get(e.dtype, 0.0) if isinstance(e, Tensor) else 0.0) for a, e in pairs]
    return max(found, key=lambda each: (not each[0] <= each[1], each[0] / max(each[1], 1e-30)))  # NaN is beyond


# ---- rows


@dataclass(frozen=True)
class Run:
    """What all rows have in common. ``judged``: whether targets are; ``compiled``: torch.compile is among libraries."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    model: BenchModel
    timer: Timer
    iterations: int
    warmup: int
    judged: bool
    compiled: bool

    def time(self, call: Callable[[], object], part: int = 1) -> tuple[float, float]:
        """Median and 99th percentile in microseconds, of one of ``part`` of the calls."""
        times = self.timer.measure(call, max(1, self.iterations // part), self.warmup // part)
        return median_p99(times)

    @cached_property
    def ceilings(self) -> dict[str, dict[str, Any]]:
        return measure_ceilings(self.time, self.device, self.dtype)


class Row(dict[str, Any]):
    """One operation in one way of calling it; None is what was not measured, ``problems`` is what went wrong.

    A ratio above 1 says that the kernel is the faster one. ``share`` is that of the measured ceiling, ``copy_share``
    that of a copy of as many bytes. ``absent``: library calls that could not be compared, and why.
    """

    def __init__(self, op: str, variant: str, calls: int, backend: str, **known: Any) -> None:
        super().__init__(dict.fromkeys((*(column.key for column in COLUMNS), *_UNSEEN)))
        self.update(op=op, variant=variant, calls=calls, backend=backend, unit="", verdict="")
        self.update(libraries_us={}, absent={}, problems=[], **known)

    @property
    def ok(self) -> bool:
        """Whether the result was right and the kernel was timed."""
        return not self["problems"] and self["median_us"] is not None

    def agree(self, found: tuple[float, float]) -> None:
        """Note how far the result is from the torch backend's."""
        self["error"], self["error_bound"] = error, bound = found
        if not error <= bound:  # NaN is not
            self["problems"].append(f"differs from the torch backend by {error:.1e}, allowed are {bound:.1e}")

    def take(self, times: tuple[float, float], work: Work, ceilings: Mapping[str, Any]) -> None:
        """Fill in median and 99th percentile, and the rate in the unit of what limits the call."""
        self["bytes"], self["flops"], self["limit"] = work
        self["median_us"], self["p99_us"] = times
        amount, unit = (work.flops / 1e6, "TFLOP/s") if work.limit == "arithmetic" else (work.bytes / 1e3, "GB/s")
        self["rate"], self["unit"] = amount / self["median_us"], unit
        self["share"] = None if work.limit == "neither" else self["rate"] / ceilings[unit]["value"]

    def beside(self, what: str, us: float) -> None:
        """Fill in what something else takes, and the ratio of it."""
        self[f"{what}_us"], self["copy_share" if what == "copy" else f"{what}_ratio"] = us, us / self["median_us"]

    def judge(self, judged: bool) -> None:
        """Say whether it failed, and of a kernel that memory limits whether it reaches its target."""
        met = self["share"] is not None and self["share"] >= MEMORY_SHARE
        wanted = f"{MEMORY_SHARE:.0%} of the copy rate"
        verdict = f"{'met' if met else 'unmet'}: {wanted}" if self["limit"] == "memory" and judged else "right"
        self["verdict"] = verdict if self.ok else "failed"

    @contextmanager
    def filled(self, judged: bool) -> Iterator[None]:
        """Whatever a kernel, driver or library raises while it is filled in is its finding; others go on."""
        try:
            yield
        except Exception as error:
            self["problems"].append(with_type(error))
        self.judge(judged)


def _time_both(run: Run, row: Row, work: Work, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Fill in what a call takes, and the torch backend's beside it."""
    row.take(run.time(ours), work, run.ceilings)
    if run.ops.name != "torch":
        # Its products are float32 and may take many times as long, so a tenth of the calls must do.
        row.beside("torch", run.time(theirs, 10 if work.limit == "arithmetic" else 1)[0])


def time_variant(run: Run, variant: Variant) -> Row:
    """One operation in one of the ways in which the model calls it."""
    row = Row(variant.op, variant.name, variant.calls, run.ops.name)
    with row.filled(run.judged):
        args = variant.arguments(run.dtype, run.device)
        call, torchs = getattr(run.ops, variant.op), getattr(load_ops("torch"), variant.op)
        theirs = copies(args)
        expected = torchs(*theirs)
        if run.ops.name != "torch":
            ours = copies(args)
            row.agree(compare([call(*ours), *ours], [expected, *theirs], BOUNDS))
            del ours
        wanted = result_of(variant.op, expected, theirs).clone()
        del theirs, expected
        _time_libraries(run, row, args, wanted)
        del wanted
        work = work_of(variant.op, args)
        _time_both(run, row, work, lambda: call(*args), lambda: torchs(*args))
        if row["library"] is not None:
            row.beside("library", row["libraries_us"][row["library"]])
        if work.limit == "memory":
            row.beside("copy", copy_rate(run.time, run.device, work.bytes // 2)["median_us"])
    return row


def _time_libraries(run: Run, row: Row, args: list[Any], wanted: Tensor) -> None:
    """Time every library call that runs and is right; the fastest is the one to compare with."""
    for name, call in library_calls(row["op"], args, run.device, run.compiled).items():
        try:
            own = copies(args)
            error, bound = compare([result_of(row["op"], call(own), own)], [wanted], LIBRARY_BOUNDS)
            del own
            if error <= bound:
                row["libraries_us"][name] = run.time(partial(call, args))[0]
            else:
                row["absent"][name] = f"its result is off by {error:.1e}"
        except Exception as error:  # a library may lack this shape, type or device: that is said, and not ours to mend
            row["absent"][name] = with_type(error)
    row["library"] = min(row["libraries_us"], key=row["libraries_us"].__getitem__, default=None)


def time_memory_update(run: Run) -> Row:
    """The whole update of the memory over one evicted block, with its new keys and values; random weights."""
    row = Row(MEMORY_UPDATE, "state, keys, values", 1, run.ops.name)
    config, device, dtype = run.model.config, run.device, run.dtype
    with row.filled(run.judged):
        weights, both = RandomTensors(memory_shapes(config), device), (run.ops, load_ops("torch"))
        encoders = [MemoryEncoder(config, weights, ops, device=device, dtype=dtype) for ops in both]
        shape = (2, config.tokens_per_block, config.transformer.num_heads, config.transformer.head_dim)
        k, v = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(dtype)
        state, gate_mean = encoders[0].query_init.clone(), torch.zeros(1, device=device)

        def update(encoder: MemoryEncoder, out: Tensor) -> tuple[Tensor, ...]:
            encoder.update(state, k, v, out, gate_mean)
            return out, *encoder.keys_values(out)

        calls = [partial(update, encoder, torch.full_like(state, float("nan"))) for encoder in encoders]
        row.agree(compare(calls[0](), calls[1](), ROLLOUT_BOUNDS))
        _time_both(run, row, memory_update_work(config, len(k), state.element_size()), *calls)
    return row


def time_library(run: Run) -> Iterator[Row]:
    """What the model asks of a library in every layer but attention: its linear layers, and the norm of a query.

    Held against the same in float32. Float8 takes the rows that a kernel has quantized. Where nvmath-python is
    installed, also what the autotuner selects of cuBLASLt's algorithms.
    """
    config, draws = run.model.config, torch.Generator(run.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draws, device=run.device).to(run.dtype)

    def timed(name: str, calls: int, call: Callable[[], Tensor], exact: Tensor, work: Work) -> Row:
        row = Row(LIBRARY, name, calls, "torch")
        with row.filled(run.judged):
            row.agree(compare([call()], [exact.to(run.dtype)], LIBRARY_BOUNDS))
            row.take(run.time(call), work, run.ceilings)
        return row

    for layer in linear_layers(run.model):
        x, bias = normal(config.tokens_per_block, layer.inputs), normal(layer.outputs)
        weight = normal(layer.outputs, layer.inputs) / layer.inputs**0.5
        in16, exact = Linear(weight, bias), linear(x.float(), weight.float(), bias.float())
        name, flops = f"product {layer.name}", 2 * x.numel() * layer.outputs
        gelu = layer.name == "ffn_in"
        call, wanted = (in16.then_gelu, gelu_tanh(exact)) if gelu else (in16, exact)
        work = Work(2 * (x.numel() + weight.numel() + exact.numel()), flops, "arithmetic")
        yield timed(name, layer.calls, partial(call, x), wanted, work)
        shape = LinearShape(len(x), layer.inputs, layer.outputs, gelu)
        choice = select_linear(shape, run.device, run.dtype, None, None, None)
        if len(choice.timings) > 1:
            call = partial(choice.implementation, x, weight, bias, gelu)
            yield timed(f"{name}, {SEARCHED}: {choice.name}", layer.calls, call, wanted, work)
        if layer.float8 and run.dtype == torch.bfloat16:
            rows, weights = quantize_rows(x.float()), quantize_rows(weight.float())
            values = [each.float() * scale[:, None] for each, scale in (rows, weights)]
            call = partial(product, *rows, *weights, bias)
            work = Work(x.numel() + weight.numel() + 2 * exact.numel(), flops, "arithmetic")
            yield timed(f"{name}, {IN8}", layer.calls, call, linear(values[0], values[1], bias.float()), work)
    x, gamma = (normal(*size, config.transformer.dim) for size in ((config.tokens_per_block,), ()))
    norms = [
        partial(rms_norm, each, x.shape[-1:], gamma.to(each.dtype), config.transformer.eps) for each in (x, x.float())
    ]
    yield timed(QUERY_NORM, layer.calls, norms[0], norms[1](), Work(2 * x.nbytes, 0, "neither"))


# ---- the table


def _setting(arguments: argparse.Namespace) -> Run:
    device = parse_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    ops = load_ops(arguments.backend or {"cuda": "cuda", "cpu": "emulated"}[device.type])
    check_device(ops, device)
    iterations, warmup = _COUNTS[device.type, arguments.quick]
    # On a CPU the emulation of one kernel at the released sizes takes minutes: only who asks for it has to wait.
    model, dtype = _checkout.model_of(arguments), DTYPES[arguments.dtype]
    judged = device.type == "cuda" and model is RELEASED
    compiled = device.type == "cuda" and not arguments.quick
    return Run(device, dtype, ops, model, timer_for(device), iterations, warmup, judged, compiled)


def _notes(run: Run, rows: list[Row]) -> list[str]:
    notes = [
        f"{counted(run.iterations, 'call')} each after {run.warmup}; clock: {run.timer.clock}; backend {run.ops.name}, "
        f"{plain(run.dtype)}, sizes: {run.model.name}.",
    ]
    if not run.judged:
        notes.append("A rehearsal: targets are judged on a GPU at the released sizes alone.")
    if not run.compiled:
        notes.append("torch.compile was not among the libraries.")
    for row in rows:
        where = f"{row['op']} {row['variant']}".strip()
        notes += [f"{where}: {problem}" for problem in row["problems"]]
        notes += [f"{where}: {name} did not run: {why}" for name, why in row["absent"].items()]
    return notes


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Measure and write; whether every row is right, and the page."""
    setting, rows = _setting(arguments), list[Row]()
    tables = {"Ceilings": ([*setting.ceilings.values()], CEILING_COLUMNS), "Kernels": (rows, COLUMNS)}
    header = environment(str(setting.device))  # now, while the clocks are those of a device at work
    facts = {"iterations": setting.iterations, "warmup": setting.warmup, "clock": setting.timer.clock}
    facts |= {"backend": setting.ops.name, "dtype": plain(setting.dtype), "model": setting.model.config.to_flat()}
    page, chosen = "", arguments.op or [*OPS, MEMORY_UPDATE, LIBRARY]
    for op in chosen:
        with torch.inference_mode():
            if op == MEMORY_UPDATE:
                rows.append(time_memory_update(setting))
            elif op == LIBRARY:
                rows += time_library(setting)
            else:
                rows += [time_variant(setting, variant) for variant in variants(op, setting.model)]
        _checkout.say(f"{op}: {', '.join(row['verdict'] for row in rows if row['op'] == op)}")
        # After each, as the time may run out; what has not all been run has not passed.
        passed, notes = op == chosen[-1] and all(row.ok for row in rows), _notes(setting, rows)
        page = _checkout.save(arguments.out, "kernel_times", "Kernels", header, tables, notes, passed=passed, **facts)
    return all(row.ok for row in rows), page


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, dtypes=DTYPES)
    parser.add_argument("--backend", choices=BACKENDS, help="default: cuda on a GPU, emulated on a CPU")
    parser.add_argument(
        "--op", action="append", choices=[*OPS, MEMORY_UPDATE, LIBRARY], help="only this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="fewer calls, and no torch.compile beside them")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
