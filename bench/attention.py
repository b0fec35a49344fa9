"""Every attention at a model's shapes: ``python bench/attention.py --out DIR``.

Each one is held against float64 and timed as the steady state runs it, from a CUDA graph: over the KV buffer those of
the model's dtype and the libraries for a float8 cache, then those over the text. Exit code 0 if one of each was right
and timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import _checkout
import torch
from timing import HostTimer

from echo_rt.attention import AttentionCandidate, AttentionCheck, AttentionShapes, implementations
from echo_rt.attention.backends import FLOAT8_LIBRARIES
from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.bench.run import HOST_CLOCK
from echo_rt.bench.runner import median_p99
from echo_rt.bench.tables import columns, environment
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import DTYPES, FLOAT8, model_context, parse_device
from echo_rt.utils.wording import first_line, plain

COLUMNS = columns(
    "name|attention", "dtype|dtype", "ms|ms a call|.4f", "p99_ms|p99|.4f", "tflops|TFLOP/s|.1f", "error|error|.1e",
    "note|",
)  # fmt: skip
_CALLS = {"cuda": 30, "cpu": 3}


def measure(kind: AttentionCandidate, check: AttentionCheck, bound: float) -> dict[str, Any]:
    """One attention, first right and then fast: entries of its row; whatever a library raises is the finding."""
    calls = _CALLS[check.device.type]
    try:
        attention = kind.load()
        error = check.error(attention)
        if not error <= bound:  # NaN is not
            return {"error": error, "note": f"wrong: expected an error of at most {bound:.1e}"}
        if check.device.type == "cuda":
            watch = check.stopwatch(attention)
            ms = [watch() for _ in range(calls)]
        else:
            ms = [each / 1e3 for each in HostTimer().measure(check.call(attention), calls, 1)]
    except Exception as problem:
        return {"note": first_line(problem)}
    median, p99 = median_p99(ms)
    return {"ms": median, "p99_ms": p99, "error": error}


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Measure and write; whether one was right and timed, and the page."""
    device, dtype = parse_device(arguments.device), DTYPES[arguments.dtype]
    on_gpu, config = device.type == "cuda", _checkout.model_of(arguments).config
    heads, size = config.transformer.num_heads, config.transformer.head_dim
    over_cache = AttentionShapes(config.tokens_per_block, config.cached_tokens, heads, size)
    over_text = replace(over_cache, keys=config.transformer.text_len)
    clock = "device events around a CUDA graph" if on_gpu else HOST_CLOCK
    notes = [
        f"{over_cache}, or {over_text.keys} of the text; {_CALLS[device.type]} calls; clock: {clock}.",
        "In float8, queries, keys and values are float8 already: times have no quantization in them.",
    ]
    tables = {place: (list[dict[str, Any]](), COLUMNS) for place in ("Attention", "Attention over the text")}
    kinds = implementations(load_ops("cuda" if on_gpu else "torch"))
    candidates = ((*kinds, *FLOAT8_LIBRARIES), kinds)
    save = partial(_checkout.save, arguments.out, "attention", "Attention", environment(str(device)), tables, notes)
    with torch.inference_mode(), model_context(device, dtype):
        for (place, (rows, _)), shape, able in zip(tables.items(), (over_cache, over_text), candidates, strict=True):
            for kind in able:
                own = FLOAT8 if kind in FLOAT8_LIBRARIES else dtype
                if why := kind.obstacle(device, own, shape) or ("" if kind.fused else "it holds all scores in memory"):
                    found: dict[str, Any] = {"note": why}
                else:
                    found = measure(kind, AttentionCheck(shape, device, own), TOLERANCES[own])
                row = dict.fromkeys(column.key for column in COLUMNS) | {"name": kind.name, "note": ""} | found
                flops = 4 * shape.queries * shape.keys * heads * size
                row["dtype"] = plain(own)
                row["tflops"] = flops / row["ms"] / 1e9 if on_gpu and row["ms"] is not None else None
                rows.append(row)
                _checkout.say(f"{place}, {kind.name}: {row['note'] or format(row['ms'], '.3f') + ' ms'}")
                save(passed=False)  # the time may run out
    passed = all(any(row["ms"] is not None for row in rows) for rows, _ in tables.values())
    return passed, save(passed=passed)


def main(argv: Sequence[str]) -> int:
    return _checkout.run(__file__, run, _checkout.parser(__doc__, dtypes=DTYPES).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
