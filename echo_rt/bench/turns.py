"""One turn of a rig: some blocks to find its stride, then blocks that count."""

from __future__ import annotations

from collections.abc import Callable

from echo_rt.bench.figures import Sample, intervals
from echo_rt.bench.rig import Rig
from echo_rt.engine.executor import Lane

# The board's counter of energy, in joules.
Joules = Callable[[], float | None]


def take_turn(rig: Rig, lookahead: int, blocks: int, sample: Sample, joules: Joules) -> None:
    """Make ``blocks`` blocks that count towards ``sample``; the rig is idle before and after.

    Blocks that are begun ahead come sooner the first time, so one more than that many do not count. The energy is that
    of one block more than those that count, so that reading it falls into no time that counts.
    """
    since = rig.executor.mark(Lane.MAIN)
    warm = [rig.block(lookahead) for _ in range(lookahead)]
    before = joules()
    warm.append(rig.block(lookahead))
    measured = [rig.block(lookahead) for _ in range(blocks)]
    after = joules()
    ahead = rig.in_flight_spans()
    rig.drain()
    times = [intervals(block.spans, since) for block in (*warm, *measured)]
    every = [each for block in times for each in block] + intervals(ahead, since)
    sample.add_turn(times[len(warm) - 1], times[len(warm) :], every)
    sample.add_energy(None if before is None or after is None else after - before, blocks + 1)
