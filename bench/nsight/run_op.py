"""The program that kernel.sh profiles: some calls of one operation at the sizes of a model, and nothing else.

The profiler listens from its first call on; what comes before (the inputs, one call to warm up) is not recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _bench  # noqa: F401
import torch
from op_inputs import OPS, Variant, variants

from echo_rt.bench.settings import MODELS
from echo_rt.errors import ConfigError, EchoError
from echo_rt.ops.backends import BACKENDS, check_device, load_ops
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import DTYPES, parse_device
from echo_rt.utils.wording import counted


def choose(op: str, model: str, call: str | None) -> Variant:
    """The call named ``call``, or the first; :class:`ConfigError` names those that there are."""
    found = variants(op, MODELS[model])
    if call is None:
        return found[0]
    for variant in found:
        if variant.name == call:
            return variant
    names = ", ".join(repr(variant.name) for variant in found)
    raise ConfigError(f"--call of {op} must be one of {names}; got {call!r}")


def run(ops: Ops, variant: Variant, dtype: torch.dtype, device: torch.device, launches: int) -> None:
    """One call, then ``launches`` of them for the profiler."""
    if launches < 1:
        raise ConfigError(f"--launches must be at least 1, got {launches}")
    function = getattr(ops, variant.op)
    arguments = variant.arguments(dtype, device)
    function(*arguments)
    profiled = device.type == "cuda"
    if profiled:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
    for _ in range(launches):
        function(*arguments)
    if profiled:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS, help="the operation")
    parser.add_argument("--call", help="which of its calls, as bench/kernel_times.py names them; default: the first")
    parser.add_argument("--size", choices=MODELS, default="released", help="default: released")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda", help="default: cuda")
    parser.add_argument("--device", default="cuda", help="default: cuda; on a CPU nothing is profiled")
    parser.add_argument("--launches", type=int, default=3, metavar="N", help="calls that are profiled; default: 3")
    arguments = parser.parse_args(argv)
    try:
        device = parse_device(arguments.device)
        ops = load_ops(arguments.backend)
        check_device(ops, device)
        variant = choose(arguments.op, arguments.size, arguments.call)
        with torch.inference_mode():
            run(ops, variant, DTYPES[arguments.dtype], device, arguments.launches)
    except EchoError as error:
        print(f"run_op.py: {error}", file=sys.stderr)
        return 2
    calls = counted(arguments.launches, "call")
    print(f"{variant.op} {variant.name}".rstrip() + f": {calls}, backend {ops.name}, {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
