"""What the scripts here share: importing this makes a bare checkout importable; how arguments are taken and errors end.

Importable are the package that lies in the checkout, the inputs that its tests use, and the scripts of this folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

for _folder in (ROOT / "bench", ROOT / "tests", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from echo_rt.bench.settings import MODELS, RELEASED, TINY, BenchModel  # noqa: E402
from echo_rt.bench.tables import results, write_results  # noqa: E402
from echo_rt.errors import EchoError  # noqa: E402
from echo_rt.utils.atomic_file import check_results_folder  # noqa: E402


def _path(text: str) -> Path:
    if not text:  # of an unset variable, for example
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def parser(
    doc: str | None, *, out: bool | None = True, sizes: bool = True, dtypes: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser of what most scripts are asked: --out (None: if wanted), --device, --size and one of ``dtypes``."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.set_defaults(out=None)
    if out is not False:
        found.add_argument("--out", type=_path, required=bool(out), metavar="DIR", help="folder for the results")
    found.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    if sizes:
        found.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    if dtypes:
        found.add_argument("--dtype", choices=list(dtypes), default="bfloat16", help="default: bfloat16")
    return found


def model_of(arguments: argparse.Namespace) -> BenchModel:
    """The sizes that were asked for, or those that end in time on the device."""
    return MODELS[arguments.size or (TINY if arguments.device == "cpu" else RELEASED).name]


def save(out: Path, name: str, *args: Any, **facts: Any) -> str:
    """Write ``name.json`` and ``name.md``: the arguments are those of :func:`echo_rt.bench.tables.results`."""
    return write_results(out, name, *results(*args, **facts))


def run(script: str, work: Callable[[argparse.Namespace], tuple[bool, str]], arguments: argparse.Namespace) -> int:
    """Print the page that ``work`` returns. The exit code: 0 passed, 1 not, 2 for arguments that cannot be had."""
    try:
        if arguments.out is not None:
            check_results_folder(arguments.out)
        passed, page = work(arguments)
    except EchoError as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0 if passed else 1


def say(text: str) -> None:
    """Tell how far the script has come."""
    print(text, file=sys.stderr, flush=True)
