"""``echo-rt soak``: a long run that watches itself."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import parse_number, parse_positive
from echo_rt.cli.model_options import add_model_options, model_files, parse_model_options
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.paths import parse_path
from echo_rt.cli.prompts import parse_untimed
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, say
from echo_rt.errors import ConfigError, OutputError
from echo_rt.options import OVERRIDES
from echo_rt.soak.config import AUTO_LIMITS, NEVER_OFF, Limits, SoakConfig

_EPILOG = """
The same command with the same --out goes on where a killed one stopped, at its newest snapshot.
Exit codes: 0 every promise held; 1 the disk is full or the like; 2 a mistake in the request; 3 a promise was broken;
4 the stream failed; 130 or 143 Ctrl-C or SIGTERM, no promise broken until then. docs/soak.md explains the figures.
"""
_ADDRESS = "127.0.0.1"
_LARGEST_PORT = 65535
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SoakConfig)}


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
    model.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"a fact of the rollout: {', '.join(OVERRIDES)}",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", type=parse_path, required=True, metavar="DIR", help="figures, snapshots, report; what to go on with"
    )
    length = run.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", metavar="H", help="end after H hours of streaming, all processes together")
    length.add_argument("--blocks", metavar="N", help="end after N blocks")
    run.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="several to switch between, without times (see --switch-every); default: one of a fox",
    )
    run.add_argument("--switch-every", metavar="N", help="blocks after which the next prompt takes over")
    run.add_argument("--seed", default="0", metavar="N", help="same seed, same video (default 0)")
    run.add_argument("--snapshot-every", metavar="N", help="blocks between two snapshots; default: none are taken")
    run.add_argument("--keep", metavar="K", help=f"how many snapshots stay (default {_DEFAULTS['keep']})")
    run.add_argument("--roll-back", action="store_true", help="go back to a good state at a NaN, instead of ending")
    run.add_argument("--block-seconds", metavar="S", help="end when a block takes longer; default: no bound")
    run.add_argument("--interval", metavar="S", help=f"seconds a line (default {_DEFAULTS['interval']:g})")
    run.add_argument("--hash-every", metavar="N", help=f"hash every Nth block (default {_DEFAULTS['hash_every']})")
    run.add_argument("--port", metavar="[ADDRESS:]P", help=f"serve Prometheus; the address is {_ADDRESS} if not given")
    run.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, help="pictures in the report; default: if possible"
    )
    run.add_argument("--quiet", action="store_true", help="no panel and no summary")

    limits = parser.add_argument_group("promises", "thresholds; 'off' leaves a promise out")
    for name, metavar, meaning in (
        ("warmup-blocks", "N", "first blocks of a process, judged by none of the following"),
        ("device-growth", "BYTES", "by which the device's memory may differ after warm-up"),
        ("host-slope", "BYTES", "a block by which the host's memory may grow"),
        ("host-slack", "BYTES", "of growth that --host-slope lets pass"),
        ("latency-ratio", "X", "p99/p50 of the block latency; auto: 1.05 on a GPU, off on a CPU"),
        ("latency-zscore", "Z", "from which a block is an outlier; auto: 10 on a GPU, off on a CPU"),
        ("outliers", "SHARE", "of blocks that may be outliers"),
        ("snapshot-stall", "MS", "for which a snapshot may hold up the stream; auto: 2000 on a GPU, off on a CPU"),
        ("drift", "X", "standard deviations by which the latents' statistics may move"),
    ):
        default = getattr(Limits(), name.replace("-", "_"))
        shown = "off" if default is None else default if isinstance(default, str) else f"{default:.8g}"
        limits.add_argument(f"--{name}", metavar=metavar, help=f"{meaning} (default {shown})")
    return parser


def _count(option: str, text: str | None) -> int | None:
    count: int | None = parse_positive(option, text, int, "an integer of 1 or more")
    return count


def _limits(arguments: argparse.Namespace) -> Limits:
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Limits):
        text = getattr(arguments, field.name)
        if text is None:
            continue
        option = f"--{field.name.replace('_', '-')}"
        words: dict[str, str | None] = {} if field.name in NEVER_OFF else {"off": None}
        if field.name in AUTO_LIMITS:
            words["auto"] = "auto"
        if text in words:
            given[field.name] = words[text]
            continue
        kind, number = (int, "an integer") if field.name == "warmup_blocks" else (float, "a number")
        expected = ", or ".join([f"{number} of 0 or more", *map(repr, words)])
        given[field.name] = parse_number(option, text, kind, expected)
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
    """The soak that the arguments ask for; raises ``ConfigError``, ``TargetError`` for a place where none can be."""
    given = {
        "keep": _count("--keep", arguments.keep),
        "hash_every": _count("--hash-every", arguments.hash_every),
        "interval": parse_positive("--interval", arguments.interval, float, "a number of seconds above 0"),
        "prompts": None if arguments.prompt is None else parse_untimed(arguments.prompt),
    }
    options: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in parse_model_options(arguments).arguments().items()
    }
    if arguments.keep is not None and arguments.snapshot_every is None:
        raise ConfigError("--keep: expected --snapshot-every N with it, whose snapshots it counts, got none")
    check_folder(Named("--out", arguments.out), model_files(arguments))
    return SoakConfig(
        model=str(arguments.model),
        out=str(arguments.out),
        blocks=_count("--blocks", arguments.blocks),
        hours=parse_positive("--hours", arguments.hours, float, "a number of hours above 0"),
        **options,
        switch_every=_count("--switch-every", arguments.switch_every),
        seed=parse_number("--seed", arguments.seed, int, "an integer of 0 or more"),
        snapshot_every=_count("--snapshot-every", arguments.snapshot_every),
        roll_back=arguments.roll_back,
        block_seconds=parse_positive("--block-seconds", arguments.block_seconds, float, "a number of seconds above 0"),
        limits=_limits(arguments),
        serve=_address(arguments.port),
        plots=arguments.plots,
        **{name: value for name, value in given.items() if value is not None},
    )


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Do the soak; the exit code says how it went."""
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
                raise  # else the code says what is more than that nobody reads it: a terminal that was closed, say
    return outcome.exit_code
