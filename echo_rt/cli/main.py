"""``echo-rt``: finds the subcommand, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click

from echo_rt.cli import stdio
from echo_rt.cli.arguments import Arguments, Options, table
from echo_rt.cli.stdio import DEBUG_VARIABLE, describe, warn
from echo_rt.errors import OutputError
from echo_rt.utils.build_info import __version__
from echo_rt.utils.signals import StopNow, StopRequest

# Modules of this folder, each imported when it is needed, with the line that --help shows.
COMMANDS = {
    "generate": "make a video from prompts",
    "serve": "serve one live video to any number of viewers",
    "soak": "run for hours and check what was promised",
    "bench": "measure a whole block on this machine",
    "verify": "check golden bundles or a model's decoder on this installation",
    "recipes": "show how each published checkpoint is sampled",
    "tiny": "write a small random model folder",
    "doctor": "show what is installed, built and working",
}
_PROGRAM, _COMPLETION = "echo-rt", "_ECHO_RT_COMPLETE"
_EVERYWHERE = f"""
--json   print one JSON object on standard output
--debug  show tracebacks, as {DEBUG_VARIABLE}=1 in the environment does
"""
_Run = Callable[[Arguments, dict[str, Any], StopRequest], int]


class _Command(click.Command):
    """A subcommand, whose module is imported when its arguments are parsed; what it calls back is ``run``."""

    def make_context(self, *args: Any, **keywords: Any) -> click.Context:
        module = importlib.import_module(f"echo_rt.cli.{self.name}")
        self.help, self.epilog = module.DESCRIPTION, getattr(module, "EPILOG", None)
        groups: Options = getattr(module, "OPTIONS", {})
        self._groups = {**groups, "general": (*groups.get("general", ()), *table(_EVERYWHERE))}
        self.params = [*itertools.chain(*self._groups.values())]
        self.callback = lambda **given: (module.run, Arguments(**given))
        return super().make_context(*args, **keywords)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in self._groups.items():
            with formatter.section(title):
                formatter.write_dl([record for one in options if (record := one.get_help_record(ctx))])


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # not in the order of the alphabet


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=_Group,
    commands={name: _Command(name, short_help=text, context_settings=_SETTINGS) for name, text in COMMANDS.items()},
    context_settings=_SETTINGS,
    no_args_is_help=False,
)
@click.version_option(__version__, message=f"{_PROGRAM} %(version)s")
def _echo_rt() -> None:
    """Stream endless video from Wan2.1 with an evolving memory."""


def _parse(argv: list[str]) -> tuple[_Run, Arguments]:
    """Return what runs the subcommand, and its arguments; prints a page of help and exits if that is asked for."""
    if not argv or argv[0] == "help":
        argv = [*argv[1:], "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page:
        parsed: tuple[_Run, Arguments] | int = _echo_rt.main(argv, _PROGRAM, standalone_mode=False)
    if isinstance(parsed, int):
        stdio.say(*page.getvalue().splitlines())
        raise SystemExit(parsed)
    return parsed


def _run(argv: list[str], report: dict[str, Any], debug: bool, stop: StopRequest) -> int:
    """Run the subcommand, which fills ``report``; whatever ends it becomes an exit code."""
    try:
        with stop.interruptible():
            run, arguments = _parse(argv)
        with stdio.ShownLog(report, quiet=getattr(arguments, "quiet", True)):
            return run(arguments, report, stop)
    except (KeyboardInterrupt, click.Abort, StopNow) as error:
        # The first two are not of our handlers' making: in a thread, or called by other code.
        request = error if isinstance(error, StopNow) else StopNow(signal.SIGINT)
        report.setdefault("exit_reason", request.reason)
        return request.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            stdio.complain(*(f"  {line}" for line in traceback.format_exc().splitlines()))  # none like the error's
        report["error"], code = describe(error)
        stdio.complain(f"echo-rt: error: {report['error']}")
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (a mistake in the request), 128 + signal.

    ``argv`` is without the name of the program; None means that of the process.
    """
    if os.environ.get(_COMPLETION):
        _echo_rt.main(prog_name=_PROGRAM, complete_var=_COMPLETION)  # exits
    argv = sys.argv[1:] if argv is None else list(argv)
    # Looked for before parsing, because parsing can fail too.
    as_json = "--json" in argv
    debug = "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    report: dict[str, Any] = {}

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
        warn(report, message)

    def print_report(code: int) -> None:
        if as_json:
            stdio.say(json.dumps({**report, "exit_code": code}).replace("\x7f", "\\u007f"))

    def last_words(request: StopNow) -> None:
        report["exit_reason"] = request.reason
        with contextlib.suppress(OSError, OutputError):  # nobody reads it
            print_report(request.exit_code)

    # Signals are held until the report is printed: a second one while files are closed must not cost it.
    with StopRequest(last_words) as stop:
        stdio.prepare()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                code = _run(argv, report, debug, stop)
            print_report(code)
            return code
        except BrokenPipeError:
            return 1  # whoever read our output has left
        except OutputError as error:
            stdio.complain(f"echo-rt: error: {error}")
            return 1
        finally:
            stdio.release()
