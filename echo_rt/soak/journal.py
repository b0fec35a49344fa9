"""``soak.jsonl``: one JSON object per line, only appended to, whole again after any kill.

A line with ``"blocks"`` is an interval: blocks ``first_block .. block``. A
line with ``"end"`` says how a process ended. After a resume the blocks since the snapshot are generated again: their
new lines replace the old ones, which stay in the file for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from echo_rt.errors import StreamError
from echo_rt.utils.atomic_file import open_plain, reason
from echo_rt.utils.checked_json import read_json

JOURNAL_FILE = "soak.jsonl"

Line = dict[str, Any]

_LONGEST = 2**28  # bytes of a line: twice an hour of hashes at a thousand blocks a second


def _entries(**kinds: Any) -> Any:
    """A JSON object with at least these entries; one of ``(kind, default)`` may be absent."""
    return msgspec.defstruct("Entries", [(name, *(k if isinstance(k, tuple) else (k,))) for name, k in kinds.items()])


_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Run = Annotated[int, Meta(ge=1, le=2**53)]
_Float = Annotated[float, Meta(ge=-1e100, le=1e100)]
_Figure = _Float | None
_Text = str | None
_Bins = dict[Annotated[int, Meta(ge=-20_000, le=20_000)], _Count]  # 1.001^20000 seconds are years
_Misplaced = Annotated[list[int | str], Meta(max_length=2)]
_Mismatches = list[tuple[_Count, str, str]]
# What is read of a line; it has more, for other readers.
_Interval = _entries(
    run=_Run,
    **dict.fromkeys(("first_block", "block", "blocks", "frame", "rollbacks", "compared"), _Count),
    **dict.fromkeys(("video_seconds", "elapsed", "fps"), _Float),
    warm=bool,
    latency=_entries(p50=_Figure, p99=_Figure, max=_Float, max_block=_Count, bins=_Bins),
    switch_latency=_entries(blocks=_Count, max=_Figure),
    zscore=_entries(max=_Figure, block=_Count | None, judged=_Count, outliers=_Count),
    position=_entries(shift=_Count, least_newest_id=int, most_newest_id=int, misplaced=_Misplaced),
    latents=_entries(mean=_Figure, std=_Figure),
    nonfinite=_entries(latent=_Count, video=_Count, block=_Count | None),
    hashes=list[tuple[_Count, str]],
    mismatches=_Mismatches,
    device=_entries(allocated=_Count, reserved=_Count) | None,
    host=_entries(rss=_Count | None),
    gpu=_entries(ecc_uncorrected=_Count | None) | None,
    snapshots=_entries(written=_Count, skipped=_Count, stall=_Figure) | None,
)
_End = _entries(
    run=_Run,
    block=_Count,
    end=str,
    elapsed=_Float,
    failure=_Text,
    problem=_Text,
    nonfinite_failure=bool,
    compared=_Count,
    mismatches=_Mismatches,
    replayed=(_Count, 0),
    backend=(_Text, None),
    backend_reason=(_Text, None),
    taken=(_entries(recipe=(_Text, None), recipe_reason=(_Text, None)) | None, None),
)


def read_lines(folder: Path) -> Iterator[Line]:
    """Yield the lines as they were written, none without a file; :class:`StreamError` for one that is not a soak's."""
    path = folder / JOURNAL_FILE
    try:
        with open(open_plain(path), "rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                expected = f"{path}: line {number}: expected a line of a soak"
                if text.endswith(b"\n"):
                    line = read_json(text, Line, expected, StreamError)
                    read_json(text, _Interval if "blocks" in line else _End, expected, StreamError)
                    yield line
                elif len(text) == _LONGEST:
                    raise StreamError(f"{expected}, found one without an end")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {reason(error)}") from None


class Past:
    """What earlier processes left: their number, how far they got, the hashes of blocks to be generated again.

    ``block`` is the next block of the snapshot; the journal must reach it (:class:`StreamError`).
    """

    def __init__(self, folder: Path, block: int) -> None:
        self.runs = 0
        self.frames = 0
        self.elapsed = 0.0
        self.hashes: dict[int, str] = {}
        reached = rollbacks = 0
        branched = False  # this process rolled back after the snapshot, which leads to another video
        for line in read_lines(folder):
            if line["run"] != self.runs:
                rollbacks, branched = 0, False
            self.runs = line["run"]
            if "blocks" not in line:
                continue
            if line["rollbacks"] > rollbacks:
                rollbacks = line["rollbacks"]
                self.hashes = {number: made for number, made in self.hashes.items() if number < line["first_block"]}
                branched = line["block"] >= block
            if not branched:
                self.hashes |= {number: digest for number, digest in line["hashes"] if number >= block}
            reached = max(reached, line["block"] + 1)
            if line["block"] + 1 == block:
                # Of two lines that end here, the later one belongs to the snapshot.
                self.frames, self.elapsed = line["frame"], line["elapsed"]
        if reached < block:
            expected = f"expected lines up to block {block - 1}, where the snapshot is"
            raise StreamError(f"{folder / JOURNAL_FILE}: {expected}; they end at {reached - 1}")
