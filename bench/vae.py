"""The VAE's decoder, stage by stage, beside others: ``python bench/vae.py --out DIR`` writes vae.json and vae.md.

Exit code 0 if ours was right and timed, 1 if not, 2 for arguments that cannot be had. An unmet goal is a number like
any other: it is printed, and is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
from vae_decoders import DIFFUSERS, OURS, PUBLISHED
from vae_run import Measured, VaeRequest, VaeRun, run

from echo_rt.bench.report import TARGET_COLUMNS
from echo_rt.bench.settings import MODELS
from echo_rt.bench.tables import Column, check_results_folder, write_results
from echo_rt.bench.targets import Target, verdict
from echo_rt.bench.timing import DEVICE_CLOCK, Times
from echo_rt.cli.arguments import parse_path
from echo_rt.cli.model_options import BACKEND_HELP
from echo_rt.errors import EchoError
from echo_rt.ops.backends import BACKENDS
from echo_rt.options import VAE_DTYPE_NAMES
from echo_rt.utils.wording import counted, plain

WHOLE = "whole"
TITLE = "VAE decoder"

_STAGES = (
    Column("decoder", "decoder", text=True),
    Column("stage", "stage", text=True),
    Column("tflop", "TFLOP a block", ".4g"),
    Column("ms", "ms a block", ".2f"),
    Column("p99_ms", "p99", ".2f"),
    Column("tflops", "TFLOP/s", ".4g"),
    Column("ours_ratio", "x ours", ".2f"),
)
_CONVOLUTIONS = (
    Column("stage", "stage", text=True),
    Column("calls", "convolutions"),
    Column("tflop", "TFLOP a block", ".4g"),
    Column("ms", "ms a block", ".2f"),
    Column("tflops", "TFLOP/s", ".4g"),
    Column("share", "of the stage's time", ".0%"),
    Column("kinds", "computed by", text=True),
)
_DECODERS = (
    Column("decoder", "decoder", text=True),
    Column("error", "error", ".1e"),
    Column("bound", "bound", ".1e"),
    Column("state_mb", "state, counted (MB)", ".2f"),
    Column("steady_mb", "steady (MB)", ".1f"),
    Column("peak_mb", "peak (MB)", ".1f"),
    Column("what", "", text=True),
)
_MOST_MS, _LEAST_TFLOPS, _LEAST_RATIO = 100, 400, 2.5


def _milliseconds(times: Times) -> tuple[float, float]:
    return times.median / 1e3, times.p99 / 1e3


def _rate(run: VaeRun, flops: int, ms: float) -> float | None:
    """TFLOP/s; of a rehearsal there is none."""
    return flops / 1e9 / ms if run.clock == DEVICE_CLOCK else None


def _stage_rows(run: VaeRun) -> Iterator[dict[str, Any]]:
    ours = run.find(OURS)
    whole = sum(stage.flops for stage in run.stages)
    work = {**{stage.name: stage.flops for stage in run.stages}, WHOLE: whole}
    for each in run.measured:
        if each.whole is None:
            continue
        own = None if ours is None or ours.whole is None else [*ours.stages, ours.whole]
        for place, (times, (name, flops)) in enumerate(zip([*each.stages, each.whole], work.items(), strict=True)):
            ms, p99 = _milliseconds(times)
            yield {
                "decoder": each.name,
                "stage": name,
                "tflop": flops / 1e12,
                "ms": ms,
                "p99_ms": p99,
                "tflops": _rate(run, flops, ms),
                "ours_ratio": None if own is None else times.median / own[place].median,
            }


def _convolution_rows(run: VaeRun) -> Iterator[dict[str, Any]]:
    ours = run.find(OURS)
    if ours is None or ours.whole is None:
        return
    flops = [sum(product.flops for product in stage.convolutions) for stage in run.stages]
    counts = [len(stage.convolutions) for stage in run.stages]
    names = [stage.name for stage in run.stages]
    alone = [times.median / 1e3 for times in ours.convolutions]
    stages = [times.median / 1e3 for times in ours.stages]
    rows = list(zip(names, counts, flops, alone, stages, strict=True))
    rows.append((WHOLE, sum(counts), sum(flops), sum(alone), ours.whole.median / 1e3))
    by_stage = [[ours.kinds[product.name.removesuffix(".weight")] for product in s.convolutions] for s in run.stages]
    by_stage.append([kind for used in by_stage for kind in used])
    for (name, count, work, ms, of), used in zip(rows, by_stage, strict=True):
        yield {
            "stage": name,
            "calls": count,
            "tflop": work / 1e12,
            "ms": ms,
            "tflops": _rate(run, work, ms),
            "share": ms / of,
            "kinds": ", ".join(f"{used.count(kind)} {kind}" for kind in dict.fromkeys(used)),
        }


def _decoder_row(each: Measured) -> dict[str, Any]:
    memory = {"state": each.memory.state, "steady": each.memory.steady, "peak": each.memory.peak}
    return {
        "decoder": each.name,
        "error": each.error,
        "bound": each.bound,
        **{f"{name}_bytes": value for name, value in memory.items()},
        **{f"{name}_mb": None if value is None else value / 1e6 for name, value in memory.items()},
        "what": each.what if each.ok else f"not timed: it computes something else; {each.what}",
    }


def goals(run: VaeRun) -> list[Target]:
    """Every goal with its value and verdict: ``open`` where what it needs was not measured."""
    ours, peer = run.find(OURS), run.find(DIFFUSERS)
    ms = ours.whole.median / 1e3 if ours is not None and ours.whole is not None else None
    rate = None if ms is None else sum(stage.flops for stage in run.stages) / 1e9 / ms
    ratio = None if ms is None or peer is None or peer.whole is None else peer.whole.median / 1e3 / ms
    rules = (
        (f"VAE decode: at most {_MOST_MS} ms a block", ms, "ms", ms is not None and ms <= _MOST_MS),
        (f"at least {_LEAST_TFLOPS} TFLOP/s", rate, "TFLOP/s", rate is not None and rate >= _LEAST_TFLOPS),
        (f"at least {_LEAST_RATIO} times diffusers", ratio, "x", ratio is not None and ratio >= _LEAST_RATIO),
    )
    return [Target(name, value, unit, verdict(None if value is None else met)) for name, value, unit, met in rules]


def notes(run: VaeRun) -> list[str]:
    """How the figures were come by."""
    width, height = run.frames
    lines = [] if run.clock == DEVICE_CLOCK else ["Times of the host clock on a CPU: a rehearsal, no results."]
    lines += [
        f"Random weights at the {run.size} sizes; {width}x{height}; a block of {counted(run.latents, 'latent')} in "
        f"mid-stream, {counted(run.stages[-1].given.frames, 'frame')}; {plain(run.dtype)}; backend "
        f"{run.backend.name} for ours ({run.backend.reason}).",
        f"{counted(run.blocks, 'call')} of each, median and 99th percentile; clock: {run.clock}. Launches are not in a "
        "time, and no graph is replayed.",
        "A stage is a resolution: what enlarges pictures to it and the blocks that follow; the lowest has the first "
        "convolution and the middle as well. Each is run alone over random activations of a block, so the stages need "
        "not add up to the whole.",
        "TFLOP are counted from the shapes of the weights, twice the multiply-adds, for all decoders the same, however "
        "many of them one does.",
        "Convolutions: those of ours that look at more than a point, alone, on the same shapes and in the same slices; "
        "doubling pixels is part of the one that does it. The last line is their sum beside the whole.",
        f"Error: relative, of the block's video, against the {PUBLISHED} in float32. What differs is not timed.",
        "State: bytes that a decoder says it keeps of a stream between two blocks, with room that it works in. Steady "
        "and peak are the allocator's, weights in both; the video that is handed out in the peak.",
    ]
    if not run.judged:
        lines.append("Goals are judged on a GPU alone, at the released sizes in bfloat16.")
    return lines + [f"Not measured: {each.name}: {each.why}." for each in run.missing]


def write(run: VaeRun, folder: Path) -> str:
    """``vae.json`` and ``vae.md`` in ``folder``; gives the text of the latter."""
    tables: dict[str, Any] = {
        "Stages": (list(_stage_rows(run)), _STAGES),
        "Convolutions": (list(_convolution_rows(run)), _CONVOLUTIONS),
        "Decoders": ([_decoder_row(each) for each in run.measured], _DECODERS),
    }
    if run.judged:
        tables["Goals"] = (goals(run), TARGET_COLUMNS)
    return write_results(
        folder,
        "vae",
        TITLE,
        run.header,
        tables,
        notes(run),
        passed=run.passed,
        complete=run.complete,
        clock=run.clock,
        backend=run.backend.name,
        backend_reason=run.backend.reason,
        judged=run.judged,
        times_us={
            each.name: {
                WHOLE: each.whole.microseconds,
                **{stage.name: times.microseconds for stage, times in zip(run.stages, each.stages, strict=True)},
            }
            for each in run.measured
            if each.whole is not None
        },
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    parser.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    parser.add_argument("--width", type=int, help="of the video, in pixels; default: that of the size")
    parser.add_argument("--height", type=int, help="the same")
    parser.add_argument("--dtype", choices=VAE_DTYPE_NAMES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--backend", choices=BACKENDS, help=f"of ours: {BACKEND_HELP}")
    parser.add_argument("--convolution", metavar="NAME[,NAME]", help="of ours; default: what a trial finds fastest")
    parser.add_argument("--blocks", type=int, help="timed blocks of each")
    parser.add_argument("--quick", action="store_true", help="fewer blocks")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="others' code too")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = vars(_arguments(argv))
    out = arguments.pop("out")
    try:
        check_results_folder(out)
        found = run(
            VaeRequest(**arguments),
            say=lambda text: print(text, file=sys.stderr, flush=True),
            save=lambda run: write(run, out),  # the time may run out
        )
        print(write(found, out))
    except EchoError as error:
        print(f"vae.py: {error}", file=sys.stderr)
        return 2
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
