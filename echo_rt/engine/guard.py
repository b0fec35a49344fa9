"""What a stream does about a bad block: one with NaN or infinite values, or one that takes too long."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from echo_rt.chunk import Chunk
from echo_rt.errors import ConfigError, OutputError
from echo_rt.options import is_number, is_whole
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import claimed, names_in, raising, remove, write_whole
from echo_rt.utils.build_info import __version__

STOP, ROLL_BACK = "stop", "roll_back"


@dataclass(frozen=True)
class Guard:
    """What a stream does about bad blocks.

    Values that are not finite are counted on the device, and the count arrives with the frames: a block with such
    values is never handed out, and the check costs no synchronization.

    Args:
        policy: ``"stop"`` ends the stream with :class:`NumericalError`. ``"roll_back"`` returns to the last good state
            and continues from there with other noise: block numbers go on, the content jumps back by up to
            ``keep_every`` blocks. ``stream.rollbacks`` counts them.
        keep_every: blocks between two good states, which ``roll_back`` copies to the host. The first is kept after the
            blocks that are begun together at the start; a bad block before it ends the stream.
        attempts: rollbacks in a row, without a good block in between, after which the stream ends.
        evidence: a folder, made if needed, for the state and the statistics of every bad block, or None.
        block_seconds: seconds that a block may take before the stream ends with :class:`StallError`; None: no bound.
            On a CPU this is only noticed at the end of the block. Time in which this process was stopped is left out.
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
            if not is_whole(value := getattr(self, name), 1):
                raise ConfigError(f"guard: {name} must be a positive integer, got {value!r}")
        bound = self.block_seconds
        if bound is not None and not (is_number(bound) and bound > 0):
            raise ConfigError(f"guard: block_seconds must be a positive number or None, got {bound!r}")

    def save_evidence(
        self, chunk: Chunk, after: Snapshot, before: Snapshot | None, found: str, rollbacks: int
    ) -> list[Path]:
        """Write what is known about a bad block to the folder for evidence; returns the files.

        ``after``: the state after the last block begun. ``before``: the last good state, if one is kept; resumed, it
        makes the block again. ``found``: what is bad. Raises :class:`OutputError`.
        """
        assert self.evidence is not None
        folder, stats = Path(self.evidence), chunk.stats
        with raising(OutputError, f"{folder}: cannot make the folder"):
            if str(folder.absolute()) not in claimed:
                folder.mkdir(parents=True, exist_ok=True)
            there = names_in(folder)
        # A block that goes wrong again, in this run or a later one, does not overwrite the first evidence.
        stems = (f"block-{chunk.index:08d}{'' if time == 1 else f'-{time}'}" for time in itertools.count(1))
        stem = next(stem for stem in stems if f"{stem}.json" not in there)
        states = {folder / f"{stem}.safetensors": after}
        if before is not None:
            states[folder / f"{stem}-before.safetensors"] = before
        told = {
            "block": chunk.index,
            "states": {file.name: kept.block + kept.offset for file, kept in states.items()},
            "seed": after.seed,
            "echo_rt": __version__,
            # JSON has no NaN or infinity: these become text.
            "vitals": {k: v if v is None or math.isfinite(v) else str(v) for k, v in vars(stats.vitals).items()},
            "found": found,
            "rollbacks": rollbacks,
            "position": {"newest_temporal_id": stats.newest_temporal_id, "shift": stats.shift},
        }
        try:
            for file, kept in states.items():
                kept.save(file)
            write_whole(folder / f"{stem}.json", json.dumps(told, indent=2).encode() + b"\n")
        except OutputError:
            for file in states:
                remove(file)  # all or nothing
            raise
        return [*states, folder / f"{stem}.json"]
