"""Every error that echo-rt raises on purpose.

``EchoError`` is what a caller can act on: its message is one line that says what was expected and what was found.
The command line prints it without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EchoError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line exits with."""

    exit_code = 2


class ConfigError(EchoError):
    """A size, window, schedule or option that the model cannot have."""


class WeightsError(EchoError):
    """A weight folder or file that is missing, damaged, or does not hold the model it should."""


class ResourceError(EchoError):
    """Memory or file descriptors that this machine does not have; nothing is wrong with what was given."""

    exit_code = 1


class PromptError(EchoError):
    """A prompt, or prompt embeddings, that cannot be used."""


class StreamError(EchoError):
    """A stream or runtime used in a way its state does not allow (closed, already live, other model's snapshot)."""


class SnapshotError(StreamError):
    """A snapshot file that is missing, damaged, or written by a version that this one cannot read."""


class SnapshotVersionError(SnapshotError):
    """A snapshot file that is whole, and of a format that another version of echo-rt writes."""


class StallError(EchoError):
    """A block that took longer than its stream's guard allows."""

    exit_code = 1


class SteadyStateError(EchoError):
    """A block that allocated, waited or moved a buffer, found where that is checked; a defect of this library."""

    exit_code = 1


class BackendError(EchoError):
    """A backend, device or package that is needed and is not there."""


class CaptureError(BackendError):
    """A stage that cannot be captured as a CUDA graph; a runtime with ``graphs=False`` makes the same video.

    ``stage``: its name; ``cause``: the first line of what was raised amid the capture.
    """

    def __init__(self, stage: str, cause: str) -> None:
        super().__init__(stage, cause)
        self.stage, self.cause = stage, cause

    def __str__(self) -> str:
        return (
            f"{self.stage} cannot be captured as a CUDA graph: {self.cause}; "
            "graphs=False (on the command line --no-graphs) makes the same video without graphs"
        )


class OutputError(EchoError):
    """A file that cannot be written to its end: disk full, or gone."""

    exit_code = 1


class TargetError(OutputError):
    """The name of a file to write is one under which nothing can be written: known before any work is done."""

    exit_code = 2


class NumericalError(EchoError):
    """NaN or infinity where numbers should be."""

    exit_code = 1


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` (did you mean 'seed'?)`` for a ``name`` close to one that is known, or nothing; for the end of a message."""
    close = difflib.get_close_matches(name.lower()[:100], known, n=1) if isinstance(name, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def not_one_of(what: str, names: Iterable[str], found: object) -> str:
    """The message about a ``found`` value of ``what`` that is none of ``names``."""
    names = list(names)
    return f"{what} must be one of {', '.join(names)}; got {found!r:.100}{did_you_mean(found, names)}"
