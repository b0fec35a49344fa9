"""One row of the kernel table: an operation checked against the torch backend, then timed beside what it replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from library_calls import library_calls, result_of
from op_inputs import Variant
from roofline import Ceiling, Work, copy_rate, memory_update_work, work_of
from torch import Tensor

from echo_rt.bench.measure import difference
from echo_rt.bench.settings import BenchModel
from echo_rt.bench.timing import Timer, Times
from echo_rt.model.memory import MemoryEncoder
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8
from echo_rt.verify.bundles import BOUNDS as ROLLOUT_BOUNDS
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_shapes

# The goals of the kernels.
MEMORY_SHARE = 0.85
LIBRARY_SHARE = 0.5
MEMORY_UPDATE_US = 2000.0
CONVOLUTION_TFLOPS = 400.0
# Twice what tests/ops/test_ops.py allows between a backend and the formula: here both sides are rounded.
# float8 is quantized from float32 results that differ by their last bits: some values lie on two sides of a tie.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4, FLOAT8: 4e-3}
# A library rounds on the way where the definition does not.
LIBRARY_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, FLOAT8: 3e-2}


@dataclass(frozen=True)
class Agreement:
    """The worst of a call's tensors: its relative error and the bound it is held to."""

    error: float = 0.0
    bound: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not

    def worse(self, other: Agreement) -> Agreement:
        """Whichever is further from its bound; what is beyond it comes first."""
        if self.ok != other.ok:
            return other if self.ok else self
        return other if other.error * max(self.bound, 1e-30) > self.error * max(other.bound, 1e-30) else self


def compare(actual: Tensor, expected: Tensor, bounds: dict[torch.dtype, float]) -> Agreement:
    """Of one tensor; whole numbers must be the same."""
    return Agreement(difference(actual, expected), bounds.get(expected.dtype, 0.0))


def copies(args: Sequence[Any]) -> list[Any]:
    """The arguments with tensors of their own."""
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def compare_calls(
    actual: tuple[Any, Sequence[Any]], expected: tuple[Any, Sequence[Any]], bounds: dict[torch.dtype, float]
) -> Agreement:
    """Of two calls, each what it returned and its arguments afterwards: the worst of all tensors."""
    worst = Agreement()
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        if isinstance(a, Tensor) != isinstance(e, Tensor):
            return Agreement(float("nan"), 0.0)
        if isinstance(e, Tensor):
            worst = worst.worse(compare(a, e, bounds))
    return worst


@dataclass(frozen=True)
class Run:
    """What all rows of a table have in common.

    ``judged``: whether goals are; ``compiled``: whether torch.compile is among the libraries.
    """

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    model: BenchModel
    timer: Timer
    iterations: int
    warmup: int
    ceilings: dict[str, Ceiling]
    judged: bool
    compiled: bool

    def time(self, call: Callable[[], object]) -> Times:
        return self.timer.measure(call, self.iterations, self.warmup)

    def of_definition(self, work: Work) -> Run:
        """For the torch backend: its products are float32 and may take many times as long, so a few calls must do."""
        if work.limit != "arithmetic":
            return self
        return dataclasses.replace(self, iterations=max(1, self.iterations // 10), warmup=self.warmup // 10)


@dataclass
class Row:
    """One operation in one way of calling it; None is what was not measured, ``problems`` is what went wrong.

    A ratio above 1 says that the kernel is the faster one. ``share`` is that of the measured ceiling, ``copy_share``
    that of a copy of as many bytes. ``absent``: library calls that could not be compared, and why.
    """

    op: str
    variant: str
    calls: int
    backend: str
    bytes: int | None = None
    flops: int | None = None
    limit: str | None = None
    median_us: float | None = None
    p99_us: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    copy_us: float | None = None
    copy_share: float | None = None
    torch_us: float | None = None
    torch_ratio: float | None = None
    library: str | None = None
    library_us: float | None = None
    library_ratio: float | None = None
    libraries_us: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    error_bound: float | None = None
    goals: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    verdict: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result was right and the kernel was timed."""
        return not self.problems and self.median_us is not None

    def take(self, times: Times, work: Work, ceilings: dict[str, Ceiling]) -> None:
        """Fill in the times, and the rate in the unit of what limits the call."""
        self.bytes, self.flops, self.limit = work.bytes, work.flops, work.limit
        self.median_us, self.p99_us = times.median, times.p99
        amount, self.unit = (work.flops / 1e6, "TFLOP/s") if work.limit == "arithmetic" else (work.bytes / 1e3, "GB/s")
        self.rate = amount / times.median
        self.share = None if work.limit == "neither" else self.rate / ceilings[self.unit].value

    def judge(self, judged: bool) -> None:
        """Hold the row against its goals; without ``judged`` they are named and left open."""
        goals: list[tuple[str, bool | None]] = []
        if self.limit == "memory":
            goals.append((f"{MEMORY_SHARE:.0%} of the copy rate", _reached(self.share, MEMORY_SHARE)))
        if self.op in ("memory_attention", "gated_update"):
            goals.append((f"{LIBRARY_SHARE:.0%} of the best library", _reached(self.library_ratio, LIBRARY_SHARE)))
        if self.op in ("causal_conv", "causal_conv_hopper", "upsample_conv"):
            goals.append((f"{CONVOLUTION_TFLOPS:g} TFLOP/s", _reached(self.rate, CONVOLUTION_TFLOPS)))
            goals.append(("no slower than the best library", _reached(self.library_ratio, 1.0)))
        if self.op == "memory_update":
            met = None if self.median_us is None else self.median_us <= MEMORY_UPDATE_US
            goals.append((f"at most {MEMORY_UPDATE_US / 1e3:g} ms", met))
        if self.backend != "torch":
            goals.append(("no slower than torch", _reached(self.torch_ratio, 1.0)))
        self.goals = [{"goal": goal, "met": met if judged else None} for goal, met in goals]
        unmet = [entry["goal"] for entry in self.goals if entry["met"] is False]
        left_open = [entry["goal"] for entry in self.goals if entry["met"] is None]
        if not self.ok:
            self.verdict = "failed"
        elif not judged:
            self.verdict = "not judged"
        else:
            parts = [f"unmet: {', '.join(unmet)}"] if unmet else []
            parts += [f"open: {', '.join(left_open)}"] if left_open else []
            self.verdict = "; ".join(parts) or "met"


def _reached(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def time_variant(run: Run, variant: Variant) -> Row:
    """One operation in one of the ways in which the model calls it."""
    row = Row(variant.op, variant.name, variant.calls, run.ops.name)
    try:
        args = variant.arguments(run.dtype, run.device)
        call, torchs = getattr(run.ops, variant.op), getattr(load_ops("torch"), variant.op)
        theirs = copies(args)
        expected = (torchs(*theirs), theirs)
        if run.ops.name != "torch":
            ours = copies(args)
            _note_agreement(row, compare_calls((call(*ours), ours), expected, BOUNDS))
            del ours
        wanted = result_of(variant.op, *expected).clone()
        del theirs, expected
        _time_libraries(run, row, variant, args, wanted)
        del wanted
        work = work_of(variant.op, args)
        row.take(run.time(lambda: call(*args)), work, run.ceilings)
        assert row.median_us is not None
        if run.ops.name != "torch":
            row.torch_us = run.of_definition(work).time(lambda: torchs(*args)).median
            row.torch_ratio = row.torch_us / row.median_us
        if row.library_us is not None:
            row.library_ratio = row.library_us / row.median_us
        if work.limit == "memory":
            copy = copy_rate(run.timer, run.device, work.bytes // 2, run.iterations, run.warmup)
            row.copy_us, row.copy_share = copy.median_us, copy.median_us / row.median_us
    except Exception as error:  # whatever a kernel, driver or library raises is this row's finding; others go on
        row.problems.append(_first_line(error))
    row.judge(run.judged)
    return row


def _note_agreement(row: Row, found: Agreement) -> None:
    row.error, row.error_bound = found.error, found.bound
    if not found.ok:
        row.problems.append(f"differs from the torch backend by {found.error:.1e}, allowed are {found.bound:.1e}")


def _time_libraries(run: Run, row: Row, variant: Variant, args: list[Any], wanted: torch.Tensor) -> None:
    """Time every library call that runs and is right; the fastest is the one to compare with."""
    for library in library_calls(variant.op, args, run.device, run.compiled):
        try:
            own = copies(args)
            result = result_of(variant.op, library.call(own), own)
            found = compare(result, wanted, LIBRARY_BOUNDS)
            if library.whole and not found.ok:
                row.absent[library.name] = f"its result is off by {found.error:.1e}"
                continue
            del own, result
            row.libraries_us[library.name] = run.time(lambda call=library.call: call(args)).median
        except Exception as error:  # a library may lack this shape, type or device: that is said, and not ours to mend
            row.absent[library.name] = _first_line(error)
    if row.libraries_us:
        row.library = min(row.libraries_us, key=lambda name: row.libraries_us[name])
        row.library_us = row.libraries_us[row.library]


def time_memory_update(run: Run) -> Row:
    """The whole update of the memory over one evicted block, with its new keys and values; random weights."""
    from random_model import random_weights

    row = Row("memory_update", "state, keys, values", 1, run.ops.name)
    try:
        config = run.model.config
        # A transformer of one layer: its weights are drawn with the memory's and not used.
        shallow = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, num_layers=1))
        drawn = random_weights(shallow.to_flat())
        own = {name: drawn[MEMORY_PREFIX + name] for name in memory_shapes(config)}
        encoders = [
            MemoryEncoder(config, own, ops, device=run.device, dtype=run.dtype) for ops in (run.ops, load_ops("torch"))
        ]
        heads = (config.transformer.num_heads, config.transformer.head_dim)
        generator = torch.Generator(run.device).manual_seed(1)
        k, v = torch.empty(2, config.tokens_per_block, *heads, device=run.device, dtype=run.dtype).normal_(
            generator=generator
        )
        state = encoders[0].query_init.clone()
        gate_mean = torch.zeros(1, device=run.device)

        def update(encoder: MemoryEncoder, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            encoder.update(state, k, v, out, gate_mean)
            return out, *encoder.keys_values(out)

        outs = [torch.full_like(state, float("nan")) for _ in encoders]
        results = [(None, update(encoder, out)) for encoder, out in zip(encoders, outs, strict=True)]
        _note_agreement(row, compare_calls(results[0], results[1], ROLLOUT_BOUNDS))
        work = memory_update_work(config, len(k), state.element_size())
        row.take(run.time(lambda: update(encoders[0], outs[0])), work, run.ceilings)
        assert row.median_us is not None
        if run.ops.name != "torch":
            row.torch_us = run.time(lambda: update(encoders[1], outs[1])).median
            row.torch_ratio = row.torch_us / row.median_us
    except Exception as error:  # as above
        row.problems.append(_first_line(error))
    row.judge(run.judged)
    return row
