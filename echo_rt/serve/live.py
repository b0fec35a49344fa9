"""A live video of a runtime in this process: one thread shows its frames, others carry out commands."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from echo_rt.chunk import Chunk
from echo_rt.errors import ConfigError, EchoError, PromptError, StreamError
from echo_rt.options import MemoryMode, check_seed
from echo_rt.runtime import Runtime
from echo_rt.serve.encoder import Recording
from echo_rt.serve.screen import Screen
from echo_rt.serve.session import PLACES, Audience, Block, BusyError, Item, checked_prompt
from echo_rt.serve.shelf import Entry, History, Notes
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.stream import Feed, Stream
from echo_rt.utils.atomic_file import close_all
from echo_rt.utils.threads import share_cpu
from echo_rt.utils.wording import with_type

_MOST_WAITING = 8  # commands
_TRIES = 100
_MOST_FRAMES = 64  # in a block, and more than that
_LATE_BLOCKS = 12  # that a viewer may be late, or the last of its pictures are lost with the process

logger = logging.getLogger("echo_rt.serve")


class LiveSession:
    """Implements :class:`~echo_rt.serve.session.Session` in this process.

    Args:
        load: loads the model with a memory mode (None for the model's own), like a snapshot if one is given.
        prompt, seed, memory: what to begin with.
        folder: for snapshots and recordings; held until :meth:`close`.
        resume: go on from the newest snapshot in the folder, if there is one; ``resumed`` is its name.
        megabits: most megabits a second to one viewer.
        every: makes the session one that survives its process: there is a snapshot every so many blocks, a change is
            logged before it is acknowledged, and the next session in ``folder``, which may be an address, goes on
            with the picture after the last that its viewers have. It holds still while nobody watches. One process
            at a time may have such a folder; the caller sees to that.

    ``saved``: the snapshot that :meth:`close` wrote; ``problem``: what it could not do. Raises what loading and
    beginning raise.
    """

    def __init__(
        self,
        load: Callable[[str | None, Snapshot | None], Runtime],
        folder: Path | str,
        prompt: str,
        *,
        seed: int = 0,
        memory: str | None = None,
        resume: bool = False,
        megabits: float = 4.0,
        every: int | None = None,
    ) -> None:
        self._load, self._every = load, every
        self._commands = threading.Lock()  # one at a time
        self._waiting = self._shown = 0
        self._closed = False
        self._recent: deque[Chunk] = deque(maxlen=_LATE_BLOCKS if every else 1)  # the newest
        self._chunk: Chunk | None = None
        self._saver: threading.Thread | None = None
        self._feed: Feed | None = None
        self._thread: threading.Thread | None = None  # shows the video
        self._failure: str | None = None
        self._figures: dict[str, Any] = {}
        self.saved: str | None = None
        self.problem: Exception | None = None
        prompt = checked_prompt(prompt)
        self._history = history = History(folder, Notes([_entry(prompt, 0, None)], seed, memory), survives=bool(every))
        runtime = None
        try:
            self.resumed, snapshot = history.newest() if resume else (None, None)
            notes = history.notes
            self._runtime = runtime = load(notes.memory, snapshot)
            if every is None or notes.epoch is None:
                notes.epoch = time.time()
            self._epoch, leased = notes.epoch, every is not None
            self._screen = Screen(
                runtime.frame_size, runtime.fps, megabits, leased=leased, shown=notes.shown, epoch=self._epoch
            )
            self._pace = 1 / runtime.fps
            self._stream = runtime.stream(prompt, seed=seed) if snapshot is None else runtime.resume(snapshot)
            self._first_block = self._stream.next_block
            self._first_picture = notes.base + self._stream.video_frames
            history.repeat(self._stream)
            self._screen.paused = history.notes.paused
            if every is not None and snapshot is None:
                self._secure()
        except BaseException:
            close_all([history.close, *([] if runtime is None else [runtime.close])])
            raise

    # ---------------------------------------------------------------- the interface

    async def start(self) -> None:
        """Begin to show."""
        if self._history.was_recording():
            await asyncio.to_thread(self._record_again)
        self._begin_to_show()

    async def describe(self) -> dict[str, Any]:
        return {
            "size": list(self._runtime.frame_size),
            "fps": self._runtime.fps,
            "codec": self._screen.encoder.codec,
            "header": self._screen.encoder.header,
            "epoch": self._epoch,
            "model": self._runtime.taken.recipe or Path(self._runtime.taken.model).name,
            "device": str(self._runtime.device),
            "memories": [mode.value for mode in MemoryMode],
            "words": list(self._runtime.words),
        }

    async def next(self, after: int | None, audience: Audience | None = None) -> list[tuple[int, Item]]:
        return await self._screen.next(after, audience)

    async def block(self, after: int) -> Block | None:
        chunk = await self._screen.watch(
            after, lambda: self._chunk if self._chunk and self._end(self._chunk) * PLACES > after else None
        )
        if chunk is None:
            return None
        data, seconds = chunk.frames.numpy().tobytes(), chunk.stats.generate_seconds
        return Block(chunk.index, len(chunk.frames), data, seconds, self._end(chunk) * PLACES)

    def _end(self, chunk: Chunk) -> int:
        """Number of the last picture of a block."""
        return self._history.notes.base + chunk.first_frame + len(chunk.frames)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "keyframe":
            self._screen.key_wanted = True
            return {}
        if command == "figures":
            return self._all_figures(**arguments)
        if self._waiting >= _MOST_WAITING:
            raise BusyError(f"{_MOST_WAITING} requests wait already; ask again later")
        self._waiting += 1
        try:
            return await asyncio.to_thread(self._carry_out, command, arguments)
        finally:
            self._waiting -= 1

    def _all_figures(self, audience: Audience | None = None) -> dict[str, Any]:
        state = "paused" if self._screen.paused else "playing"
        state = "failed" if self._failure else state if self._chunk else "starting"
        return {
            "state": "unwatched" if state in ("playing", "starting") and self._screen.unwatched else state,
            "failure": self._failure,
            "seed": str(self._history.notes.seed),  # larger than a browser's numbers are exact
            "memory": self._runtime.memory.value,
            "recording": self.recording,
            **self._screen.figures(audience),
            **self._figures,
        }

    async def close(self) -> None:
        """End the video; errors of the recording do not keep the snapshot from being written, nor the reverse."""
        await asyncio.to_thread(self._close)

    @property
    def recording(self) -> str | None:
        """Name of the recording that runs."""
        recording = self._screen.recording
        return None if recording is None else recording.path.name

    # ---------------------------------------------------------------- commands

    def _carry_out(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        with self._commands:
            if self._closed:
                raise StreamError("the session is closed")
            shelf = self._history.shelf
            if command == "prompts":
                return {command: self._history.notes.prompts}
            if command in ("snapshots", "recordings"):
                return {command: getattr(shelf, command)()}
            if command == "recording":
                return {"path": shelf.recording(arguments["file"])}
            answer: dict[str, Any] = getattr(self, f"_do_{command}")(**arguments)
            return answer

    def _do_prompt(self, text: str, over: int | None = None) -> dict[str, Any]:
        text = checked_prompt(text)
        embeds = self._runtime.encode_prompt(text)
        with self._screen.held_back():
            for _ in range(_TRIES):
                block = self._stream.next_prompt_block
                entry = _entry(text, block, over)
                self._history.log(entry)
                try:
                    self._stream.set_prompt(prompt_embeds=embeds, block=block, over=over or 1)
                    break
                except StreamError:  # the block was begun meanwhile, or the video is over
                    if self._stream.failure is not None or self._stream.closed:
                        raise
            else:
                raise BusyError(f"no block was open in {_TRIES} tries; ask again later")
            self._history.note(entry)
        chunk = self._chunk
        ahead = 0 if chunk is None else (block - chunk.index) * len(chunk.frames) - self._shown
        return self._screen.tell({"type": "prompt", **entry, "shows_in": round(max(0, ahead) * self._pace, 3)})

    def _do_pause(self, paused: bool) -> dict[str, Any]:
        self._history.change(paused=paused)
        self._screen.set("paused", paused)
        return self._screen.tell({"type": "paused" if paused else "playing"})

    def _do_restart(self, seed: int, prompt: str | None = None, memory: str | None = None) -> dict[str, Any]:
        check_seed(seed)
        if memory is not None:
            MemoryMode.parse(memory)
        notes = self._history.notes
        if prompt is None and not notes.prompts:  # the notes of a snapshot may be missing
            raise PromptError("expected a prompt, since none is known of this video")
        text = checked_prompt(notes.prompts[-1]["text"] if prompt is None else prompt)
        self._runtime.encode_prompt(text)  # a bad prompt must not end the video before

        def begin() -> Stream:
            if memory not in (None, self._runtime.memory.value):
                self._runtime.close()
                self._runtime = self._load(memory, None)
            return self._runtime.stream(text, seed=seed)

        self._replace(begin, Notes([_entry(text, 0, None)], seed, memory or notes.memory))
        return self._screen.tell(
            {"type": "restarted", "seed": str(seed), "prompt": text, "memory": self._runtime.memory.value}
        )

    def _do_snapshot(self) -> dict[str, Any]:
        name = self._history.shelf.keep(self._stream.snapshot(), self._history.notes)
        return self._screen.tell({"type": "snapshot", "name": name})

    def _do_resume(self, snapshot: str) -> dict[str, Any]:
        state, notes = self._history.shelf.open(snapshot)
        if notes.memory not in (None, self._runtime.memory.value):
            raise ConfigError(f"the snapshot is of memory mode {notes.memory}: restart with that first")
        self._replace(lambda: self._runtime.resume(state), notes)
        return self._screen.tell({"type": "resumed", "snapshot": snapshot, "block": state.next_block})

    def _replace(self, begin: Callable[[], Stream], notes: Notes) -> None:
        """End the video and show another; raises what beginning it raises."""
        self._end_showing()
        try:
            self._stream.close()
            self._stream = begin()
        except Exception as error:
            self._fail(error)
            raise
        self._failure, self._chunk, self._figures = None, None, {}
        self._recent.clear()
        self._first_block = self._stream.next_block
        shown = self._screen.place // PLACES
        self._history.begin(notes, base=shown - self._stream.video_frames, shown=shown)
        try:
            if self._every is not None:
                self._secure()  # what is shown must not depend on what is not yet stored
        finally:
            self._begin_to_show()

    def _do_record(self) -> dict[str, Any]:
        if self._screen.recording is not None:
            raise ConfigError("a recording is running; stop it first")
        shelf = self._history.shelf
        path = shelf.new_recording()
        self._history.change(recording=path.name)
        self._screen.recording = Recording(path, self._screen.encoder, self._runtime.fps, shelf.hand_in)
        self._screen.key_wanted = True
        return self._screen.tell({"type": "recording", "name": path.name})

    def _record_again(self) -> None:
        """Record on, into another file, what a process recorded that was killed."""
        try:
            self._do_record()
        except EchoError as error:
            name = self._history.notes.recording
            self._screen.tell({"type": "recorded", "name": name, "error": f"it was cut short: {error}"})

    def _do_stop_recording(self) -> dict[str, Any]:
        with self._screen.changed:
            recording, self._screen.recording = self._screen.recording, None
        if recording is None:
            raise ConfigError("no recording is running")
        recording.close()
        self._history.change(recording=None)
        return self._screen.tell({"type": "recorded", "name": recording.path.name, "frames": recording.frames})

    def _close(self) -> None:
        self._closed = True
        with self._commands:
            self._end_showing()
            recording = self._screen.recording
            steps: list[Callable[[], object]] = [] if recording is None else [recording.close]
            errors = close_all([*steps, self._save, self._runtime.close, self._history.close])
        self.problem = errors[0] if errors else None

    def _save(self) -> None:
        if self._failure is None:
            self.saved = self._secure() if self._every is not None else self._do_snapshot()["name"]

    # ---------------------------------------------------------------- what the next process goes on from

    def _secure(self) -> str:
        """Store the video as it is now; returns the snapshot's name."""
        return self._history.store(*self._state())

    def _state(self) -> tuple[Snapshot, Notes, float]:
        """The video, when no command changes it: with the blocks whose pictures some viewers may not have yet."""
        now, snapshot = time.time(), self._stream.snapshot()
        last = snapshot.next_block - 1
        with self._screen.changed:
            if last >= self._first_block:  # it has been taken, and will soon be here
                self._screen.changed.wait_for(lambda: self._recent and self._recent[-1].index >= last)
            shown = [chunk for chunk in self._recent if chunk.index <= last]
            notes = dataclasses.replace(self._history.notes, shown=self._screen.place // PLACES)
        return dataclasses.replace(snapshot, held=(*shown, *snapshot.held)), notes, now

    def _secure_on_the_way(self) -> None:
        try:
            with self._commands:
                if self._closed or self._failure:
                    return
                state = self._state()
            self._history.store(*state)  # commands need not wait for the store
        except Exception as error:  # of any kind: the snapshot before is still there
            logger.warning("no snapshot was stored: %s", with_type(error))

    # ---------------------------------------------------------------- the showing thread

    def _begin_to_show(self) -> None:
        self._screen.set("leave", False)
        self._feed = feed = Feed(self._stream)
        self._thread = threading.Thread(target=self._run, args=(feed,), name="echo-rt live", daemon=True)
        self._thread.start()

    def _end_showing(self) -> None:
        """End the thread, after the block that is being made."""
        self._screen.set("leave", True)
        if self._feed is not None and self._thread is not None:
            self._feed.close()
            self._thread.join()

    def _run(self, feed: Feed) -> None:
        with share_cpu(self._runtime.device), feed:
            try:
                self._show(feed)
            except Exception as error:  # of any kind: viewers are told, and a restart may help
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = str(error) if isinstance(error, EchoError) else with_type(error)
        self._screen.tell({"type": "failed", "error": self._failure})

    def _show(self, feed: Feed) -> None:
        """Show each frame in its time, until the feed is closed."""
        screen = self._screen
        most = self._history.notes.shown + _MOST_FRAMES * ((self._every or 0) + 8)
        if not screen.meet(self._first_picture, most):
            return
        due = arrived = asked = time.monotonic()
        for chunk in feed:
            frames, now = chunk.frames.numpy(), time.monotonic()
            # A model slower than its frame rate is shown evenly, in slow motion, instead of in bursts.
            made = (now - max(arrived, screen.went_on)) / len(frames) if now - asked > 0.005 else 0.0
            self._pace = max(1 / self._runtime.fps, 0.6 * self._pace + 0.4 * made)
            arrived = now
            with screen.changed:
                self._recent.append(chunk)
                screen.changed.notify_all()
            screen.wait_for(lambda: not screen.held)
            if self._end(chunk) > screen.seen:
                self._begin_block(chunk)
            for self._shown, frame in enumerate(frames):
                if screen.show(frame, self._history.notes.base + chunk.first_frame + self._shown + 1, due):
                    due = max(due + self._pace, time.monotonic())
                elif screen.leave:
                    return
            asked = time.monotonic()

    def _begin_block(self, chunk: Chunk) -> None:
        vitals, device = chunk.stats.vitals, self._runtime.device
        self._chunk, self._shown = chunk, 0
        self._figures = {
            "block": chunk.index,
            "frame": chunk.first_frame,
            "fps": round(1 / self._pace, 2),
            "block_seconds": round(chunk.stats.generate_seconds, 4),
            "decode_seconds": round(chunk.stats.decode_seconds, 4),
            "memory_norm": vitals.memory_norm,
            "gate_mean": vitals.gate_mean,
            "shift": chunk.stats.shift,
            "newest_id": chunk.stats.newest_temporal_id,
        }
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            self._figures |= {"gpu_bytes": total - free, "gpu_total_bytes": total}
        begun = [entry["text"] for entry in self._history.notes.prompts if entry["block"] == chunk.index]
        self._screen.tell({"type": "block", **self._figures, "prompt": begun[-1] if begun else None})
        due = self._every is not None and chunk.index % self._every == self._every - 1
        if due and (self._saver is None or not self._saver.is_alive()):  # a slow store gets fewer of them
            self._saver = threading.Thread(target=self._secure_on_the_way, name="echo-rt snapshot", daemon=True)
            self._saver.start()


def _entry(text: str, block: int, over: int | None) -> Entry:
    return {"text": text, "block": block, "over": over, "asked": time.time()}


def load_model(model: str | Path, options: Mapping[str, Any], memory: str | None, like: Snapshot | None) -> Runtime:
    """Load a model with the options of :meth:`Runtime.from_pretrained`, in a memory mode unless that is None."""
    return Runtime.from_pretrained(model, **{**options, "memory": memory or options["memory"]}, like=like)
