"""How a soak ended, and what the process tells its caller by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from echo_rt.utils.wording import counted

EXIT_BROKEN = 3  # a promise was broken
EXIT_FAILED = 4  # the stream failed


class Status(str, Enum):
    """Of a promise."""

    KEPT = "kept"
    BROKEN = "broken"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Verdict:
    """On one promise: ``limit`` is its threshold in words, ``evidence`` what was seen, with block numbers."""

    promise: str
    status: Status
    limit: str
    evidence: str


@dataclass(frozen=True)
class Outcome:
    """``end``: complete, failed, interrupted or terminated. ``failure``: what the stream raised, as one line.

    ``signal_code``: the exit code of the signal that ended it, if one did. ``backend``, ``backend_reason``
    and ``taken`` (what the model was made of) are those of the process that ended it; None where that is one of a
    version that did not write them down.
    """

    end: str
    blocks: int
    verdicts: Sequence[Verdict]
    report: Path
    backend: str | None = None
    backend_reason: str | None = None
    taken: Mapping[str, Any] | None = None
    failure: str | None = None
    signal_code: int | None = None

    @property
    def exit_code(self) -> int:
        """0 only for a soak that came to its end and broke no promise."""
        if self.failure is not None:
            return EXIT_FAILED
        if any(verdict.status is Status.BROKEN for verdict in self.verdicts):
            return EXIT_BROKEN
        return self.signal_code or 0

    @property
    def summary(self) -> str:
        """One line."""
        counts = {status: sum(v.status is status for v in self.verdicts) for status in Status}
        said = ", ".join(f"{count} {status.value}" for status, count in counts.items())
        broken = [verdict for verdict in self.verdicts if verdict.status is Status.BROKEN]
        return f"{self.end} after {counted(self.blocks, 'block')}; promises: {said}" + "".join(
            f"; {verdict.promise}: {verdict.evidence}" for verdict in broken
        )
