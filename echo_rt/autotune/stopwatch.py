"""How long a computation takes on a GPU when it is replayed from a CUDA graph, as in the steady state."""

from __future__ import annotations

from collections.abc import Callable

import torch

from echo_rt.utils.device import capture

_WARM_UPS = 3
_CALLS_TIMED_TOGETHER = 4  # the time between two events includes the launch of the graph


class Bench:
    """Where several computations are timed in turns: their graphs run in one stream, on the same memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture_failed(self) -> None:
        """See :func:`echo_rt.utils.device.capture`."""
        self.pool = torch.cuda.graph_pool_handle()


def stopwatch(
    call: Callable[[], object],
    device: torch.device,
    *,
    calls: int = _CALLS_TIMED_TOGETHER,
    bench: Bench | None = None,
) -> Callable[[], float]:
    """A function that makes ``calls`` calls of ``call`` and returns the milliseconds of one on the device.

    They are replayed from a CUDA graph, so that what cannot be captured fails here, and what a library spends in
    Python does not count. ``bench``: shared by those that never run at the same time.
    """

    def calls_together() -> None:
        for _ in range(calls):
            call()

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device) if bench is None else bench.stream
    with current(device):
        stream.wait_stream(torch.cuda.current_stream(device))
        # Around the capture too: where that fails, torch leaves its stream the current one.
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
            try:
                capture(graph, calls_together, stream=stream, pool=None if bench is None else bench.pool)
            except BaseException:
                if bench is not None:
                    bench.capture_failed()
                raise

    def milliseconds() -> float:
        with current(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / calls

    return milliseconds


def current(device: torch.device) -> torch.cuda.device:
    """Libraries ask for the properties of the current GPU; on a CPU this changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
