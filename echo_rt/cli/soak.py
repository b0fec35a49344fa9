"""``echo-rt soak``: a long run that watches itself."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Any

import click

from echo_rt.cli.arguments import MODEL, Arguments, Value, model_files, options_of, require, shared, table
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.progress import Panel
from echo_rt.cli.request import parse_untimed
from echo_rt.cli.stdio import complain, say, say_loading
from echo_rt.errors import OutputError
from echo_rt.options import DEMO_PROMPT
from echo_rt.soak.config import Limits, SoakConfig, settings_of
from echo_rt.utils.number import Number
from echo_rt.utils.signals import StopRequest

DESCRIPTION = "Run a stream for a long time, write figures, snapshots and a report, and check what was promised."
EPILOG = """
The same command with the same --out continues a killed soak from its newest snapshot.

Exit codes: 0 every promise held; 1 something went wrong after the request was accepted, for example a full disk; 2 a
mistake in the request; 3 a promise was broken; 4 the stream failed; 129, 130 or 143 the terminal was closed, Ctrl-C
or SIGTERM, no promise broken until then.

docs/soak.md explains the figures.
"""
_ADDRESS = "127.0.0.1"
_PORT = Number(int, "PORT or ADDRESS:PORT with a port in 1..65535", least=1, most=65535)


def _parse_address(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    return address or _ADDRESS, _PORT.parse(port)


def _numbers(kind: type[SoakConfig] | type[Limits]) -> tuple[click.Option, ...]:
    """Declare the numbers among the fields of ``kind``."""
    rows, types = [], {}
    for name, (setting, default) in settings_of(kind).items():
        shown = "off" if default is None else default if default == "auto" else f"{default:.8g}"
        shown += f": {setting.on_gpu:g} on a GPU, off on a CPU" if setting.on_gpu else ""
        told = f" (default {shown})" if default is not None or setting.words else ""
        rows.append(f"--{name.replace('_', '-')} {setting.metavar}  {setting.meaning}{told}")
        # None, which leaves a promise out, is not the same as nothing given.
        given = default if kind is Limits else None
        types[name] = {"type": Value(setting.parse, words=setting.words), "default": given}
    return table("\n".join(rows), **types)


_RUN = f"""
--out DIR                  folder for figures, snapshots and the report; if it holds a soak, that is continued
--prompt prompts TEXT      may be repeated, without times (--switch-every says when the next begins); default:
                           {DEMO_PROMPT}
--port serve [ADDRESS:]P   serve figures for Prometheus there; default address {_ADDRESS}
--plots/--no-plots         plots in the report, or none; default: if matplotlib is installed
"""
OPTIONS = {
    "model": shared([*MODEL, "--size", "--set"]),
    "run": (
        *table(
            _RUN,
            out={"required": True},
            prompts={"multiple": True},
            serve={"type": Value(_parse_address)},
            plots={"default": None},
        ),
        *_numbers(SoakConfig),
        *shared(["--seed", "--roll-back"]),
    ),
    "promises (thresholds; 'off' leaves a promise out)": _numbers(Limits),
    "general": table("--quiet  no panel and no summary"),
}


def parse_config(arguments: Arguments) -> SoakConfig:
    """Return the requested soak; raises ``ConfigError``, and ``TargetError`` for an impossible ``--out``."""
    require("--keep", arguments.keep, "--snapshot-every N", arguments.snapshot_every)
    more = {"prompts": parse_untimed(arguments.prompts)} if arguments.prompts else {}
    check_folder(Named("--out", arguments.out), model_files(arguments))
    limits = Limits(**{name: value for name, value in vars(arguments).items() if name in settings_of(Limits)})
    return options_of(SoakConfig, arguments, model=arguments.model, limits=limits, **more)  # demo is not ./demo


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Run the soak and return its exit code."""
    config = parse_config(arguments)
    say_loading(arguments)
    with stop.importing():
        from echo_rt.soak import run as run_soak
    with closing(Panel(config, quiet=arguments.quiet)) as panel:
        outcome = run_soak(config, stop=stop, watchers=[panel])
    report |= outcome.taken or {}
    report |= {name: getattr(outcome, name) for name in ("end", "blocks", "backend", "backend_reason")}
    report |= {"promises": list(map(dataclasses.asdict, outcome.verdicts)), "report": str(outcome.report)}
    if outcome.failure is not None:
        report["error"] = outcome.failure
        complain(f"echo-rt: error: {outcome.failure}")
    if not arguments.quiet and not arguments.json:
        try:
            say(f"{outcome.summary}; {outcome.report}")
        except (OutputError, BrokenPipeError):
            if outcome.exit_code == 0:
                raise  # any other code says more than a closed terminal
    return outcome.exit_code
