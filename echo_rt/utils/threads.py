"""CPU threads beside other programs: waiting threads spin while cores are free, and sleep while they are not.

Torch's OpenMP threads wait for each other at the end of every operation, and by default spin for milliseconds before
they sleep. On cores that other programs use too, a spinning thread takes the time of the thread it waits for, and a
stream becomes many times slower. OMP_WAIT_POLICY=PASSIVE always sleeps: slower on free cores, and read by libgomp only
when it is loaded.

One rule of libgomp works at run time: while there are more OpenMP threads than cores, it spins for 100 rounds instead
of 300,000 (its manual, GOMP_SPINCOUNT). So :func:`share_cpu` adds idle OpenMP threads while other programs need the
cores. Operations still run on the same number of threads: the last bits of a video depend on it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_logger = logging.getLogger("echo_rt.utils.threads")

# A user who sets one of these has decided how threads wait.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

_PERIOD = 0.25  # seconds between measurements: the kernel counts time in ticks of 10 ms
_SLACK = 0.25  # of a core: about where sleeping becomes the faster way to wait (docs/embedding.md)

_STAT = Path("/proc/stat")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def busy_seconds(stat: str, cores: Collection[int]) -> float:
    """Seconds since boot that ``cores`` were busy, or others' (steal); ``stat`` is the text of ``/proc/stat``."""
    names, rows = {f"cpu{core}" for core in cores}, (line.split() for line in stat.splitlines())
    # user, nice, system, idle, iowait, irq, softirq, steal; the times of guests are in the first two already
    ticks = sum(int(ticks) for name, *columns in rows if name in names for ticks in columns[:3] + columns[5:8])
    return ticks / os.sysconf("SC_CLK_TCK")


def core_quota(cgroup: str, root: Path) -> float:
    """CPU quota of a process's control groups (version 2) in cores; infinite without a limit.

    ``cgroup`` is the text of ``/proc/self/cgroup``, ``root`` the folder where control groups are mounted.
    """
    quotas = [float("inf")]
    path = next((line[3:].strip("/") for line in cgroup.splitlines() if line.startswith("0::")), "")
    for group in (root / path, *(root / path).parents):
        limit = group / "cpu.max"
        if group.is_relative_to(root) and limit.exists():
            allowed, period = limit.read_text(encoding="ascii").split()
            quotas += [] if allowed == "max" else [int(allowed) / int(period)]
    return min(quotas)


@dataclass(frozen=True)
class Cores:
    """Numbers of the cores that this process may run on, and its CPU quota in cores."""

    numbers: frozenset[int]
    quota: float

    @classmethod
    def available(cls) -> Cores:
        """Read affinity and control groups of this process."""
        cgroup = _CGROUP.read_text(encoding="utf-8") if _CGROUP.exists() else ""
        return cls(frozenset(os.sched_getaffinity(0)), core_quota(cgroup, _CGROUP_ROOT))

    def free(self, others: float) -> float:
        """Cores left to this process while other programs use ``others`` cores."""
        return min(self.quota, len(self.numbers) - others)


@contextmanager
def share_cpu(device: torch.device | str) -> Iterator[None]:
    """Inside the context, let torch's CPU threads sleep while other programs need the cores, and spin otherwise.

    ``device`` is the model's. Does nothing on a GPU, with one thread, where the user has set one of
    :data:`WAIT_VARIABLES`, or where torch's OpenMP is not GNU's. Results and the number of threads stay the same.
    """
    wanted = torch.device(device).type == "cpu" and torch.get_num_threads() > 1 and not _chosen() and _STAT.exists()
    if not wanted or (openmp := _libgomp()) is None:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(openmp, over), name="echo-rt share-cpu", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _chosen() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in WAIT_VARIABLES if name in os.environ)


def _libgomp() -> ctypes.CDLL | None:
    """The libgomp that torch is linked against; None, with a line in the log, if it uses another OpenMP."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # The handle of a loaded library also finds the symbols of its dependencies: torch's own libgomp, not another.
        library = ctypes.CDLL(str(torch_cpu), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        library = None
    # Intel's and LLVM's OpenMP export GNU's entry points as well, but wait by other rules.
    if library is None or not hasattr(library, "GOMP_parallel") or hasattr(library, "__kmpc_fork_call"):
        _logger.debug("torch's OpenMP is not GNU's libgomp: how its CPU threads wait is left as it is")
        return None
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


def _others(cores: Cores) -> tuple[float, float]:
    """The time in seconds, and the CPU seconds that other programs have had until then."""
    busy = busy_seconds(_STAT.read_text(encoding="ascii"), cores.numbers)
    return time.monotonic(), busy - time.process_time()


def _watch(openmp: ctypes.CDLL, over: threading.Event) -> None:
    cores, threads = Cores.available(), torch.get_num_threads()
    since, before = _others(cores)
    sleeping = False
    with ExitStack() as team:
        while not over.wait(_PERIOD):
            now, until_now = _others(cores)
            others = max(0.0, until_now - before) / (now - since)
            since, before = now, until_now
            crowded = cores.free(others) < threads - _SLACK
            if crowded == sleeping:
                continue
            sleeping, waiting = crowded, "sleep" if crowded else "spin"
            use = "other programs use %.1f of %d cores: CPU threads %s while they wait"
            _logger.debug(use, others, len(cores.numbers), waiting)
            team.close()
            if crowded:
                team.enter_context(idle_team(openmp, threads))


@contextmanager
def idle_team(openmp: ctypes.CDLL, threads: int) -> Iterator[None]:
    """Inside, OpenMP has sleeping threads, enough for libgomp to have more of them than cores.

    ``threads`` is the number that torch's operations use. A team ends with the thread that started it.
    """
    over, made = threading.Event(), threading.Event()
    # Each thread of the team calls free(NULL), which does nothing. The caller is one of the team.
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
    size = max(openmp.omp_get_num_procs() - threads + 1, 1) + 1

    def hold() -> None:
        openmp.GOMP_parallel(nothing, None, size, 0)
        made.set()
        over.wait()

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    made.wait()
    try:
        yield
    finally:
        over.set()
        holder.join()
