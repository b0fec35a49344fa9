"""``echo-rt soak``: a long run that watches itself."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from echo_rt.cli.arguments import MODEL, add_options, model_files, number, options_of, parse_path, require
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.prompts import parse_untimed
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import OutputError
from echo_rt.soak.config import Limits, Number, SoakConfig, numbers, option_of

HELP = "run for hours and check what was promised"
DESCRIPTION = "Run a stream for a long time, write figures, snapshots and a report, and check what was promised."
EPILOG = """
The same command with the same --out continues a killed soak from its newest snapshot.

Exit codes: 0 every promise held; 1 something went wrong after the request was accepted, for example a full disk; 2 a
mistake in the request; 3 a promise was broken; 4 the stream failed; 130 or 143 Ctrl-C or SIGTERM, no promise broken
until then.

docs/soak.md explains the figures.
"""
_ADDRESS = "127.0.0.1"
_MOST_PORT = 65535


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    model = parser.add_argument_group("model")
    add_options(model, [*MODEL, "--size", "--set"])

    run = parser.add_argument_group("run")
    shown = "folder for figures, snapshots and the report; if it holds a soak, that is continued"
    run.add_argument("--out", type=parse_path, required=True, metavar="DIR", help=shown)
    length = run.add_mutually_exclusive_group(required=True)
    defaults = {field.name: field.default for field in dataclasses.fields(SoakConfig)}
    for name, setting in numbers(SoakConfig).items():
        shown = "" if defaults[name] is None else f" (default {defaults[name]:g})"
        _add_number(length if name in ("hours", "blocks") else run, name, setting, shown)
    shown = "may be repeated, without times (--switch-every says when the next begins); default: a fox"
    run.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help=shown)
    add_options(run, ["--seed", "--roll-back"])
    shown = f"serve figures for Prometheus there; default address {_ADDRESS}"
    run.add_argument("--port", dest="serve", type=_parse_address, metavar="[ADDRESS:]P", help=shown)
    shown = "plots in the report, or none; default: if matplotlib is installed"
    run.add_argument("--plots", action=argparse.BooleanOptionalAction, help=shown)
    run.add_argument("--quiet", action="store_true", help="no panel and no summary")

    limits = parser.add_argument_group("promises", "thresholds; 'off' leaves a promise out")
    for name, setting in numbers(Limits).items():
        default = getattr(Limits(), name)
        shown = "off" if default is None else default if default == "auto" else f"{default:.8g}"
        shown += "" if setting.on_gpu is None else f": {setting.on_gpu:g} on a GPU, off on a CPU"
        words: dict[str, Any] = {"off": None} if setting.optional else {}
        words |= {} if setting.on_gpu is None else {"auto": "auto"}
        _add_number(limits, name, setting, f" (default {shown})", words, default=argparse.SUPPRESS)


def _add_number(
    group: Any, name: str, setting: Number, shown: str, words: dict[str, Any] | None = None, **keywords: Any
) -> None:
    """Declare the option of a field; the field's class checks the bounds."""
    expected = ", or ".join([setting.expected, *map(repr, words or {})])
    kind = number(setting.kind, expected, words=words)
    group.add_argument(
        option_of(name), type=kind, metavar=setting.metavar, help=f"{setting.meaning}{shown}", **keywords
    )


def _parse_address(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    expected = f"PORT or ADDRESS:PORT with a port in 1..{_MOST_PORT}"
    return address or _ADDRESS, number(int, expected, least=1, most=_MOST_PORT)(port)


def parse_config(arguments: argparse.Namespace) -> SoakConfig:
    """Return the requested soak; raises ``ConfigError``, and ``TargetError`` for an impossible ``--out``."""
    require("--keep", arguments.keep, "--snapshot-every N", arguments.snapshot_every)
    more = {} if arguments.prompts is None else {"prompts": parse_untimed(arguments.prompts)}
    check_folder(Named("--out", arguments.out), model_files(arguments))
    limits = Limits(**{name: value for name, value in vars(arguments).items() if name in numbers(Limits)})
    return options_of(SoakConfig, arguments, limits=limits, **more)


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Run the soak and return its exit code."""
    config = parse_config(arguments)
    with stop.interruptible():
        import echo_rt.soak
        from echo_rt.cli.soak_panel import Panel
    panel = Panel(config, quiet=arguments.quiet)
    try:
        outcome = echo_rt.soak.run(config, stop=stop, watchers=[panel])
    finally:
        panel.close()
    report.update(outcome.taken or {})
    report.update(
        end=outcome.end,
        blocks=outcome.blocks,
        backend=outcome.backend,
        backend_reason=outcome.backend_reason,
        promises=[dataclasses.asdict(verdict) for verdict in outcome.verdicts],
        report=str(outcome.report),
    )
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
