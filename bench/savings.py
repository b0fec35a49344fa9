"""What each exact saving gives at best: ``python bench/savings.py --out DIR`` writes savings.json and savings.md.

``--counts`` prints what is counted for an H200 at the released sizes and measures nothing (docs/savings.md). Exit code
0 if all was right and measured, 1 if not, 2 for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401
import torch
from ceilings import measure_ceilings

from echo_rt.bench.model_sizes import MODELS, RELEASED
from echo_rt.bench.request import Request
from echo_rt.bench.savings import COLUMNS, Effort, counted_rows, measure, write
from echo_rt.bench.savings_counts import H200, Counts, Limits
from echo_rt.bench.tables import check_results_folder, markdown
from echo_rt.bench.timing import Timer, timer_for
from echo_rt.cli.model_options import BACKEND_HELP
from echo_rt.cli.paths import parse_path
from echo_rt.errors import EchoError
from echo_rt.utils.device import DTYPES, parse_device, parse_dtype

# By device, quick or not.
_EFFORTS = {
    ("cuda", False): Effort(rounds=5, blocks=5, calls=5, warmup=2),
    ("cuda", True): Effort(rounds=2, blocks=3, calls=3, warmup=1),
    ("cpu", False): Effort(rounds=2, blocks=2, calls=2, warmup=0),
    ("cpu", True): Effort(rounds=1, blocks=1, calls=1, warmup=0),
}
# Calls that a ceiling is the median of.
_CEILING_CALLS = {"cuda": 20, "cpu": 3}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=parse_path, metavar="DIR", help="folder for the results")
    what.add_argument("--counts", action="store_true", help="print the counts alone")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (a rehearsal); default: cuda")
    parser.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--backend", help=BACKEND_HELP)
    parser.add_argument("--attention", metavar="NAME", help="default: the fastest")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and calls")
    return parser.parse_args(argv)


def _limits(timer: Timer, device: torch.device, dtype: torch.dtype) -> Limits:
    """Of this device, now. On a CPU what is counted is arithmetic without a meaning."""
    found = measure_ceilings(timer, device, dtype, _CEILING_CALLS[device.type], warmup=1)
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Limits(1e12 * found["TFLOP/s"].value, 1e9 * found["GB/s"].value, cores)


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    if arguments.counts:
        text = RELEASED.config.transformer.text_len
        rows = counted_rows(Counts(RELEASED.config, H200), (text // 16, text // 4, text // 2))
        print(markdown(rows, [column for column in COLUMNS if column.key not in ("counted_ms", "problem")]), end="")
        return 0
    try:
        check_results_folder(arguments.out)
        device = parse_device(arguments.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events are recorded on the current one
        names = ("size", "dtype", "backend", "attention")
        request = Request(device=str(device), **{name: getattr(arguments, name) for name in names})
        timer = timer_for(device)
        limits = _limits(timer, device, parse_dtype(arguments.dtype, device))
        found = measure(request, device, timer, limits, _EFFORTS[device.type, arguments.quick])
        print(write(found, arguments.out))
    except EchoError as error:
        print(f"savings.py: {error}", file=sys.stderr)
        return 2
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
