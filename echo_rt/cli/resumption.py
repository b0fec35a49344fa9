"""``generate --resume``: reads the folder of an interrupted video and checks that the command continues it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from echo_rt.cli.generate_request import Request
from echo_rt.cli.prompts import TimedPrompt, first_block
from echo_rt.errors import ConfigError, PromptError, TargetError
from echo_rt.output.recorder import SNAPSHOT_FOLDER
from echo_rt.output.segment_index import RecordingIndex
from echo_rt.output.segments import check_free
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import latest_snapshot, snapshot_files
from echo_rt.utils.checked_json import convert
from echo_rt.utils.wording import counted, one_line

if TYPE_CHECKING:
    from echo_rt.engine.guard import Guard
    from echo_rt.runtime import Runtime
    from echo_rt.stream import Stream

_FROM, _HIDDEN = "from", "hidden_frames"


@dataclass(frozen=True)
class _Notes:
    """What the index notes about the request: its script, seed, and frames of ``--from`` that are not recorded."""

    script: list[TimedPrompt] = field(default_factory=list)
    seed: int | None = None
    hidden_frames: Annotated[int, Meta(ge=0, lt=2**53)] = 0


def notes_of(request: Request, hidden: int) -> dict[str, Any]:
    """What the index notes about the request, to resume it; ``hidden``: frames of ``--from`` that are not recorded."""
    initial = request.arguments.initial
    notes = {"script": _entries(request.script), "seed": request.arguments.seed}
    return notes if initial is None else notes | {_FROM: str(initial), _HIDDEN: hidden}


def _entries(script: Sequence[TimedPrompt]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(prompt).items() if value is not None} for prompt in script]


@dataclass
class Resumption:
    """The recording and the newest whole snapshot of a folder; :meth:`begin` uses the snapshot up."""

    folder: Path
    index: RecordingIndex
    notes: _Notes
    snapshot: Snapshot | None

    @classmethod
    def find(cls, request: Request) -> Resumption | None:
        """Find what ``--resume`` continues, and check it against the request; None where no video has begun.

        ``TargetError`` for an absent folder, unless ``-o`` names it as well (a command that is started again and again
        gives both), and for a recording without a snapshot; ``SnapshotError`` where none can be used; ``ConfigError``
        for a request that contradicts the recording. All of it before the model is loaded.
        """
        folder = request.output
        if request.arguments.output is None and not folder.exists():
            advice = "to begin a new video there, name it with -o too"
            raise TargetError(f"--resume: {folder}: expected the folder of a video, but it does not exist; {advice}")
        if not snapshot_files(folder / SNAPSHOT_FOLDER):
            check_free(
                folder,
                expected=f"{SNAPSHOT_FOLDER} to resume from (--snapshot-every makes them)",
                advice="that stays as it is; begin the same video again in another folder (-o)",
            )
            if RecordingIndex.path(folder).exists():  # of a process that was killed before its first segment
                cls._require_same(folder, RecordingIndex.read(folder), request)
            return None
        index = RecordingIndex.read(folder)
        found = latest_snapshot(folder / SNAPSHOT_FOLDER)
        if found is None:
            raise TargetError(f"{folder / SNAPSHOT_FOLDER}: the snapshots have vanished")
        _, snapshot = found
        index.notes.setdefault("seed", snapshot.seed)  # the notes' seed counts: a rollback changes the snapshot's
        return cls(folder, index, cls._require_same(folder, index, request), snapshot)

    @staticmethod
    def _require_same(folder: Path, index: RecordingIndex, request: Request) -> _Notes:
        """Return what is noted; raise :class:`ConfigError` for a request of another video or recording of it."""
        notes = convert(index.notes, _Notes, f"{index.path(folder)}: the notes are damaged", TargetError)
        if notes.seed not in (None, request.arguments.seed):
            raise ConfigError(f"--seed: the video was begun with {notes.seed}, got {request.arguments.seed}")
        # A resumed video needs no --from; if it is given, it must be the same.
        initial, begun_with = request.arguments.initial, index.notes.get(_FROM)
        if initial is not None and begun_with != str(initial):
            with_what = "none" if begun_with is None else repr(begun_with)
            raise ConfigError(f"--from: the video was begun with {with_what}, got {str(initial)!r}")
        if initial is not None and request.arguments.only_new != bool(notes.hidden_frames):
            raise ConfigError("--only-new: expected what the video was begun with, got the opposite")
        if request.keeps_latents != (index.latent_shape is not None):
            raise ConfigError(f"--latents: the recording has {'none' if request.keeps_latents else 'some'} so far")
        return notes

    def begin(self, runtime: Runtime, script: Sequence[TimedPrompt], guard: Guard) -> Stream:
        """Resume the stream, without the prompts of later blocks: ``script`` names those.

        ``StreamError`` for a snapshot of another model; ``ConfigError`` unless the recording has the runtime's size
        and rate; ``PromptError`` unless the prompts of all blocks begun so far are those of ``script``.
        """
        made = (*runtime.frame_size, Fraction(runtime.fps))
        recorded = (self.index.width, self.index.height, self.index.frame_rate)
        if made != recorded:
            recording, model = ("{}x{} at {} fps".format(*size) for size in (recorded, made))
            raise ConfigError(f"{self.folder}: the recording is {recording}, the model makes {model}")
        snapshot, self.snapshot = self.snapshot, None  # frees gigabytes when the stream has begun
        assert snapshot is not None, "begun twice"
        begun = snapshot.next_block + len(snapshot.held)

        def entries(script: Sequence[TimedPrompt]) -> list[dict[str, Any]]:
            """The prompts that begin in the blocks made so far."""
            hidden = self.notes.hidden_frames
            return _entries([p for p in script if p.seconds <= 0 or first_block(p.seconds, runtime, hidden) < begun])

        before, asked = entries(self.notes.script), entries(script)
        if before != asked:
            recorded_words, asked_words = (one_line(json.dumps(one, ensure_ascii=False)) for one in (before, asked))
            expected = f"expected the prompts of the {counted(begun, 'block')} made so far: {recorded_words}"
            raise PromptError(f"--prompt: {expected}; got {asked_words}")
        return runtime.resume(dataclasses.replace(snapshot, prompts={}), guard=guard)
