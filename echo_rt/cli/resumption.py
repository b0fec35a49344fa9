"""``generate --resume``: what is in the folder of a video that was cut off, and whether the command goes on with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.cli.generate_request import Request
from echo_rt.cli.prompts import TimedPrompt, first_block
from echo_rt.errors import ConfigError, PromptError, TargetError
from echo_rt.output.recorder import SNAPSHOT_FOLDER
from echo_rt.output.segment_index import RecordingIndex
from echo_rt.output.segments import check_free
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import latest_snapshot, snapshot_files
from echo_rt.utils.wording import counted, one_line

if TYPE_CHECKING:
    from echo_rt.engine.guard import Guard
    from echo_rt.runtime import Runtime
    from echo_rt.stream import Stream

_SCRIPT, _SEED, _FROM, _HIDDEN = "script", "seed", "from", "hidden_frames"


def notes_of(request: Request, hidden: int) -> dict[str, Any]:
    """What the index says about the request, for :meth:`Resumption.begin` after a kill.

    ``hidden``: how many frames of ``--from`` are not in the recording.
    """
    initial = request.arguments.initial
    notes = {_SCRIPT: _facts(request.script), _SEED: request.seed}
    return notes if initial is None else notes | {_FROM: str(initial), _HIDDEN: hidden}


def _facts(script: Sequence[TimedPrompt]) -> list[dict[str, Any]]:
    return [
        {"seconds": prompt.seconds, **({"file": prompt.file} if prompt.text is None else {"text": prompt.text})}
        for prompt in script
    ]


def _begun(facts: object, blocks: int, runtime: Runtime, hidden: int) -> list[object]:
    """Those of the prompts that begin with the first block or another of the first ``blocks``."""
    return [
        entry
        for entry in (facts if isinstance(facts, list) else [])
        if not isinstance(entry, dict)
        or not isinstance(entry.get("seconds"), (int, float))
        or entry["seconds"] <= 0
        or first_block(entry["seconds"], runtime, hidden) < blocks
    ]


def _words(facts: list[object]) -> str:
    return one_line(json.dumps(facts, ensure_ascii=False))


@dataclass
class Resumption:
    """The recording and the newest whole snapshot of a folder; the latter until :meth:`begin` has used it."""

    folder: Path
    index: RecordingIndex
    snapshot: Snapshot | None

    @classmethod
    def find(cls, request: Request) -> Resumption | None:
        """What ``--resume`` goes on from, checked against the request; None where nothing has been made yet.

        ``TargetError`` for a folder that is not there, unless ``-o`` names it as well (a command that is started again
        and again says both), and for a recording without a snapshot; ``SnapshotError`` where none can be used;
        ``ConfigError`` for a request that contradicts what is recorded. All of it before the model is loaded.
        """
        folder = request.output
        if request.arguments.output is None and not folder.exists():
            raise TargetError(
                f"--resume: {folder}: expected the folder of a video, came nothing there; "
                "with -o naming it too, a new video begins there"
            )
        if not snapshot_files(folder / SNAPSHOT_FOLDER):
            check_free(
                folder,
                expected=f"{SNAPSHOT_FOLDER} to go on from (--snapshot-every makes them)",
                advice="that stays as it is, the same video begins anew in another folder (-o)",
            )
            if RecordingIndex.path(folder).exists():  # of a process that was killed before it had made anything
                cls._require_same(RecordingIndex.read(folder), request)
            return None
        index = RecordingIndex.read(folder)
        found = latest_snapshot(folder / SNAPSHOT_FOLDER)
        if found is None:
            raise TargetError(f"{folder / SNAPSHOT_FOLDER}: the snapshots have vanished")
        _, snapshot = found
        index.notes.setdefault(_SEED, snapshot.seed)  # which is another after a rollback
        cls._require_same(index, request)
        return cls(folder, index, snapshot)

    @staticmethod
    def _require_same(index: RecordingIndex, request: Request) -> None:
        """:class:`ConfigError` for a request of another video, or of another recording of it, than was begun."""
        seed = index.notes.get(_SEED, request.seed)
        if seed != request.seed:
            raise ConfigError(f"--seed: the video was begun with {seed}, got {request.seed}")
        # A video that is resumed needs no video to begin with again; one that is named all the same is the same one.
        initial = request.arguments.initial
        begun_with = index.notes.get(_FROM)
        if initial is not None and begun_with != str(initial):
            with_what = "none" if begun_with is None else repr(begun_with)
            raise ConfigError(f"--from: the video was begun with {with_what}, got {str(initial)!r}")
        if initial is not None and request.arguments.only_new != bool(index.notes.get(_HIDDEN)):
            raise ConfigError("--only-new: expected what the video was begun with, got the opposite")
        if request.keeps_latents != (index.latent_shape is not None):
            raise ConfigError(f"--latents: the recording has {'none' if request.keeps_latents else 'some'} so far")

    @property
    def hidden(self) -> int:
        """How many frames at the beginning of the video are not in the recording."""
        frames = self.index.notes.get(_HIDDEN, 0)
        return frames if isinstance(frames, int) else 0

    def begin(self, runtime: Runtime, script: Sequence[TimedPrompt], guard: Guard) -> Stream:
        """The stream that goes on, with none of the prompts that were to come: those are for ``script`` to say.

        ``StreamError`` for a snapshot of another model; ``ConfigError`` unless the recording has the runtime's size
        and rate; ``PromptError`` unless the prompts of all blocks begun so far are those of ``script``.
        """
        made = (*runtime.frame_size, Fraction(runtime.fps))
        recorded = (self.index.width, self.index.height, self.index.fps)
        if made != recorded:
            raise ConfigError(
                f"{self.folder}: the recording is {recorded[0]}x{recorded[1]} at {recorded[2]} fps, "
                f"the model makes {made[0]}x{made[1]} at {made[2]}"
            )
        snapshot, self.snapshot = self.snapshot, None  # gigabytes, which a day of video has no use for
        assert snapshot is not None, "begun twice"
        begun = snapshot.next_block + len(snapshot.held)
        before = _begun(self.index.notes.get(_SCRIPT), begun, runtime, self.hidden)
        asked = _begun(_facts(script), begun, runtime, self.hidden)
        if before != asked:
            raise PromptError(
                f"--prompt: expected the prompts of what is made, {counted(begun, 'block')}: "
                f"{_words(before)}; got {_words(asked)}"
            )
        return runtime.resume(dataclasses.replace(snapshot, prompts={}), guard=guard)
