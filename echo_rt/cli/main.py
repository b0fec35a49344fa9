"""``echo-rt``: finds the subcommand, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from echo_rt.build_info import __version__
from echo_rt.cli import doctor, generate, tiny, verify
from echo_rt.cli.signals import StopNow
from echo_rt.errors import ConfigError, EchoError

DEBUG_VARIABLE = "ECHO_RT_DEBUG"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, not a page of usage; options only by their full names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; imports nothing heavy."""
    parser = _Parser(prog="echo-rt", description="Endless, real-time video from Wan2.1 with evolving memory.")
    parser.add_argument("--version", action="version", version=f"echo-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in (generate, verify, tiny, doctor):
        command = module.add_parser(commands)
        command.set_defaults(run=module.run)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument(
            "--debug", action="store_true", help=f"show tracebacks (so does {DEBUG_VARIABLE}=1 in the environment)"
        )
    return parser


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"echo-rt: warning: {_one_line(message)}", file=sys.stderr)


def _describe(error: Exception) -> tuple[str, int]:
    """The line and the exit code for ``error``; what is not ours is named with its type and a way to see more."""
    if isinstance(error, EchoError):
        return _one_line(error), error.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return _one_line(f"out of GPU memory: a smaller --size needs less ({error})"), 1
    return _one_line(f"unexpected {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows where)"), 1


def _run(argv: list[str], report: dict[str, Any], debug: bool) -> int:
    """Run the subcommand, which fills ``report``; whatever ends it becomes an exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        code: int = arguments.run(arguments, report)
        return code
    except StopNow as stop:
        report.setdefault("exit_reason", stop.reason)
        return stop.exit_code
    except KeyboardInterrupt:
        return StopNow.of_keyboard().exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        report["error"], code = _describe(error)
        print(f"echo-rt: error: {report['error']}", file=sys.stderr)
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (a mistake in the request), 128 + signal.

    ``argv`` is without the name of the program; None means that of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # Looked for before parsing, because parsing can fail too.
    as_json = "--json" in argv
    debug = "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    report: dict[str, Any] = {}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt may hold what the terminal's encoding cannot
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run(argv, report, debug)
        if as_json:
            print(json.dumps({**report, "exit_code": code}))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has left; pointing it elsewhere keeps the interpreter quiet at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
