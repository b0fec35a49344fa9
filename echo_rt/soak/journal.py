"""``soak.jsonl``: one JSON object per line, only appended to, whole again after any kill.

A line with ``"blocks"`` is an interval: blocks ``first_block .. block``. A line with ``"end"`` says how a process
ended. After a resume the blocks since the snapshot are generated again: their new lines replace the old ones, which
stay in the file for comparison.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo_rt.errors import OutputError, StreamError
from echo_rt.utils.atomic_file import append_whole, reason

JOURNAL_FILE = "soak.jsonl"

Line = dict[str, Any]


class Journal:
    """The file, open for appending. A torn last line, left by a kill in the middle of a write, is cut off.

    All methods raise ``OutputError`` where the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        try:
            self._file = self.path.open("ab", buffering=0)
            with self.path.open("rb") as file:
                self._size = sum(len(text) for text in file if text.endswith(b"\n"))
            self._file.truncate(self._size)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot write: {reason(error)}") from None

    def append(self, line: Line) -> None:
        """Write one line, all of it or none."""
        data = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            self._size = append_whole(self._file, self._size, data)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot write: {reason(error)}") from None

    def sync(self) -> None:
        """Flush all lines to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: may not be whole on the disk: {reason(error)}") from None

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()


def read_lines(folder: Path) -> Iterator[Line]:
    """Yield the lines in the order in which they were written; none without a file.

    :class:`StreamError` for a line that is not a soak's: another program wrote the file, or the disk damaged it.
    """
    path = folder / JOURNAL_FILE
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    return  # torn
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                if not isinstance(line, dict) or not ("blocks" in line or "end" in line):
                    raise StreamError(f"{path}: line {number}: expected a line of a soak, found {text[:40]!r}")
                yield line
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
            if line.get("rollbacks", 0) > rollbacks:
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
