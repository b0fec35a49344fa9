"""``python bench/environment.py``: what this machine is, as the header of every result has it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import _checkout  # noqa: F401
import torch

from echo_rt.bench.tables import environment
from echo_rt.errors import EchoError
from echo_rt.utils.device import parse_device


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Print what this machine is, as the header of every benchmark.")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write environment.json there, too")
    options = parser.parse_args(arguments)
    try:
        parse_device(options.device)
    except EchoError as error:
        none = "" if torch.cuda.is_available() or not options.device.startswith("cuda") else "no GPU: "
        print(f"environment.py: {none}{error}; torch is {torch.__version__}", file=sys.stderr)
        return 2
    text = json.dumps(environment(options.device), indent=2)
    print(text)
    if options.out is not None:
        (options.out / "environment.json").write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
