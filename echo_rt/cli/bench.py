"""``echo-rt bench``: how fast a whole block is, on this machine."""

from __future__ import annotations

from typing import Any

import click

from echo_rt.bench.settings import MODELS, NAMES, Request
from echo_rt.cli.arguments import Arguments, Value, model_files, options_of, require, shared, table
from echo_rt.cli.outputs import Named, check_results
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import BackendError
from echo_rt.utils.atomic_file import check_writable
from echo_rt.utils.signals import StopRequest

DESCRIPTION = """
Measure a whole block in the steady state: transformer, memory update, VAE, frames on the host. Variants are the memory
evolving, at its prior and off, a run without CUDA graphs, the torch backend, and other code that is installed.
"""
EPILOG = """
Nothing is downloaded: without --model the weights are random. A GPU runs the released sizes (Wan2.1-T2V-1.3B at
832x480), a CPU tiny ones, whose times show that it works and are no results.

Exit codes: 0 all variants were right and measured; 1 a variant differs from the torch backend, or could not be captured
as CUDA graphs and was measured without them; 2 a mistake in the request, or a GPU with too little memory.
"""
_SHARED = (
    *("--model", "--checkpoint", "--lora", "--lora-alpha", "--recipe", "--ema", "--dtype", "--float8-except"),
    *("--device", "--backend", "--attention", "--linear", "--convolution", "--vae-tiles", "--no-graphs", "--seed"),
)
_MODEL = "--size NAME           random weights at these sizes; default: released on a GPU"
_RUN = f"""
--variants NAME,...           only these of {", ".join(NAMES)}
--rounds N                    turns of each variant; default: 5 on a GPU, else 2
--blocks N                    blocks per turn; default: 10 on a GPU, else 2
--peers/--no-peers            measure other installed implementations too (default), or not
"""
_RESULTS = """
--out DIR                     folder for block.json, block.md and block.png
--chart/--no-chart            write block.png; default: if matplotlib is installed
"""
OPTIONS = {
    "model": (
        *table(_MODEL, size={"type": click.Choice(list(MODELS))}),
        *shared(
            _SHARED,
            model={"default": None, "metavar": "DIR", "help": "Wan2.1 model folder to use instead of random weights"},
            seed={"help": "seed of weights, prompt and noise (default 0)"},
        ),
    ),
    "run": (
        *table(
            _RUN,
            variants={"type": Value(lambda text: tuple(text.split(",")), words=NAMES, several=True)},
            peers={"default": True},
        ),
        *shared(["--lookahead"], lookahead={"default": 1, "help": "number of blocks begun ahead (default 1)"}),
    ),
    "results": table(_RESULTS, chart={"default": None}),
}


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Measure, print and write; the exit code says whether all was right."""
    with stop.importing():
        from echo_rt.bench.report import Report
        from echo_rt.bench.run import Run
        from echo_rt.bench.tables import can_draw
    with stop.interruptible():
        require("--chart", arguments.chart or None, "--out DIR", arguments.out, ", the folder to draw it into")
        if arguments.chart and not can_draw():
            raise BackendError("a chart needs matplotlib, which is not installed: pip install 'echo-rt[bench]'")
        if arguments.out is not None:
            check_results(Named("--out", arguments.out), model_files(arguments))
            if arguments.out.is_dir():
                check_writable(arguments.out / "block.json")
        request = options_of(Request, arguments)

        def save(run: Run) -> None:  # the time may run out
            if arguments.out is not None:
                Report(run).write(arguments.out, picture=False)

        found = Report(Run(request, say=lambda text: complain(f"echo-rt: {text}")).measure(save))
    content, page = found.content()
    report.update(content)
    if arguments.out is not None:
        picture = can_draw() if arguments.chart is None else arguments.chart
        files = found.write(arguments.out, picture=picture)
        report["files"] = [str(path) for path in files]
    if not arguments.json:
        say(*page.splitlines())
    return 0 if found.run.passed else 1
