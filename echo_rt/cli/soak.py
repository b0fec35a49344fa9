"""``echo-rt soak``: a long run that watches itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from echo_rt.cli.arguments import MODEL, Arguments, Value, model_files, number, options_of, require, shared, table
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.prompts import parse_untimed
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import OutputError
from echo_rt.soak.config import Limits, SoakConfig, numbers, option_of

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


def _parse_address(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    expected = f"PORT or ADDRESS:PORT with a port in 1..{_MOST_PORT}"
    return address or _ADDRESS, number(int, expected, least=1, most=_MOST_PORT).convert(port, None, None)


def _numbers(kind: type[SoakConfig] | type[Limits], *, promises: bool) -> tuple[click.Option, ...]:
    """Declare the numbers among the fields of ``kind``, which checks their bounds itself."""
    rows, types = [], {}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, setting in numbers(kind).items():
        default: Any = defaults[name]
        words = ({"off": None} if promises and setting.optional else {}) | ({"auto": "auto"} if setting.on_gpu else {})
        shown = "off" if default is None else default if default == "auto" else f"{default:.8g}"
        shown += f": {setting.on_gpu:g} on a GPU, off on a CPU" if setting.on_gpu else ""
        told = f" (default {shown})" if promises or default is not None else ""
        rows.append(f"{option_of(name)} {setting.metavar}  {setting.meaning}{told}")
        expected = ", or ".join([setting.expected, *map(repr, words)])
        # What is not given has the default of its field; of a promise, None is a value of its own.
        types[name] = {
            "type": number(setting.kind, expected, words=words),
            **({"default": default} if promises else {}),
        }
    return table("\n".join(rows), **types)


_RUN = f"""
--out DIR                  folder for figures, snapshots and the report; if it holds a soak, that is continued
--prompt prompts TEXT      may be repeated, without times (--switch-every says when the next begins); default: a fox
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
        *_numbers(SoakConfig, promises=False),
        *shared(["--seed", "--roll-back"]),
    ),
    "promises (thresholds; 'off' leaves a promise out)": _numbers(Limits, promises=True),
    "general": table("--quiet  no panel and no summary"),
}


def parse_config(arguments: Arguments) -> SoakConfig:
    """Return the requested soak; raises ``ConfigError``, and ``TargetError`` for an impossible ``--out``."""
    require("--keep", arguments.keep, "--snapshot-every N", arguments.snapshot_every)
    more = {"prompts": parse_untimed(arguments.prompts)} if arguments.prompts else {}
    check_folder(Named("--out", arguments.out), model_files(arguments))
    limits = Limits(**{name: value for name, value in vars(arguments).items() if name in numbers(Limits)})
    return options_of(SoakConfig, arguments, limits=limits, **more)


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
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
