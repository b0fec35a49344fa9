"""What a stream does about a block that went wrong: NaN or infinite values, or no end in sight."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.chunk import Vitals
from echo_rt.errors import ConfigError, OutputError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.build_info import __version__

STOP, ROLL_BACK = "stop", "roll_back"


@dataclass(frozen=True)
class Guard:
    """Chosen for each stream.

    Every block's values are counted on the device, beside it; the count comes with the frames, so a block that is not
    finite is never handed out, and finding it costs no synchronization.

    Args:
        policy: ``"stop"`` ends the stream with :class:`NumericalError`. ``"roll_back"`` goes back to the last good
            state and on from there with other noise: the video's numbering goes on, its content jumps back by up to
            ``keep_every`` blocks. ``stream.rollbacks`` counts.
        keep_every: blocks between two good states that ``roll_back`` keeps on the host; each copies the whole state.
            The first is kept behind the blocks that are begun together; before it there is nothing to go back to.
        attempts: rollbacks in a row, without a good block between them, after which the stream stops all the same.
        evidence: a folder, made if it is not there, for the state and the figures of every such block, or None.
        block_seconds: the longest that a block may take, or the stream ends with :class:`StallError`; None: no bound.
            On a CPU, which cannot be left while it computes, it is seen when the block is there.
    """

    policy: str = STOP
    keep_every: int = 100
    attempts: int = 3
    evidence: str | Path | None = None
    block_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in (STOP, ROLL_BACK):
            raise ConfigError(f"guard: policy must be {STOP!r} or {ROLL_BACK!r}, got {self.policy!r}")
        for name in ("keep_every", "attempts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"guard: {name} must be a positive integer, got {value!r}")
        bound = self.block_seconds
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if bound is not None and not (number and 0 < bound < math.inf):
            raise ConfigError(f"guard: block_seconds must be a positive number or None, got {bound!r}")

    def save_evidence(
        self, block: int, snapshot: Snapshot, before: Snapshot | None, vitals: Vitals, facts: dict[str, Any]
    ) -> list[Path]:
        """Write what is known of ``block``; returns the files. Only where evidence is wanted.

        ``snapshot``: the state after it, or after the block that was begun behind it. ``before``: the last good state,
        where one is kept; resumed, it makes the block again. The figures say which block each stands behind. Raises
        :class:`OutputError`.
        """
        assert self.evidence is not None
        folder = Path(self.evidence)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot make the folder: {error.strerror}") from None
        # A block that goes wrong again, in this run or a later one, takes nothing from what is known of the first time.
        stems = (f"block-{block:08d}{'' if time == 1 else f'-{time}'}" for time in itertools.count(1))
        stem = next(stem for stem in stems if not (folder / f"{stem}.json").exists())
        state, figures = folder / f"{stem}.safetensors", folder / f"{stem}.json"
        states = {state: snapshot}
        if before is not None:
            states[folder / f"{stem}-before.safetensors"] = before
        told = {
            "block": block,
            "states": {file.name: kept.block + kept.offset for file, kept in states.items()},
            "seed": snapshot.seed,
            "echo_rt": __version__,
            "vitals": {name: _plain(value) for name, value in dataclasses.asdict(vitals).items()},
            **facts,
        }
        try:
            for file, kept in states.items():
                kept.save(file)
            write_whole(figures, json.dumps(told, indent=2).encode() + b"\n")
        except OutputError:
            for file in states:
                file.unlink(missing_ok=True)  # all or nothing
            raise
        return [*states, figures]


def _plain(value: float | None) -> float | str | None:
    """For JSON, which has no NaN: what is no number is told by its name."""
    return value if value is None or math.isfinite(value) else str(value)
