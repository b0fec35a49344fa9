"""``echo-rt``: finds the subcommand, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from echo_rt.cli import bench, doctor, generate, recipes, serve, soak, stdio, tiny, verify
from echo_rt.cli.signals import StopNow, StopRequest
from echo_rt.cli.stdio import DEBUG_VARIABLE, describe, warn
from echo_rt.errors import ConfigError, OutputError
from echo_rt.utils.build_info import __version__


def _similar(word: str, known: Iterable[str]) -> str:
    """A question to add to a message: which of the ``known`` words was meant; empty if none is similar."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Layout(argparse.HelpFormatter):
    """Wraps a text of help paragraph by paragraph; indented lines are examples and stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        groups = itertools.groupby(text.strip().splitlines(), lambda line: not line or line.startswith(" "))
        wrapper = textwrap.TextWrapper(width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join("\n".join(lines) if as_is else wrapper.fill(" ".join(lines)) for as_is, lines in groups)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, not a page of usage; options only by their full names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "formatter_class": _Layout, "allow_abbrev": False})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _similar(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; one that begins with - is written --option=VALUE"
        raise ConfigError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class _Command(_Parser):
    """A subcommand's parser. It refuses unknown arguments itself: its parent would point at the wrong page of help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("--")), "")
            similar = _similar(option.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{similar}")
        return known, unknown


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; imports nothing heavy."""
    parser = _Parser(prog="echo-rt", description="Stream endless video from Wan2.1 with an evolving memory.")
    parser.add_argument("--version", action="version", version=f"echo-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    for module in (generate, serve, soak, bench, verify, recipes, tiny, doctor):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=getattr(module, "EPILOG", None)
        )
        if hasattr(module, "declare"):
            module.declare(command)
        command.set_defaults(run=module.run)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument(
            "--debug", action="store_true", help=f"show tracebacks, as {DEBUG_VARIABLE}=1 in the environment does"
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

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
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
