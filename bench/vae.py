"""The VAE's decoder, stage by stage, beside others: ``python bench/vae.py --out DIR`` writes vae.json and vae.md.

Exit code 0 if ours was right and timed, 1 if not, 2 for arguments that cannot be had. An unmet goal is a number like
any other: it is printed, and is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from echo_rt.bench.model_sizes import MODELS
from echo_rt.bench.tables import check_results_folder
from echo_rt.bench.vae_report import write
from echo_rt.bench.vae_run import VaeRequest, run
from echo_rt.cli.model_options import BACKEND_HELP
from echo_rt.cli.paths import parse_path
from echo_rt.errors import EchoError
from echo_rt.ops.backends import BACKENDS
from echo_rt.options import VAE_DTYPE_NAMES


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
