"""What a GPU check consists of, stage by stage: commands, limits, and what their output must and must not say."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _checkout import ROOT
from gpu_summary import FLOAT8_FOLDER

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Wall seconds for everything; a caller who has ten minutes, or three, needs some of them to start and to collect.
BUDGETS = {False: 570.0, True: 170.0}
# A rehearsal is on nobody's time, and the cores that build for it may be busy.
REHEARSAL_BUDGET = 3600.0
# Every operation against its formula; the sanitizers run these too.
_FORMULA_TESTS = ("tests/test_ops.py", "tests/test_ops_convolution.py", "tests/test_ops_float8.py")
_OP_TESTS = (*_FORMULA_TESTS, "tests/test_kernels.py", "tests/test_convolutions.py", "tests/test_verify.py")
_SANITIZER_EXIT = 86
# From which on tensor cores multiply float8. Not asked of echo_rt: a refusal there must not explain itself.
FLOAT8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Stage:
    """One command. It passes with exit code 0, if its output has ``proof`` and has not ``refuted`` (expressions).

    ``limit``: seconds it may take of :data:`BUDGETS`, of a larger budget as many times more; ``least``: seconds under
    which there is no use in starting it. ``absent``: why it cannot run here; it is then not ok.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float
    environment: Mapping[str, str] = field(default_factory=dict)
    proof: str = ""
    refuted: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Options:
    """What the caller chose."""

    out: Path
    device: str = "cuda"
    quick: bool = False
    sanitizer: bool = True
    budget_s: float | None = None  # None: as the device and ``quick`` have it

    @property
    def budget(self) -> float:
        """Wall seconds for everything."""
        return self.budget_s or (REHEARSAL_BUDGET if self.rehearsal else BUDGETS[self.quick])

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def backend(self) -> str:
        return "emulated" if self.rehearsal else "cuda"


def plan(options: Options) -> list[Stage]:
    """All stages, what matters most first: a budget that runs out takes from the end."""
    stages = [*_basics(options), *_tests(options), *_measurements(options)]
    if options.sanitizer:
        stages += _sanitizers(options)
    more = max(1.0, options.budget / BUDGETS[options.quick])
    return [replace(stage, limit=more * stage.limit) for stage in stages]


def beyond_gpu(gpu: Mapping[str, Any] | None) -> dict[str, str]:
    """Stages that this ``gpu`` of the machine's facts cannot have, each with the reason; none in a rehearsal."""
    if gpu is None or tuple(map(int, gpu["capability"].split("."))) >= FLOAT8_CAPABILITY:
        return {}
    needed = ".".join(map(str, FLOAT8_CAPABILITY))
    return {"block_float8": f"float8 needs compute capability {needed}, this GPU has {gpu['capability']}"}


def _limits(options: Options, full: tuple[float, float], quick: tuple[float, float]) -> dict[str, float]:
    limit, least = quick if options.quick else full
    return {"limit": limit, "least": least}


def _basics(options: Options) -> Iterator[Stage]:
    # Demanded, so that a missing compiler is an error and not a build of something else.
    demanded = {"ECHO_RT_BUILD": options.backend, "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    yield Stage("build", build, environment=demanded, **_limits(options, (300, 90), (120, 70)))
    yield Stage(
        "doctor",
        (sys.executable, "-m", "echo_rt", "doctor"),
        proof=rf"backend {options.backend} +available",
        **_limits(options, (60, 15), (30, 8)),
    )


def _pytest(*arguments: str, workers: bool = True) -> tuple[str, ...]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    cores = os.cpu_count() or 1
    if workers and cores >= 4 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, cores // 2))]
    return tuple(command)


def _tests(options: Options) -> Iterator[Stage]:
    # A run in which all is skipped ends well too, hence the proof.
    proof = r"\b[1-9]\d* passed"
    chosen = ("-k", "emulated and small and bfloat16") if options.rehearsal else ()
    # Several at a time on one host: each is held to few threads.
    few = {"OMP_NUM_THREADS": "2"}
    ops = _pytest(*_OP_TESTS, *chosen)
    yield Stage("op_tests", ops, environment=few, proof=proof, **_limits(options, (150, 20), (45, 12)))
    if options.rehearsal:
        command = _pytest("-m", "not cuda", "tests/test_device.py")
    else:
        command = _pytest("-m", "cuda", "tests", *(f"--ignore={path}" for path in _OP_TESTS))
    yield Stage("gpu_tests", command, environment=few, proof=proof, **_limits(options, (120, 20), (40, 10)))


def _measurements(options: Options) -> Iterator[Stage]:
    common = ["--out", str(options.out), "--device", options.device, *(["--quick"] if options.quick else [])]
    size = "tiny" if options.rehearsal else "released"
    kernels = (sys.executable, "bench/kernel_times.py", *common, "--size", size)
    yield Stage("kernels", kernels, **_limits(options, (180, 30), (45, 15)))
    golden = (sys.executable, "bench/golden.py", *common)
    if options.rehearsal and not options.quick:
        golden += ("--quick",)  # the large bundles take minutes on a host
    yield Stage("golden", golden, **_limits(options, (120, 20), (30, 8)))
    if not options.quick:  # it fills the windows of several models, for which three minutes have no place
        yield _block(options, size)
        vae = (sys.executable, "bench/vae.py", "--out", str(options.out), "--device", options.device, "--quick")
        yield Stage("vae", vae, limit=120, least=45)
        savings = (sys.executable, "bench/savings.py", *common, *(["--quick"] if options.rehearsal else []))
        yield Stage("savings", savings, limit=120, least=40)
        yield _block(options, size, float8=True)


def _block(options: Options, size: str, *, float8: bool = False) -> Stage:
    name, dtype = ("block_float8", "float8") if float8 else ("block", "bfloat16")
    out = options.out / FLOAT8_FOLDER if float8 else options.out
    # The chart is left out: a check leaves few files. bfloat16 in a rehearsal too: the memory's kernels ask for it.
    where = ("--out", str(out), "--device", options.device, "--no-chart")
    what = ("--size", size, "--backend", options.backend, "--dtype", dtype)
    what += ("--rounds", "1", "--blocks", "2") if options.rehearsal else ("--rounds", "2", "--blocks", "5")
    return Stage(name, (sys.executable, "bench/block.py", *where, *what), limit=180, least=60)


def sanitizer_command(program: str, tool: str) -> list[str]:
    """compute-sanitizer's ``tool`` over our kernels alone: torch's are many, and not ours to check."""
    return [program, "--tool", tool, "--error-exitcode", str(_SANITIZER_EXIT), "--kernel-regex", "kns=echo"]


def _sanitizers(options: Options) -> Iterator[Stage]:
    program = find_program("compute-sanitizer")
    absent = ""
    if options.rehearsal:
        absent = "there is nothing to sanitize without a GPU"
    elif program is None:
        absent = "compute-sanitizer is neither on the PATH nor under CUDA_HOME"
    control = (sys.executable, "bench/sanitizer_control.py")
    yield Stage("sanitizer_control", control, absent=absent, **_limits(options, (60, 20), (30, 10)))
    # Every kernel, in one type and at sizes that end in time: instrumented code is many times slower.
    sizes = (
        "(small or head-128 or flow_step or window or uint8 or conv and (whole or patches))"
        if options.quick
        else "not wide"
    )
    chosen = f"{options.backend} and (bfloat16 and {sizes} or advance or rope_table or noise)"
    for tool in SANITIZERS[:2] if options.quick else SANITIZERS:
        tests = _pytest(*_FORMULA_TESTS, "-k", chosen, workers=False)
        command = (*sanitizer_command(program or "compute-sanitizer", tool), *tests)
        summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
        yield Stage(
            tool,
            command,
            # In torch's pool an access beyond one tensor lies within the next.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            proof=rf"(?s)\b[1-9]\d* passed.*{summary}",
            refuted=r"(ERROR|RACECHECK) SUMMARY: [1-9]",
            absent=absent,
            **_limits(options, (100, 25), (35, 15)),
        )


def find_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or where the toolkit lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def stage_environment(stage: Stage) -> dict[str, str]:
    """The environment of its command: ours, the checkout on the path, and what the stage asks for."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
