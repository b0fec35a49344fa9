"""``soak.jsonl``: one JSON object a line, only ever appended to, whole again after any kill.

A line with ``"blocks"`` is an interval: blocks ``first_block .. block``. A line with ``"end"`` says how a process
ended. After a resume the blocks since the snapshot are made again: their new lines stand for the old ones, which stay
in the file as what the new ones are compared with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo_rt.errors import OutputError, StreamError
from echo_rt.utils.atomic_file import reason

JOURNAL_FILE = "soak.jsonl"
_TAIL = 4096

Line = dict[str, Any]


class Journal:
    """The file, open for appending. A torn last line, which a kill in the middle of a write leaves, is cut off."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._size = self._whole_lines()
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot write: {reason(error)}") from None

    def _whole_lines(self) -> int:
        """Bytes up to the end of the last line that has one."""
        end = os.fstat(self._descriptor).st_size
        while end > 0:
            begin = max(0, end - _TAIL)
            newline = os.pread(self._descriptor, end - begin, begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
        return 0

    def append(self, line: Line) -> None:
        """Write one line, all of it or none; raises ``OutputError``."""
        data = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            raise OutputError(f"{self.path}: cannot write: {reason(error)}") from None
        self._size += len(data)

    def sync(self) -> None:
        """Have it all on the disk; raises ``OutputError``."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OutputError(f"{self.path}: may not be whole on the disk: {reason(error)}") from None

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_lines(folder: Path) -> Iterator[Line]:
    """The lines in the order in which they were written; none where there is no file.

    :class:`StreamError` for a line that is no JSON object: that file was not written here, or the disk is at fault.
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
                    raise StreamError(f"{path}: line {number}: expected a line of a soak, came {text[:40]!r}")
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {reason(error)}") from None


class Past:
    """What earlier processes left: their number, the hashes of blocks to be made again, how far they got.

    ``block``: the one that comes next, where the snapshot is; the journal must reach it (:class:`StreamError`).
    """

    def __init__(self, folder: Path, block: int) -> None:
        self.runs = 0
        self.frames = 0
        self.elapsed = 0.0
        self.hashes: dict[int, str] = {}
        reached = rollbacks = 0
        branched = False  # whether this process had gone back to a good state since: the snapshot leads elsewhere
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
                # Of two lines that end here the later is the one that was gone on from.
                self.frames, self.elapsed = line["frame"], line["elapsed"]
        if reached < block:
            raise StreamError(
                f"{folder / JOURNAL_FILE}: expected lines up to block {block - 1}, where the snapshot is; "
                f"they end at {reached - 1}"
            )
