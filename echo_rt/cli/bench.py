"""``echo-rt bench``: how fast a whole block is, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_rt.bench.settings import MODELS, NAMES
from echo_rt.cli.arguments import parse_number, parse_positive
from echo_rt.cli.model_options import (
    BACKEND_HELP,
    add_float8_except,
    add_lora,
    add_no_graphs,
    add_recipe,
    parse_ahead,
    parse_lora_alpha,
    parse_tiles,
)
from echo_rt.cli.outputs import Named, check_apart
from echo_rt.cli.paths import parse_path
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import TargetError
from echo_rt.options import DTYPE_NAMES

_EPILOG = """
Nothing is downloaded: without --model the weights are random. On a GPU these are the released sizes (Wan2.1-T2V-1.3B at
832x480), on a CPU tiny ones, whose times show that it works and are no results.
Exit codes: 0 all variants were right and measured; 1 one differs from the torch backend, or a stage of it could not be
captured as a CUDA graph, and it was measured without graphs; 2 a mistake in the request, or a GPU with too little
memory.
"""


_FILES = ("model", "checkpoint")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a whole block on this machine",
        description="Measure a whole block in the steady state: transformer, memory update, VAE, frames on the host; "
        "with the memory evolving, at its prior and off, against the torch backend and what else is installed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=MODELS, help="random weights at these sizes; default: released on a GPU")
    model.add_argument("--model", type=parse_path, metavar="DIR", help="a Wan2.1 folder instead, original or diffusers")
    model.add_argument("--checkpoint", type=parse_path, metavar="FILE", help="generator weights that go with it")
    add_lora(model)
    add_recipe(model)
    model.add_argument("--dtype", choices=DTYPE_NAMES, help="default: bfloat16 on a GPU, else float32")
    add_float8_except(model)
    model.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    model.add_argument("--backend", help=BACKEND_HELP)
    model.add_argument("--attention", metavar="NAME", help="which attention; default: the fastest (see echo-rt doctor)")
    model.add_argument(
        "--convolution", metavar="NAME[,NAME]", help="how the VAE's convolutions are computed (see echo-rt doctor)"
    )
    model.add_argument("--vae-tiles", metavar="N", help="decode in N bands of rows; default: 1")
    add_no_graphs(model)
    model.add_argument("--seed", default="0", metavar="N", help="of weights, prompt and noise (default 0)")

    run = parser.add_argument_group("run")
    run.add_argument("--variants", metavar="NAME,...", help=f"only these of {', '.join(NAMES)}")
    run.add_argument("--lookahead", default="1", metavar="N", help="blocks begun ahead in a stream (default 1)")
    run.add_argument("--rounds", metavar="N", help="how often the variants take turns; default: 5 on a GPU, else 2")
    run.add_argument("--blocks", metavar="N", help="measured blocks of each turn; default: 10 on a GPU, else 2")
    run.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="others' code too, where installed"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=parse_path, metavar="DIR", help="write block.json, block.md and block.png there")
    output.add_argument("--chart", action=argparse.BooleanOptionalAction, help="block.png; default: if possible")
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Measure, print and write; the exit code says whether all was right."""
    expected = "an integer of 1 or more"
    counts = {
        name: parse_positive(f"--{name}", getattr(arguments, name), int, expected) for name in ("rounds", "blocks")
    }
    lookahead = parse_ahead(arguments.lookahead)
    tiles = parse_tiles(arguments.vae_tiles)
    seed = parse_number("--seed", arguments.seed, int, "an integer of 0 or more")
    variants = None if arguments.variants is None else tuple(arguments.variants.split(","))
    with stop.interruptible():
        from echo_rt.bench.report import Report
        from echo_rt.bench.request import Request
        from echo_rt.bench.run import Run
        from echo_rt.bench.run import run as run_bench
        from echo_rt.bench.tables import can_draw, require_matplotlib

        if arguments.chart and arguments.out is None:
            raise TargetError("--chart: expected --out DIR, the folder to draw it into")
        if arguments.chart:
            require_matplotlib()
        read = [Named(f"--{name}", path) for name in _FILES if (path := getattr(arguments, name)) is not None]
        _check_folder(arguments.out, [*read, *(Named("--lora", path) for path, _ in arguments.lora)])
        names = {field.name for field in dataclasses.fields(Request)}
        facts: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
        facts |= {given.option.removeprefix("--"): str(given.path) for given in read}
        facts |= {"lora": tuple(arguments.lora) or None, "lora_alpha": parse_lora_alpha(arguments)}
        facts |= counts | {"float8_except": tuple(arguments.float8_except), "vae_tiles": tiles, "seed": seed}
        request = Request(**facts | {"variants": variants, "lookahead": lookahead})

        def save(run: Run) -> None:  # the time may run out
            if arguments.out is not None:
                Report(run).write(arguments.out, picture=False)

        found = Report(run_bench(request, say=lambda text: complain(f"echo-rt: {text}"), save=save))
    content, page = found.content()
    report.update(content)
    if arguments.out is not None:
        picture = can_draw() if arguments.chart is None else arguments.chart
        files = found.write(arguments.out, picture=picture)
        report["files"] = [str(path) for path in files]
    if not arguments.json:
        say(page, end="")
    return 0 if found.run.passed else 1


def _check_folder(out: Path | None, read: Sequence[Named]) -> None:
    """Raises ``TargetError`` now, and not after the run, where nothing can be written into ``out``.

    ``ConfigError`` where that is not apart from what is ``read``.
    """
    if out is None:
        return
    check_apart(Named("--out", out), read)
    from echo_rt.bench.tables import check_results_folder
    from echo_rt.utils.atomic_file import check_writable, reason

    check_results_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{out}: cannot make the folder: {reason(error)}") from None
    check_writable(out / "block.json")
