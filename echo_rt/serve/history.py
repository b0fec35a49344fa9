"""What is stored of one session: its snapshots and recordings, and all that the next process goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_rt.errors import SnapshotError
from echo_rt.serve.shelf import Notes, Shelf
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.stream import Stream
from echo_rt.utils.atomic_file import close_all

_MOST_PROMPTS = 200  # remembered
_CURRENT = "current"  # folder of the automatic snapshots, apart from those that viewers asked for

logger = logging.getLogger("echo_rt.serve")


class History:
    """Keeps ``notes`` of a session, and stores them with snapshots of its video.

    Between two snapshots every change of the notes is in a log before it takes effect, if the session ``survives`` its
    process: then the automatic snapshots and the log are in a folder of their own.

    ``shelf``: the snapshots that viewers asked for, and the recordings. Raises what :class:`Shelf` does.
    """

    def __init__(self, folder: Path | str, notes: Notes, *, survives: bool) -> None:
        self.notes, self._survives = notes, survives
        self._secured = 0  # number of logged changes that the snapshot before the newest has
        self.shelf = self._current = Shelf(folder, claim=not survives)
        if survives:
            # Two: the newest may have been cut short, by a store that shows a file before it is whole.
            self._current = Shelf(f"{folder}/{_CURRENT}", most=2, claim=False)
            self._current.take_over()

    def close(self) -> None:
        """Let go of the folders."""
        close_all([self._current.close, self.shelf.close])

    # ---------------------------------------------------------------- going on

    def newest(self) -> tuple[str | None, Snapshot | None]:
        """Return name and content of the newest snapshot that is whole, if there is one, and take its notes."""
        names = [str(found["name"]) for found in self._current.snapshots()]
        for name in names:
            try:
                snapshot, self.notes = self._current.open(name)
                return name, snapshot
            except SnapshotError as error:
                if not self._survives or name == names[-1]:
                    raise
                logger.warning("going on from the snapshot before: %s", error)
        return None, None

    def repeat(self, stream: Stream) -> None:
        """Do with ``stream`` what was logged after its snapshot."""
        for change in self._current.logged(self.notes.logged):
            if "text" not in change:
                self.note(change)
            elif change["block"] >= stream.next_prompt_block:  # or it was not taken in the end
                stream.set_prompt(change["text"], block=change["block"], over=change["over"] or 1)
                self.note(change)

    def was_recording(self) -> bool:
        """Whether the process before was killed while it recorded. What there is of that becomes a recording."""
        name = self.notes.recording
        ended = name is None or name in [found["name"] for found in self.shelf.recordings()]
        self.shelf.find_cut_short()
        return not ended

    # ---------------------------------------------------------------- changes

    def log(self, change: Mapping[str, Any]) -> None:
        """Store the next change, in place of one that was logged and not noted; raises ``OutputError``."""
        if self._survives:
            self._current.log(self.notes.logged + 1, change)

    def note(self, change: Mapping[str, Any]) -> None:
        """Take a logged change into the notes: a prompt, or new values of ``paused`` and ``recording``."""
        if "text" in change:
            values: dict[str, Any] = {"prompts": [*self.notes.prompts, change][-_MOST_PROMPTS:]}
        else:
            values = {name: change[name] for name in ("paused", "recording") if name in change}
        self.notes = replace(self.notes, **values, logged=self.notes.logged + 1)

    def change(self, **values: Any) -> None:
        """Log and note new values."""
        self.log(values)
        self.note(values)

    def begin(self, notes: Notes, *, base: int, shown: int) -> None:
        """Take the notes of another video, which begins after ``shown`` pictures of the session."""
        kept = {name: getattr(self.notes, name) for name in ("logged", "epoch", "paused", "recording")}
        self.notes = replace(notes, **kept, base=base, shown=shown)

    def store(self, snapshot: Snapshot, notes: Notes, taken_at: float) -> str:
        """Store what the next process goes on from; returns the snapshot's name. Raises ``OutputError``."""
        name = self._current.keep(snapshot, notes, taken_at)
        self._current.forget(self._secured)
        self._secured = notes.logged
        return name
