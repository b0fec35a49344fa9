"""The rows of a report's tables, and how they are put."""

from __future__ import annotations

from dataclasses import dataclass

from echo_rt.bench.tables import Column


@dataclass(frozen=True)
class PartRow:
    """A part of a block in one variant: milliseconds, video frames a second, and how many blocks were measured.

    A rehearsal has no rates: ``fps`` is None.
    """

    variant: str
    part: str
    ms: float
    p99_ms: float
    fps: float | None
    x_torch: float | None
    blocks: int


@dataclass(frozen=True)
class VariantRow:
    """What holds for a variant as a whole; shares and joules are those with blocks begun ahead.

    ``graphs_failed``: the stage that could not be captured and why, where the variant was measured without graphs for
    it.
    """

    variant: str
    memory: str
    backend: str
    graphs: bool
    graphs_failed: str | None
    latents_error: float | None
    frames_error: float | None
    bound: float | None
    idle: float | None
    joules_a_frame: float | None
    verdict: str


@dataclass(frozen=True)
class PeerRow:
    """Another's code beside ours; None where it was not measured. ``ratio``: its time over ours."""

    peer: str
    ms: float | None
    p99_ms: float | None
    ours_ms: float | None
    ratio: float | None
    error: float | None
    what: str


PART_COLUMNS = (
    Column("variant", "variant", text=True),
    Column("part", "part", text=True),
    Column("ms", "ms", ".3f"),
    Column("p99_ms", "p99", ".3f"),
    Column("fps", "FPS", ".2f"),
    Column("x_torch", "x torch", ".2f"),
    Column("blocks", "blocks"),
)
VARIANT_COLUMNS = (
    Column("variant", "variant", text=True),
    Column("memory", "memory", text=True),
    Column("backend", "backend", text=True),
    Column("graphs", "graphs", text=True),
    Column("latents_error", "latents off by", ".1e"),
    Column("frames_error", "frames off by", ".1e"),
    Column("bound", "bound", ".1e"),
    Column("idle", "idle", ".2%"),
    Column("joules_a_frame", "J a frame", ".3f"),
    Column("verdict", "", text=True),
)
PEER_COLUMNS = (
    Column("peer", "peer", text=True),
    Column("ms", "ms", ".3f"),
    Column("p99_ms", "p99", ".3f"),
    Column("ours_ms", "ours, ms", ".3f"),
    Column("ratio", "x ours", ".2f"),
    Column("error", "off by", ".1e"),
    Column("what", "what is compared", text=True),
)
GOAL_COLUMNS = (
    Column("goal", "goal", text=True),
    Column("value", "value", ".2f"),
    Column("unit", "", text=True),
    Column("verdict", "", text=True),
)
FIGURE_COLUMNS = (
    Column("what", "what", text=True),
    Column("value", "value", ".4g"),
    Column("unit", "", text=True),
    Column("how", "how it comes about", text=True),
)
