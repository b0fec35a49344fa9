"""The one-command GPU check behind ``bench/gpu.sh``: runs every stage in its time, whatever becomes of the others.

Writes ``summary.json``, ``summary.md`` and ``logs.txt`` into DIR, beside what the stages write there; the summary is
renewed after every stage, so an interrupted check says how far it came. Exit code 0 only if every stage of the plan ran
and passed; 1 if not; 2 where there is no GPU, or for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _checkout import ROOT
from gpu_stages import BUDGETS, REHEARSAL_BUDGET, Options, Stage, beyond_gpu, plan, stage_environment
from gpu_summary import FLOAT8_FOLDER, Outcome, write_summary

from echo_rt.bench.tables import check_results_folder
from echo_rt.cli.paths import parse_path
from echo_rt.errors import EchoError
from echo_rt.output.part_file import reason

# What is kept of a stage's output, at each end: a loop of warnings must not bury the other stages.
_KEPT = 2**19
_TAIL_LINES = 15
_GRACE = 5.0
_LONGEST = 7 * 24 * 3600


def share_of_budget(stages: Sequence[Stage], remaining: float) -> float:
    """Seconds for the first of ``stages``: what the others need least is left to them; 0 where it does not fit."""
    first, *rest = stages
    free = remaining - sum(stage.least for stage in rest if not stage.absent)
    # When not all can have their least, those that come first do.
    granted = min(first.limit, max(free, min(first.least, remaining)))
    return granted if granted >= first.least else 0.0


def run_stage(stage: Stage, limit: float, log: Path) -> Outcome:
    """Run it with its output in ``log``; after ``limit`` seconds it and all that it started is ended."""
    begun = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=stage_environment(stage),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, limit, None, f"cannot start {stage.command[0]}: {error.strerror}")
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
    seconds = time.monotonic() - begun
    text = log.read_text(encoding="utf-8", errors="replace")
    if timed_out:
        return Outcome(stage.name, "timed out", seconds, limit, None, f"ended after {limit:.0f} s")
    return Outcome(stage.name, *judge(stage, process.returncode, text, seconds, limit))


def judge(stage: Stage, code: int, text: str, seconds: float, limit: float) -> tuple[Any, ...]:
    """State, seconds, limit, exit code and reason of a stage that ended by itself."""
    said = tests_line(text)
    if code != 0:
        return "failed", seconds, limit, code, f"exit code {code}" + (f"; {said}" if said else "")
    if stage.refuted and (found := re.search(stage.refuted, text)):
        return "failed", seconds, limit, code, f"its output says: {found[0]}"
    if stage.proof and not re.search(stage.proof, text):
        return "failed", seconds, limit, code, f"its output lacks {stage.proof!r}" + (f"; {said}" if said else "")
    return "passed", seconds, limit, code, said


def tests_line(text: str) -> str:
    """What pytest counted, where it did."""
    found = re.findall(r"(\d+ (?:passed|failed|error|skipped|deselected)[^\n=]*) in [\d.]+", text)
    return found[-1].strip() if found else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: what the command left running too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # all of it has gone
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def append_log(logs: Path, stage: Stage, outcome: Outcome, log: Path) -> str:
    """Add the stage's output, its middle left out where it is long; returns its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if len(text) > 2 * _KEPT:
        text = f"{text[:_KEPT]}\n... {len(text) - 2 * _KEPT} characters left out ...\n{text[-_KEPT:]}"
    head = f"==== {stage.name}: {outcome.state}, {outcome.seconds:.1f} s ({outcome.why})\n$ {' '.join(stage.command)}\n"
    with logs.open("a", encoding="utf-8") as file:
        file.write(f"{head}{text}\n")
    log.unlink(missing_ok=True)
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def check(stages: Sequence[Stage], out: Path, deadline: float, save: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run the stages one after the other until ``deadline`` (monotonic); ``save`` is given the outcomes after each."""
    outcomes: list[Outcome] = []
    logs = out / "logs.txt"
    logs.write_text("", encoding="utf-8")
    for number, stage in enumerate(stages):
        log = out / f".{stage.name}.log"
        remaining = deadline - time.monotonic()
        limit = share_of_budget(stages[number:], remaining)
        if stage.absent:
            outcome = Outcome(stage.name, "not run", 0.0, 0.0, None, stage.absent)
        elif limit == 0.0:
            why = f"{max(0.0, remaining):.0f} s are left, it needs {stage.least:.0f} at least"
            outcome = Outcome(stage.name, "skipped", 0.0, 0.0, None, why)
        else:
            begun = time.monotonic()
            try:
                outcome = run_stage(stage, limit, log)
            except BaseException:  # the check itself is being ended: what this stage has said is kept
                cut = Outcome(stage.name, "interrupted", time.monotonic() - begun, limit, None, "")
                append_log(logs, stage, cut, log)
                save([*outcomes, cut])
                raise
        tail = append_log(logs, stage, outcome, log)
        print(f"{stage.name:<12} {outcome.state:<10} {outcome.seconds:6.1f} s  {outcome.why}", flush=True)
        if outcome.state in ("failed", "timed out"):
            print("\n".join(f"    {line}" for line in tail.splitlines()), flush=True)
        outcomes.append(outcome)
        save(outcomes)
    return outcomes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST:  # NaN is not
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and up to {_LONGEST}, got {text!r}")
    return seconds


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=parse_path, metavar="DIR", help="folder for results and logs; made where it is not there"
    )
    parser.add_argument("--quick", action="store_true", help="three minutes instead of ten")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, of small sizes")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out of the plan")
    parser.add_argument("--stages", metavar="NAME,...", help="only these; the summary says so")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help=f"wall time for everything, and with more of it for each stage; default: {BUDGETS[False]:.0f}, with "
        f"--quick {BUDGETS[True]:.0f}, in a rehearsal {REHEARSAL_BUDGET:.0f}",
    )
    return parser.parse_args(argv)


def _preflight(device: str) -> dict[str, Any] | str:
    """The machine's facts, or why it cannot be checked; on a process of its own, as torch takes its memory along."""
    stage = Stage("environment", (sys.executable, "bench/environment.py", "--device", device), 60, 0)
    try:
        done = subprocess.run(
            stage.command, cwd=ROOT, env=stage_environment(stage), capture_output=True, text=True, timeout=stage.limit
        )
    except subprocess.TimeoutExpired:
        return f"torch did not come up on {device} within {stage.limit:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"bench/environment.py ended with {done.returncode}"
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _advice(reason: str, device: str) -> str:
    """What to do about a check that cannot begin, as the end of a sentence."""
    if reason.startswith("ModuleNotFoundError"):
        return f" in {sys.executable}; PYTHON names one that has it"
    return "" if device == "cpu" else "; --device cpu rehearses without a GPU"


def _stopped(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    out, sanitizer = arguments.out.resolve(), not arguments.no_sanitizer
    options = Options(out, arguments.device, arguments.quick, sanitizer, arguments.budget)
    stages = plan(options)
    names = [stage.name for stage in stages]
    chosen = arguments.stages.split(",") if arguments.stages else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        print(f"gpu.sh: --stages may name {', '.join(names)}; got {', '.join(map(repr, unknown))}", file=sys.stderr)
        return 2
    try:
        check_results_folder(options.out)
    except EchoError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    facts = _preflight(options.device)
    if isinstance(facts, str):
        print(f"gpu.sh: {facts}{_advice(facts, options.device)}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    without = {} if arguments.stages else beyond_gpu(facts["gpu"])
    stages = [stage for stage in stages if stage.name in chosen and stage.name not in without]
    description = {
        "device": options.device,
        "quick": options.quick,
        "sanitizer": options.sanitizer,
        "budget_s": options.budget,
        "planned": [stage.name for stage in stages],
        "left_out": [name for name in names if name not in chosen],
        "without": without,
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for stale in ("kernel_times", "block", "vae", "savings", "golden", f"{FLOAT8_FOLDER}/block"):
            for suffix in (".json", ".md"):
                (options.out / f"{stale}{suffix}").unlink(missing_ok=True)

        def save(outcomes: list[Outcome]) -> None:
            write_summary(options.out, facts, description, outcomes, time.monotonic() - begun)

        save([])
        outcomes = check(stages, options.out, begun + options.budget, save)
        print(f"\n{(options.out / 'summary.md').read_text(encoding='utf-8')}")
    except EchoError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""  # a pipe has no name
        print(f"gpu.sh: {where}cannot write: {reason(error)}", file=sys.stderr)
        return 2
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
