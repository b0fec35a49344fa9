"""What a promise is: it sees the lines of a journal and can say at any time how it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod

from echo_rt.soak.journal import Line
from echo_rt.soak.outcome import Status, Verdict


class Promise(ABC):
    """Sees every line, keeps what it needs to say how it stands."""

    name: str

    def __init__(self) -> None:
        self._broken: str | None = None

    @property
    @abstractmethod
    def limit(self) -> str:
        """The threshold in words."""

    @abstractmethod
    def see(self, line: Line) -> None:
        """One more line of the journal."""

    @abstractmethod
    def evidence(self) -> str | None:
        """What was seen, where it was kept; None where too little was seen to tell."""

    def unchecked(self) -> str:
        """Why there is no evidence."""
        return "no block was made"

    def breaks(self, evidence: str) -> None:
        """It is broken; the first time counts."""
        self._broken = self._broken or evidence

    def verdict(self) -> Verdict:
        """How it stands after the lines so far."""
        if self._broken is not None:
            return Verdict(self.name, Status.BROKEN, self.limit, self._broken)
        seen = self.evidence()
        if seen is None:
            return Verdict(self.name, Status.UNCHECKED, self.limit, self.unchecked())
        return Verdict(self.name, Status.KEPT, self.limit, seen)
