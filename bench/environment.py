"""What this machine is, as in the header of every result: ``python bench/environment.py`` prints it."""

from __future__ import annotations

import argparse
import json
import sys

import _checkout

from echo_rt.bench.tables import environment
from echo_rt.errors import BackendError
from echo_rt.utils.device import parse_device


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Describe the machine, and write environment.json where there is a folder for it."""
    try:
        parse_device(arguments.device)
    except BackendError as error:
        raise BackendError(f"no GPU: {error}") from error
    text = json.dumps(environment(arguments.device), indent=2)
    if arguments.out is not None:
        (arguments.out / "environment.json").write_text(f"{text}\n", encoding="utf-8")
    return True, text


if __name__ == "__main__":
    sys.exit(_checkout.run(__file__, run, _checkout.parser(__doc__, out=None, sizes=False).parse_args()))
