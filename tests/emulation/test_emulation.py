"""The host's stand-in for CUDA: right kernels give right results under every seed, planted mistakes are found."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from host_compiler import CSRC, SANITIZERS, build, require_sanitizers

from echo_rt.ops.float8 import FLOAT8_MAX
from echo_rt.utils.device import FLOAT8

HERE = Path(__file__).parent
KERNELS = (HERE / "kernels.cu", HERE / "warpgroup.cu", HERE / "driver.cpp")

SEEDS = range(8)
# Names of `enum class Fault`, in order.
FAULTS = re.findall(r"^  k(\w+),", (HERE / "kernels.h").read_text(encoding="utf-8"), re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    error: int
    message: str
    values: list[float]


Driver = Callable[..., Outcome]


def start(program: Path, case: str, *numbers: int, seed: int = 0) -> subprocess.CompletedProcess[str]:
    # Leak checks need rights that a container may not give.
    environment = {**os.environ, "ECHO_RT_EMULATION_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), case, *(str(int(number)) for number in numbers)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def driver_of(program: Path) -> Driver:
    def run(case: str, *numbers: int, seed: int = 0) -> Outcome:
        done = start(program, case, *numbers, seed=seed)
        assert done.returncode == 0, f"{case} {numbers}: {done.stdout}{done.stderr}"
        return Outcome(**json.loads(done.stdout))

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return driver_of(build(tmp_path_factory, "plain", KERNELS, "-O2"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_sanitizers(tmp_path_factory)
    return build(tmp_path_factory, "sanitized", KERNELS, "-O1", *SANITIZERS)


def fault(name: str) -> int:
    return FAULTS.index(name)


def succeeded(outcome: Outcome) -> list[float]:
    assert (outcome.error, outcome.message) == (0, "")
    return outcome.values


# ---- right kernels


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 16), (72, 136, 200), (8, 8, 8), (128, 64, 24)])
def test_tile_product_agrees_with_float64(run: Driver, half: bool, m: int, n: int, k: int) -> None:
    for seed in SEEDS:
        error, broken = succeeded(run("product", half, m, n, k, fault("None"), seed=seed))
        assert error < 3e-7, (seed, error)
        assert broken == 0


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("k", "pipelined"), [(16, False), (48, False), (16, True), (112, True)])
def test_a_warpgroups_product_agrees_with_float64(run: Driver, half: bool, k: int, pipelined: bool) -> None:
    for seed in SEEDS:
        error, broken = succeeded(run("warpgroup_product", half, k, fault("None"), pipelined, seed=seed))
        assert error < 3e-7, (seed, error)
        assert broken == 0


def test_sums_that_are_not_waited_for_are_not_there(run: Driver) -> None:
    assert succeeded(run("warpgroup_product", False, 16, fault("NoWait"), False))[1] == 64 * 96


@pytest.mark.parametrize("name", ["NoBarrier", "NoSecondBarrier"])
def test_a_barrier_that_a_warpgroups_product_lacks_is_seen(run: Driver, name: str) -> None:
    outcomes = [run("warpgroup_product", False, 48, fault(name), False, seed=seed) for seed in SEEDS]
    assert any(outcome.error == 0 and (outcome.values[0] > 1e-3 or outcome.values[1] > 0) for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoFence", "wgmma behind copies to shared memory, without fence.proxy.async between"),
        ("NoBegin", "wgmma without wgmma.fence before it"),
        ("ForgottenProducts", "1 products of a warpgroup were issued and never waited for"),
    ],
)
def test_what_a_warpgroups_product_needs(run: Driver, name: str, message: str) -> None:
    outcome = run("warpgroup_product", False, 16, fault(name), False)
    assert outcome.error == 719 and message in outcome.message


def test_what_one_thread_does_not_fence_the_others_miss_behind_a_barrier(run: Driver) -> None:
    outcomes = [run("warpgroup_product", False, 16, fault("NoFence"), False, seed=seed) for seed in SEEDS]
    assert any("thread (5,0,0)" not in outcome.message for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoBarrier", "an mbarrier that is not initialized"),
        ("NoFenceOfBarriers", "behind whose initialization its thread did not call fence.proxy.async"),
        ("NoFence", "wgmma behind copies to shared memory, without fence.proxy.async between"),
        ("NoExpect", "a bulk copy ends at an mbarrier that nobody told to expect its bytes"),
        ("ShortBulkCopy", "a bulk copy of 8 bytes, which are no multiple of 16"),
        ("NoArrival", r"deadlock: 128 of 160 .* wait in an mbarrier's phase at .*warpgroup.cu:\d+; 32 of 160"),
        ("NoRelease", r"deadlock: 128 of 160 .* wait in an mbarrier's phase at .*warpgroup.cu:\d+; 32 of 160"),
        ("ForgottenCopies", "1 bulk copies were issued and never waited for"),
    ],
)
def test_what_a_pipeline_needs(run: Driver, name: str, message: str) -> None:
    for seed in SEEDS:
        outcome = run("warpgroup_product", False, 112, fault(name), True, seed=seed)
        assert outcome.error == 719 and re.search(message, outcome.message), outcome.message


@pytest.mark.parametrize("name", ["WrongParity", "TwoArrivals", "EarlyRelease"])
def test_a_pipeline_out_of_step_is_seen(run: Driver, name: str) -> None:
    outcomes = [run("warpgroup_product", False, 112, fault(name), True, seed=seed) for seed in SEEDS]
    assert sum(outcome.error != 0 or outcome.values[1] > 0 for outcome in outcomes) > len(outcomes) // 4


def test_fragments_lie_where_the_manual_puts_them(run: Driver) -> None:
    values = succeeded(run("fragments"))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            matrix = 64 * i  # of 8 x 8 values that count on
            low, high = matrix + 8 * g + 2 * t, matrix + 8 * g + 2 * t + 1
            assert values[4 * lane + i] == low | high << 16, (lane, i)
            low, high = matrix + 8 * (2 * t) + g, matrix + 8 * (2 * t + 1) + g
            assert values[128 + 4 * lane + i] == low | high << 16, ("transposed", lane, i)


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives(run: Driver, seed: int) -> None:
    values = succeeded(run("collectives", seed=seed))
    rows = [[int(v) for v in values[32 * i : 32 * i + 32]] for i in range(7)]
    lanes = range(32)
    ballot = sum(1 << lane for lane in lanes if lane % 3 == 0)
    assert rows[0] == [5] * 32
    assert rows[1] == [lane // 8 * 8 + 1 for lane in lanes]
    assert rows[2] == [lane ^ 3 for lane in lanes]
    assert rows[3] == [lane + 2 if lane % 16 < 14 else lane for lane in lanes]
    assert rows[4] == [lane - 4 if lane >= 4 else lane for lane in lanes]
    assert [v % 2**32 for v in rows[5]] == [ballot] * 32
    assert rows[6] == [0] * 16 + [3] * 16


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 127), (2, 1000)])
def test_sums_over_warps_blocks_and_grid(run: Driver, rows: int, size: int) -> None:
    for seed in SEEDS:
        errors = succeeded(run("sums", rows, size, seed=seed))
        assert max(errors) < 3e-7, (seed, errors)


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_in_the_right_places_are_right_in_any_order(run: Driver, seed: int) -> None:
    assert succeeded(run("reverse", 5, fault("None"), seed=seed)) == [0, 0]
    assert succeeded(run("swap_neighbours", fault("None"), seed=seed)) == [0]


def test_sixteen_bit_types_convert_as_torch_does(run: Driver) -> None:
    for step in (4096, 65521):  # every tie, and others
        values = torch.tensor(succeeded(run("conversions", step)), dtype=torch.float64).to(torch.int64)
        widened, rounded = values[: 2 * 65536].view(65536, 2), values[2 * 65536 :]
        patterns = torch.arange(65536).to(torch.int16)
        given = torch.arange(0, 2**32, step).to(torch.int32).view(torch.float32)
        for column, dtype in enumerate((torch.bfloat16, torch.float16)):
            expected = patterns.view(dtype).float()
            actual = widened[:, column].to(torch.int32).view(torch.float32)
            assert torch.equal(actual.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(actual[numbers].view(torch.int32), expected[numbers].view(torch.int32))

            expected = given.to(dtype)
            actual = (rounded >> 16 * column & 0xFFFF).to(torch.int16).view(dtype)
            assert torch.equal(actual.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(actual[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_float8_converts_as_torch_does(run: Driver) -> None:
    for step in (16384, 65521):  # every tie, and others
        pairs = torch.tensor(succeeded(run("float8_conversions", step)), dtype=torch.float64).to(torch.int64)
        every = torch.cat((torch.arange(65536) << 16, torch.arange(0, 2**32, step)))
        given = every.to(torch.int32).view(torch.float32)
        for sign, bits in ((1, pairs & 0xFF), (-1, pairs >> 8)):
            # A cast makes NaN of what lies beyond the largest value in some versions of torch; kernels saturate.
            expected = (sign * given).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
            actual = bits.to(torch.uint8).view(FLOAT8)
            assert torch.equal(actual.float().isnan(), expected.float().isnan())
            numbers = ~expected.float().isnan()
            assert torch.equal(actual[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))


def test_host_threads_launch_beside_each_other(run: Driver) -> None:
    error, broken, other = succeeded(run("two_host_threads"))
    assert error < 3e-7
    assert broken == 0
    assert other != 0  # the launch on the other thread was a mistake, and stayed there


def test_fibers_of_the_c_library_do_as_well(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = driver_of(build(tmp_path_factory, "ucontext", KERNELS, "-O0", "-DECHO_RT_EMULATION_UCONTEXT"))
    error, broken = succeeded(run("product", 0, 64, 64, 64, fault("None")))
    assert error < 3e-7
    assert broken == 0
    assert "have ended" in run("mistake", fault("DivergentBarrier"), 64, 0).message


# ---- planted mistakes that spoil the result


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_spoils_the_result(run: Driver, seed: int) -> None:
    wrong, not_numbers = succeeded(run("reverse", 1, fault("NoBarrier"), seed=seed))
    assert wrong == not_numbers > 0  # what nobody has written yet is NaN
    wrong, _ = succeeded(run("reverse", 5, fault("NoSecondBarrier"), seed=seed))
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_warp_barrier_spoils_the_result(run: Driver, seed: int) -> None:
    assert succeeded(run("swap_neighbours", fault("NoSyncWarp"), seed=seed))[0] > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["NoWait", "NoBarrier", "NoSecondBarrier"])
def test_a_product_that_does_not_wait_is_spoilt(run: Driver, name: str, seed: int) -> None:
    _, broken = succeeded(run("product", 0, 128, 128, 64, fault(name), seed=seed))
    assert broken > 0


def test_an_unwritten_element_is_not_a_number(run: Driver) -> None:
    wrong, not_numbers = succeeded(run("reverse", 1, fault("Unwritten")))
    assert wrong == not_numbers == 3  # one in each block


# ---- planted mistakes that end the launch


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BehindStatic", r"written outside fixed \(128 bytes, .*kernels.cu:\d+\), 0 bytes behind its end; block"),
        ("BeforeStatic", r"written outside fixed \(128 bytes, .*\), 0 bytes before its beginning"),
        ("BehindDynamic", r"written outside dynamic shared memory \(128 bytes\), 0 bytes behind its end"),
        (
            "DivergentBarrier",
            r"deadlock: 16 of 32 threads \(the first is thread \(0,0,0\)\) wait in __syncthreads at .*kernels.cu:\d+; "
            r"16 of 32 threads \(the first is thread \(16,0,0\)\) have ended; block \(0,0,0\), seed 7",
        ),
        ("TwoBarriers", r"__syncthreads at .*:\d+ while other threads wait in the one at .*:\d+"),
        ("MissingLane", r"deadlock: 31 of 32 threads .* wait in a shuffle at .*; 1 of 32 .*\(3,0,0\)\) have ended"),
        ("TwoShuffles", r"a shuffle at .*:\d+ while lanes of its mask wait in a shuffle at .*:\d+ with the mask"),
        ("MixedBarriers", r"deadlock: 16 of 32 .* wait in __syncwarp at .*; 16 of 32 .* wait in __syncthreads at"),
        ("ForgottenCopies", "1 asynchronous copies were issued and never waited for"),
        ("Misaligned", "a vector load at an address that is not a multiple of 16"),
        ("DynamicTooLarge", "4000 bytes of dynamic shared memory, .* asked of a launch that gave 128"),
        ("StaticTooLarge", r"no room for too_many .*: 49284 bytes of static shared memory, at most 49152"),
    ],
)
def test_a_mistake_fails_the_launch_and_is_named(run: Driver, name: str, message: str) -> None:
    outcome = run("mistake", fault(name), 32, 128, seed=7)
    assert outcome.error == 719  # cudaErrorLaunchFailure
    assert re.search(message, outcome.message), outcome.message
    next_error, message_is_gone = outcome.values
    assert (next_error, message_is_gone) == (0, 1)


@pytest.mark.parametrize(
    ("threads", "dynamic_bytes", "message"),
    [
        (1025, 0, r"a block of \(1025,1,1\) threads"),
        (0, 0, r"a block of \(0,1,1\) threads"),
        (32, 227 * 1024 + 1, "232449 bytes of dynamic shared memory, of at most 232448"),
    ],
)
def test_an_impossible_launch_is_refused(run: Driver, threads: int, dynamic_bytes: int, message: str) -> None:
    outcome = run("mistake", fault("None"), threads, dynamic_bytes)
    assert outcome.error != 0
    assert re.search(message, outcome.message), outcome.message


# ---- under the sanitizers


def test_right_kernels_are_clean_under_the_sanitizers(sanitized: Path) -> None:
    run = driver_of(sanitized)
    assert succeeded(run("product", 1, 72, 136, 40, fault("None")))[0] < 3e-7
    assert max(succeeded(run("sums", 2, 300))) < 3e-7
    assert succeeded(run("swap_neighbours", fault("None"))) == [0]
    assert succeeded(run("reverse", 3, fault("None"))) == [0, 0]
    assert succeeded(run("warpgroup_product", 0, 48, fault("None"), True))[0] < 3e-7
    assert all(not math.isnan(v) for v in succeeded(run("fragments")))


def test_a_block_left_in_the_middle_is_clean_under_the_sanitizers(sanitized: Path) -> None:
    outcome = driver_of(sanitized)("mistake", fault("DivergentBarrier"), 64, 0)
    assert "deadlock" in outcome.message
    assert outcome.values == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BehindStatic", "index 32 out of bounds"),
        ("BeforeStatic", "index -1 out of bounds"),
        ("BehindDynamic", "AddressSanitizer: use-after-poison"),
    ],
)
def test_a_sanitizer_stops_at_the_access_outside_shared_memory(sanitized: Path, name: str, message: str) -> None:
    done = start(sanitized, "mistake", fault(name), 32, 128)
    assert done.returncode != 0
    assert message in done.stderr
    assert "kernels.cu" in done.stderr


# ---- the sources


def test_assembly_stands_in_few_files_only() -> None:
    """PTX in ptx.cuh, barrier.cuh and warpgroup.cuh, the host's change of stacks in fiber.cpp."""
    sources = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    with_assembly = {
        path.relative_to(CSRC).as_posix()
        for path in sources
        if re.search(r"^[^/\n]*\b(__)?asm(__)?\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert with_assembly == {"common/barrier.cuh", "common/ptx.cuh", "common/warpgroup.cuh", "emulation/fiber.cpp"}


def test_kernels_neither_allocate_nor_wait_nor_keep_state() -> None:
    """A launch does nothing that a graph's capture would refuse or a second runtime would notice."""
    runtime = r"\bcuda(Malloc|Free|Memcpy|Memset|HostAlloc|(Device|Stream|Event)Synchronize|EventQuery|StreamQuery)\w*"
    kept = r"^\s*(static|thread_local|__device__)\s+(?!.*\()(?!constexpr)(?!const\b).*;"
    forbidden = re.compile(f"{runtime}|{kept}", re.MULTILINE)
    folders = [folder for folder in CSRC.iterdir() if folder.is_dir() and folder.name != "emulation"]
    sources = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in {".h", ".cuh", ".cu"}]
    assert len(sources) > len(folders)
    found = {path.name: match[0] for path in sources if (match := forbidden.search(path.read_text(encoding="utf-8")))}
    assert not found


def test_the_device_compiler_takes_the_same_kernels(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    warnings = ("--Werror", "all-warnings", "-Xcompiler", "-Wall")
    command = [nvcc, "-std=c++17", *warnings, "-arch=sm_80", f"-I{CSRC}", "-c", str(HERE / "kernels.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
