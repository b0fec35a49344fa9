"""The program that kernel.sh profiles: some calls of one operation at the sizes of a model, and nothing else.

The profiler listens from its first call on; what comes before (the inputs, one call to warm up) is not recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _checkout
import torch
from op_inputs import OPS, variants

from echo_rt.bench.settings import MODELS
from echo_rt.errors import ConfigError
from echo_rt.ops.backends import BACKENDS, check_device, load_ops
from echo_rt.utils.device import DTYPES, parse_device
from echo_rt.utils.wording import counted


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """One call, then ``--launches`` of them for the profiler; what was called, in words."""
    device, ops = parse_device(arguments.device), load_ops(arguments.backend)
    check_device(ops, device)
    if arguments.launches < 1:
        raise ConfigError(f"--launches must be at least 1, got {arguments.launches}")
    calls = {variant.name: variant for variant in variants(arguments.op, MODELS[arguments.size or "released"])}
    name = next(iter(calls)) if arguments.call is None else arguments.call
    if name not in calls:
        raise ConfigError(f"--call of {arguments.op} must be one of {', '.join(map(repr, calls))}; got {name!r}")
    function, inputs = getattr(ops, arguments.op), calls[name].arguments(DTYPES[arguments.dtype], device)
    with torch.inference_mode():
        function(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        for _ in range(arguments.launches):
            function(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
    words = f"{arguments.op} {name}".rstrip()
    return True, f"{words}: {counted(arguments.launches, 'call')}, backend {ops.name}, {device}"


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, out=False, dtypes=DTYPES)  # on a CPU nothing is profiled
    parser.add_argument("op", choices=OPS, help="the operation")
    parser.add_argument("--call", help="which of its calls, as bench/kernel_times.py names them; default: the first")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda", help="default: cuda")
    parser.add_argument("--launches", type=int, default=3, metavar="N", help="calls that are profiled; default: 3")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
