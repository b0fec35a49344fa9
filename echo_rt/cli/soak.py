"""``echo-rt soak``: a long run that watches itself."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import parse_number, parse_path
from echo_rt.cli.model_options import add_model_options, model_files, parse_model_options
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.prompts import parse_untimed
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import ConfigError, OutputError
from echo_rt.options import OVERRIDES
from echo_rt.soak.config import Limits, SoakConfig, numbers, option_of

_EPILOG = """
The same command with the same --out continues a killed soak from its newest snapshot.
Exit codes: 0 every promise held; 1 the disk is full or the like; 2 a mistake in the request; 3 a promise was broken;
4 the stream failed; 130 or 143 Ctrl-C or SIGTERM, no promise broken until then. docs/soak.md explains the figures.
"""
_ADDRESS = "127.0.0.1"
_LARGEST_PORT = 65535
_FIELDS = {field.name: field for field in dataclasses.fields(SoakConfig)}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "soak",
        help="run for hours and check what was promised",
        description="Run a stream for a long time, write its figures, snapshots and a report, check its promises.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = add_model_options(parser)
    model.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels, such as 832x480")
    shown = f"a setting of the rollout: {', '.join(OVERRIDES)}"
    model.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=shown)

    run = parser.add_argument_group("run")
    shown = "folder for figures, snapshots and the report; holds the soak to continue"
    run.add_argument("--out", type=parse_path, required=True, metavar="DIR", help=shown)
    length = run.add_mutually_exclusive_group(required=True)
    for name, number in numbers(SoakConfig).items():
        group = length if name in ("hours", "blocks") else run
        default = _FIELDS[name].default
        shown = number.meaning if default is None else f"{number.meaning} (default {default:g})"
        group.add_argument(option_of(name), metavar=number.metavar, help=shown)
    shown = "several to switch between, without times (see --switch-every); default: one of a fox"
    run.add_argument("--prompt", action="append", metavar="TEXT", help=shown)
    run.add_argument("--seed", default="0", metavar="N", help="same seed, same video (default 0)")
    run.add_argument("--roll-back", action="store_true", help="go back to a good state at a NaN, instead of ending")
    run.add_argument("--port", metavar="[ADDRESS:]P", help=f"serve Prometheus; the default address is {_ADDRESS}")
    shown = "pictures in the report; default: if matplotlib is installed"
    run.add_argument("--plots", action=argparse.BooleanOptionalAction, help=shown)
    run.add_argument("--quiet", action="store_true", help="no panel and no summary")

    limits = parser.add_argument_group("promises", "thresholds; 'off' leaves a promise out")
    for name, number in numbers(Limits).items():
        default = getattr(Limits(), name)
        shown = "off" if default is None else f"{default}" if default == "auto" else f"{default:.8g}"
        shown += "" if number.on_gpu is None else f": {number.on_gpu:g} on a GPU, off on a CPU"
        limits.add_argument(option_of(name), metavar=number.metavar, help=f"{number.meaning} (default {shown})")
    return parser


def _limits(arguments: argparse.Namespace) -> Limits:
    given: dict[str, Any] = {}
    for name, number in numbers(Limits).items():
        text = getattr(arguments, name)
        words: dict[str, str | None] = {"off": None} if number.optional else {}
        words |= {"auto": "auto"} if number.on_gpu is not None else {}
        if text in words:
            given[name] = words[text]
        elif text is not None:
            expected = ", or ".join([number.expected, *map(repr, words)])
            given[name] = parse_number(option_of(name), text, number.kind, expected)
    return Limits(**given)


def _address(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    address, _, port = text.rpartition(":")
    number = parse_number("--port", port, int, "PORT or ADDRESS:PORT")
    if not 1 <= number <= _LARGEST_PORT:
        raise ConfigError(f"--port: expected a port in 1..{_LARGEST_PORT}, got {number}")
    return address or _ADDRESS, number


def parse_config(arguments: argparse.Namespace) -> SoakConfig:
    """Return the requested soak; raises ``ConfigError``, and ``TargetError`` for an impossible ``--out``."""
    given = {name: value for name, value in parse_model_options(arguments).arguments().items() if value is not None}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    for name, number in numbers(SoakConfig).items():
        text = getattr(arguments, name)
        if text is not None:
            given[name] = parse_number(option_of(name), text, number.kind, number.expected)
    if arguments.keep is not None and arguments.snapshot_every is None:
        raise ConfigError("--keep: expected --snapshot-every N with it, got none")
    if arguments.prompt is not None:
        given["prompts"] = parse_untimed(arguments.prompt)
    check_folder(Named("--out", arguments.out), model_files(arguments))
    return SoakConfig(
        model=str(arguments.model),
        out=str(arguments.out),
        **given,
        seed=parse_number("--seed", arguments.seed, int, "an integer of 0 or more"),
        roll_back=arguments.roll_back,
        limits=_limits(arguments),
        serve=_address(arguments.port),
        plots=arguments.plots,
    )


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
    report.update(
        end=outcome.end,
        blocks=outcome.blocks,
        backend=outcome.backend,
        backend_reason=outcome.backend_reason,
        promises=[dataclasses.asdict(verdict) for verdict in outcome.verdicts],
        report=str(outcome.report),
        **outcome.taken or {},
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
