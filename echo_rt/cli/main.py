"""``echo-rt``: finds the subcommand, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from echo_rt.cli import bench, doctor, generate, recipes, soak, stdio, tiny, verify
from echo_rt.cli.signals import StopNow, StopRequest
from echo_rt.cli.stdio import DEBUG_VARIABLE, describe, warn
from echo_rt.errors import ConfigError, OutputError
from echo_rt.utils.build_info import __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, not a page of usage; options only by their full names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; one that begins with - is written --option=VALUE"
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _Command(_Parser):
    """A subcommand's parser. Of what it does not know argparse would tell the whole command line's page of help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; imports nothing heavy."""
    parser = _Parser(prog="echo-rt", description="Endless video from Wan2.1 with evolving memory.")
    parser.add_argument("--version", action="version", version=f"echo-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    for module in (generate, soak, bench, verify, recipes, tiny, doctor):
        command = module.add_parser(commands)
        command.set_defaults(run=module.run)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument(
            "--debug", action="store_true", help=f"show tracebacks (so does {DEBUG_VARIABLE}=1 in the environment)"
        )
    return parser


def _run(argv: list[str], report: dict[str, Any], debug: bool, stop: StopRequest) -> int:
    """Run the subcommand, which fills ``report``; whatever ends it becomes an exit code."""
    try:
        with stop.interruptible():
            arguments = build_parser().parse_args(argv)
        with stdio.tell_recipe(report, quiet=getattr(arguments, "quiet", False)):
            code: int = arguments.run(arguments, report, stop)
        return code
    except KeyboardInterrupt:  # not of our handlers' making: main may run in a thread, or be called by other code
        return _stopped(StopNow(signal.SIGINT), report)
    except StopNow as request:
        return _stopped(request, report)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            stdio.complain(traceback.format_exc().rstrip())
        report["error"], code = describe(error)
        stdio.complain(f"echo-rt: error: {report['error']}")
        return code


def _stopped(request: StopNow, report: dict[str, Any]) -> int:
    report.setdefault("exit_reason", request.reason)
    return request.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (a mistake in the request), 128 + signal.

    ``argv`` is without the name of the program; None means that of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # Looked for before parsing, because parsing can fail too.
    as_json = "--json" in argv
    debug = "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    report: dict[str, Any] = {}

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        warn(report, message)

    # Signals are held until the report is printed: a second one while files are closed must not cost it.
    with StopRequest() as stop:
        stdio.prepare()
        try:
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = show_warning
                    code = _run(argv, report, debug, stop)
            except SystemExit:
                stdio.say("", end="")  # argparse has printed a page of help, which may still be in the buffer
                raise
            stdio.say(json.dumps({**report, "exit_code": code}) if as_json else "", end="\n" if as_json else "")
            return code
        except BrokenPipeError:
            return 1  # whoever read our output has left
        except OutputError as error:
            stdio.complain(f"echo-rt: error: {error}")
            return 1
        finally:
            stdio.release()
