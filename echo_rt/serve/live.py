"""A live video of a runtime in this process: one thread shows its frames, others carry out commands."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo_rt.chunk import Chunk
from echo_rt.errors import ConfigError, EchoError, OutputError, PromptError, SnapshotError, StreamError
from echo_rt.options import MemoryMode, check_seed
from echo_rt.runtime import Runtime
from echo_rt.serve.encoder import LiveEncoder, Recording
from echo_rt.serve.session import KEPT, PLACES, Block, BusyError, Item, check_memory, checked_prompt
from echo_rt.serve.shelf import Entry, Notes, Shelf
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.stream import Feed, Stream
from echo_rt.utils.atomic_file import close_all
from echo_rt.utils.threads import share_cpu
from echo_rt.utils.wording import with_type

_MOST_WAITING = 8  # commands
_MOST_PROMPTS = 200  # remembered
_RECORDED_SECONDS = 3600
_NEWS_SECONDS = 1.0
_KEY_SECONDS = 0.25  # between two key frames that viewers asked for
_STILL_SECONDS = 0.5  # between two pictures of a video that pauses
_TRIES = 100
_LEASE_SECONDS = 2.0  # a session that is not always watched holds still when nobody asked for so long
_MOST_FRAMES = 64  # in a block, and more than that
_MEET_SECONDS = 0.25  # in which all who watched before say how far they are
_CURRENT = "current"  # folder of the automatic snapshots, apart from those that viewers asked for

logger = logging.getLogger("echo_rt.serve")


class LiveSession:
    """Implements :class:`~echo_rt.serve.session.Session` in this process.

    Args:
        load: loads the model with a memory mode (None for the model's own), like a snapshot if one is given.
        prompt, seed, memory: what to begin with.
        folder: for snapshots and recordings; held until :meth:`close`.
        resume: go on from the newest snapshot in the folder, if there is one; ``resumed`` is its name.
        megabits: most megabits a second to one viewer.
        every: makes the session one that survives its process: there is a snapshot every so many blocks, a prompt is
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
        self._changed = threading.Condition()  # guards what the threads share
        self._commands = threading.Lock()  # one at a time
        self._items: deque[tuple[int, Item]] = deque(maxlen=KEPT)
        self._place = self._waiting = self._shown = 0
        self._leave = self._paused = self._closed = self._unsure = False
        self._asked_at = 0.0  # when viewers asked last
        self._heard: list[int] | None = None if every is None else []  # places of the last pictures that they have
        self._seen = self._seen_by_some = 0  # numbers of pictures that all, or some, have from a process before
        self._recent: deque[Chunk] = deque(maxlen=2)  # the block being shown and the one before
        self._secured = 0  # number of logged prompts that the snapshot before the newest has
        self._saver: threading.Thread | None = None
        self._key_wanted, self._key_at = True, 0.0
        self._next: tuple[Callable[[], Stream], Future[None]] | None = None
        self._feed: Feed | None = None
        self._chunk: Chunk | None = None
        self._recording: Recording | None = None
        self._failure: str | None = None
        self._figures: dict[str, Any] = {}
        self.resumed: str | None = None
        self.saved: str | None = None
        self.problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="echo-rt live", daemon=True)
        self._shelf = Shelf(folder, claim=every is None)
        # Two: the newest may have been cut short, by a store that shows a file before it is whole.
        self._current = self._shelf if every is None else Shelf(f"{folder}/{_CURRENT}", most=2, claim=False)
        runtime = None
        try:
            prompt = checked_prompt(prompt)
            self._notes = Notes([_entry(prompt, 0, None)], seed, memory)
            if every is not None:
                self._current.take_over()
            snapshot = self._newest() if resume else None
            self._runtime = runtime = load(self._notes.memory, snapshot)
            self._encoder = LiveEncoder(runtime.frame_size, runtime.fps, megabits)
            self._pace = 1 / runtime.fps
            self._stream = runtime.stream(prompt, seed=seed) if snapshot is None else runtime.resume(snapshot)
            self._first_block = self._stream.next_block
            self._first_picture = self._notes.base + self._stream.video_frames
            self._seen = self._seen_by_some = self._notes.shown
            self._place = self._seen * PLACES
            if every is None or self._notes.epoch is None:
                self._notes.epoch = time.time()
            if every is not None:
                for entry in self._current.logged(self._notes.logged):
                    if entry["block"] >= self._stream.next_prompt_block:  # or it was not taken in the end
                        self._stream.set_prompt(entry["text"], block=entry["block"], over=entry["over"] or 1)
                        self._note(entry)
                if snapshot is None:
                    self._secure()
        except BaseException:
            close_all([self._shelf.close, self._current.close, *([] if runtime is None else [runtime.close])])
            raise

    def _newest(self) -> Snapshot | None:
        """The newest snapshot that is whole, whose notes become this session's."""
        for number, found in enumerate(listed := self._current.snapshots(), 1):
            try:
                snapshot, self._notes = self._current.open(str(found["name"]))
            except SnapshotError as error:
                if self._every is None or number == len(listed):
                    raise
                logger.warning("going on from the snapshot before: %s", error)
            else:
                self.resumed = str(found["name"])
                return snapshot
        return None

    # ---------------------------------------------------------------- the interface

    async def start(self) -> None:
        """Begin to show."""
        self._loop = asyncio.get_running_loop()
        self._news = self._loop.create_future()
        assert self._notes.epoch is not None
        self._epoch = self._notes.epoch
        self._started = time.monotonic() - (time.time() - self._epoch)
        self._thread.start()

    async def describe(self) -> dict[str, Any]:
        """Return what does not change."""
        return {
            "size": list(self._runtime.frame_size),
            "fps": self._runtime.fps,
            "codec": self._encoder.codec,
            "header": self._encoder.header,
            "epoch": self._epoch,
            "model": self._runtime.taken.recipe,
            "device": str(self._runtime.device),
            "memories": [mode.value for mode in MemoryMode],
        }

    async def next(self, after: int | None) -> list[tuple[int, Item]]:
        """Return the items above ``after``."""
        self._watched(after)
        begin = self._place

        def found() -> list[tuple[int, Item]]:
            # A place that nobody can have seen yet is that of another video.
            most = (max(self._place // PLACES, self._seen_by_some) + 1) * PLACES
            above = begin if after is None or after >= most else after
            return [item for item in self._items if item[0] > above]

        return await self._await_news(found) or []

    async def block(self, after: int) -> Block | None:
        """Return the block being shown, if its place is above ``after``."""
        self._watched(after)
        chunk = await self._await_news(lambda: self._chunk if self._chunk and self._end(self._chunk) > after else None)
        if chunk is None:
            return None
        data, seconds = chunk.frames.numpy().tobytes(), chunk.stats.generate_seconds
        return Block(chunk.index, len(chunk.frames), data, seconds, self._end(chunk))

    def _end(self, chunk: Chunk) -> int:
        """Place of the last picture of a block."""
        return (self._notes.base + chunk.first_frame + len(chunk.frames)) * PLACES

    def _watched(self, after: int | None) -> None:
        with self._changed:
            self._asked_at = time.monotonic()
            if after and self._heard is not None:
                self._heard.append(after)
            self._changed.notify_all()

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Carry out a command; all but the quickest on another thread."""
        if command == "keyframe":
            self._key_wanted = True
            return {}
        if command == "figures":
            state = "failed" if self._failure else "paused" if self._paused else "playing"
            state = state if self._chunk or state == "failed" else "starting"
            return {
                "state": "unwatched" if state in ("playing", "starting") and self._unwatched() else state,
                "failure": self._failure,
                "seed": str(self._notes.seed),  # larger than a browser's numbers are exact
                "memory": self._runtime.memory.value,
                "recording": self.recording,
                **self._figures,
            }
        if self._waiting >= _MOST_WAITING:
            raise BusyError(f"{_MOST_WAITING} requests wait already; ask again later")
        self._waiting += 1
        try:
            return await asyncio.to_thread(self._carry_out, command, arguments)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """End the video; errors of the recording do not keep the snapshot from being written, nor the reverse."""
        await asyncio.to_thread(self._close)

    @property
    def recording(self) -> str | None:
        """Name of the recording that runs."""
        recording = self._recording
        return None if recording is None else recording.path.name

    async def _await_news(self, get: Callable[[], Any]) -> Any:
        news = self._news  # before looking: whatever comes later ends this wait
        with self._changed:
            found = get()
        if not found:
            await asyncio.wait([news], timeout=_NEWS_SECONDS)
            with self._changed:
                found = get()
        return found

    # ---------------------------------------------------------------- commands

    def _carry_out(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        with self._commands:
            if self._closed:
                raise StreamError("the session is closed")
            answer: dict[str, Any] = getattr(self, f"_do_{command}")(**arguments)
            return answer

    def _do_prompt(self, text: str, over: int | None = None) -> dict[str, Any]:
        text = checked_prompt(text)
        embeds = self._runtime.encode_prompt(text)
        with self._held_back():
            for _ in range(_TRIES):
                block = self._stream.next_prompt_block
                entry = _entry(text, block, over)
                if self._every is not None:
                    self._current.log(self._notes.logged + 1, entry)
                try:
                    self._stream.set_prompt(prompt_embeds=embeds, block=block, over=over or 1)
                    break
                except StreamError:  # the block was begun meanwhile, or the video is over
                    if self._stream.failure is not None or self._stream.closed:
                        raise
            else:
                raise BusyError(f"no block was open in {_TRIES} tries; ask again later")
            self._note(entry)
        chunk = self._chunk
        ahead = 0 if chunk is None else (block - chunk.index) * len(chunk.frames) - self._shown
        return self._publish({"type": "prompt", **entry, "shows_in": round(max(0, ahead) * self._pace, 3)})

    def _note(self, entry: Entry) -> None:
        self._notes.prompts = [*self._notes.prompts, entry][-_MOST_PROMPTS:]
        self._notes.logged += 1

    @contextmanager
    def _held_back(self) -> Iterator[None]:
        """Begin to show no block meanwhile: what is shown must not depend on what is not yet stored."""
        with self._changed:
            self._unsure = True
        try:
            yield
        finally:
            with self._changed:
                self._unsure = False
                self._changed.notify_all()

    def _do_prompts(self) -> dict[str, Any]:
        return {"prompts": self._notes.prompts}

    def _do_pause(self, paused: bool) -> dict[str, Any]:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()
        return self._publish({"type": "paused" if paused else "playing"})

    def _do_restart(self, seed: int, prompt: str | None = None, memory: str | None = None) -> dict[str, Any]:
        check_seed(seed)
        check_memory(memory)
        if prompt is None and not self._notes.prompts:  # the notes of a snapshot may be missing
            raise PromptError("expected a prompt, since none is known of this video")
        text = checked_prompt(self._notes.prompts[-1]["text"] if prompt is None else prompt)
        self._runtime.encode_prompt(text)  # a bad prompt must not end the video before

        def begin() -> Stream:
            if memory not in (None, self._runtime.memory.value):
                self._runtime.close()
                self._runtime = self._load(memory, None)
            return self._runtime.stream(text, seed=seed)

        self._replace(begin, Notes([_entry(text, 0, None)], seed, memory or self._notes.memory))
        return self._publish(
            {"type": "restarted", "seed": str(seed), "prompt": text, "memory": self._runtime.memory.value}
        )

    def _do_snapshot(self) -> dict[str, Any]:
        return self._publish({"type": "snapshot", "name": self._shelf.keep(self._stream.snapshot(), self._notes)})

    def _do_snapshots(self) -> dict[str, Any]:
        return {"snapshots": self._shelf.snapshots()}

    def _do_resume(self, snapshot: str) -> dict[str, Any]:
        state, notes = self._shelf.open(snapshot)
        if notes.memory not in (None, self._runtime.memory.value):
            raise ConfigError(f"the snapshot is of memory mode {notes.memory}: restart with that first")
        self._replace(lambda: self._runtime.resume(state), notes)
        return self._publish({"type": "resumed", "snapshot": snapshot, "block": state.next_block})

    def _replace(self, begin: Callable[[], Stream], notes: Notes) -> None:
        """End the video and let the showing thread begin another; raises what that raises."""
        begun: Future[None] = Future()
        with self._held_back():
            with self._changed:
                self._next, self._leave, feed = (begin, begun), True, self._feed
                self._changed.notify_all()
            if feed is not None:
                feed.close()
            begun.result()
            before, shown = self._notes, self._place // PLACES
            base = shown - self._stream.video_frames
            self._notes = dataclasses.replace(notes, logged=before.logged, epoch=before.epoch, base=base, shown=shown)
            if self._every is not None:
                self._secure()

    def _do_record(self) -> dict[str, Any]:
        if self._recording is not None:
            raise ConfigError("a recording is running; stop it first")
        self._recording = Recording(self._shelf.new_recording(), self._encoder, self._runtime.fps, self._shelf.hand_in)
        self._key_wanted = True
        return self._publish({"type": "recording", "name": self._recording.path.name})

    def _do_stop_recording(self) -> dict[str, Any]:
        with self._changed:
            recording, self._recording = self._recording, None
        if recording is None:
            raise ConfigError("no recording is running")
        recording.close()
        return self._publish({"type": "recorded", "name": recording.path.name, "frames": recording.frames})

    def _do_recordings(self) -> dict[str, Any]:
        return {"recordings": self._shelf.recordings()}

    def _do_recording(self, file: str) -> dict[str, Any]:
        return {"path": str(self._shelf.recording(file))}

    def _close(self) -> None:
        with self._changed:
            self._closed = self._leave = True
            self._changed.notify_all()
        if self._feed is not None:
            self._feed.close()
        if self._thread.ident is not None:
            self._thread.join()
        with self._commands:
            steps: list[Callable[[], object]] = [] if self._recording is None else [self._recording.close]
            errors = close_all([*steps, self._save, self._runtime.close, self._current.close, self._shelf.close])
        self.problem = errors[0] if errors else None

    def _save(self) -> None:
        if self._failure is None:
            self.saved = self._secure() if self._every is not None else self._do_snapshot()["name"]

    # ---------------------------------------------------------------- what the next process goes on from

    def _secure(self) -> str:
        """Store the video as it is now; returns the snapshot's name."""
        return self._store(*self._state())

    def _state(self) -> tuple[Snapshot, Notes, float]:
        """The video, when no command changes it: with the blocks whose pictures some viewers may not have yet."""
        now, snapshot = time.time(), self._stream.snapshot()
        last = snapshot.next_block - 1
        with self._changed:
            if last >= self._first_block:  # it has been taken, and will soon be here
                self._changed.wait_for(lambda: self._recent and self._recent[-1].index >= last)
            shown = [chunk for chunk in self._recent if chunk.index <= last]
            notes = dataclasses.replace(self._notes, shown=self._place // PLACES)
        return dataclasses.replace(snapshot, held=(*shown, *snapshot.held)), notes, now

    def _store(self, snapshot: Snapshot, notes: Notes, taken_at: float) -> str:
        name = self._current.keep(snapshot, notes, taken_at)
        self._current.forget(self._secured)
        self._secured = notes.logged
        return name

    def _secure_on_the_way(self) -> None:
        try:
            with self._commands:
                if self._closed or self._failure:
                    return
                state = self._state()
            self._store(*state)  # commands need not wait for the store
        except Exception as error:  # of any kind: the snapshot before is still there
            logger.warning("no snapshot was stored: %s", with_type(error))

    # ---------------------------------------------------------------- the showing thread

    def _run(self) -> None:
        with share_cpu(self._runtime.device):
            begun = True
            while not self._closed:
                if begun:
                    try:
                        with Feed(self._stream) as self._feed:
                            self._show(self._feed)
                    except Exception as error:  # of any kind: viewers are told, and a restart may help
                        self._fail(error)
                begun = self._begin_next()

    def _begin_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._next or self._closed)
            found, self._next, self._leave = self._next, None, self._closed
        if found is None:
            return False
        begin, done = found
        try:
            self._stream.close()
            self._stream = begin()
        except Exception as error:
            self._fail(error)
            done.set_exception(error)
            return False
        self._failure, self._chunk, self._figures = None, None, {}
        self._recent.clear()
        self._first_block = self._stream.next_block
        done.set_result(None)
        return True

    def _fail(self, error: Exception) -> None:
        self._failure = str(error) if isinstance(error, EchoError) else with_type(error)
        self._publish({"type": "failed", "error": self._failure})

    def _show(self, feed: Feed) -> None:
        """Show each frame in its time, until the feed is closed."""
        if self._heard is not None:
            self._meet(self._heard)
            if self._leave:
                return
        due = arrived = asked = time.monotonic()
        for chunk in feed:
            frames, now = chunk.frames.numpy(), time.monotonic()
            # A model slower than its frame rate is shown evenly, in slow motion, instead of in bursts.
            made = (now - arrived) / len(frames) if now - asked > 0.005 else 0.0
            self._pace = max(1 / self._runtime.fps, 0.6 * self._pace + 0.4 * made)
            arrived = now
            with self._changed:
                self._recent.append(chunk)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._leave or not self._unsure)
            if self._end(chunk) > self._seen * PLACES:
                self._begin_block(chunk)
            for self._shown, frame in enumerate(frames):
                number = self._notes.base + chunk.first_frame + self._shown + 1
                if number <= self._seen:
                    if number == self._seen:  # whose MP4 fragment the process before has not sent
                        self._encoder.encode(frame, now - self._started, key=True)
                    continue
                with self._changed:
                    self._changed.wait_for(lambda: self._leave, max(0.0, due - time.monotonic()))
                    while (self._paused or self._unwatched()) and not self._leave:
                        if self._paused and not self._unwatched():
                            self._show_frame(frame)  # so that who comes now sees it
                        self._changed.wait_for(
                            lambda: self._leave or not (self._paused or self._unwatched()), _STILL_SECONDS
                        )
                        arrived = time.monotonic()
                    if self._leave:
                        return
                self._show_frame(frame, number)
                due = max(due + self._pace, time.monotonic())
            asked = time.monotonic()

    def _unwatched(self) -> bool:
        idle = time.monotonic() - self._asked_at
        return self._every is not None and self._recording is None and idle > _LEASE_SECONDS

    def _meet(self, heard: list[int]) -> None:
        """Wait for viewers, and learn which pictures they have from a process before: no more of them is shown."""
        assert self._every is not None
        with self._changed:
            self._changed.wait_for(lambda: self._asked_at or self._leave)
            self._changed.wait_for(lambda: self._leave, _MEET_SECONDS)
            # Others are of viewers who were away for long, or of another video.
            can = range(self._first_picture, self._notes.shown + _MOST_FRAMES * (self._every + 8))
            if known := [place for place in heard if place // PLACES in can]:
                self._place = max(min(known), max(known) - KEPT * PLACES)
                self._seen, self._seen_by_some = self._place // PLACES, max(known) // PLACES
            self._heard = None

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
        begun = [entry["text"] for entry in self._notes.prompts if entry["block"] == chunk.index]
        self._publish({"type": "block", **self._figures, "prompt": begun[-1] if begun else None})
        due = self._every is not None and chunk.index % self._every == self._every - 1
        if due and (self._saver is None or not self._saver.is_alive()):  # a slow store gets fewer of them
            self._saver = threading.Thread(target=self._secure_on_the_way, name="echo-rt snapshot", daemon=True)
            self._saver.start()

    def _show_frame(self, frame: NDArray[np.uint8], number: int | None = None) -> None:
        """Show picture ``number``; without one, the frame is shown once more before its turn, and not recorded."""
        now = time.monotonic()
        key = self._key_wanted and now - self._key_at >= _KEY_SECONDS
        if key:
            self._key_wanted, self._key_at = False, now
        key |= number is not None and number <= self._seen_by_some + 1  # where some viewer goes on
        picture = self._encoder.encode(frame, now - self._started, key=key)
        self._append(picture, number)
        with self._changed:
            recording, problem = self._recording, None
            if recording is None or number is None:
                return
            try:
                recording.write(picture)
                if recording.frames < _RECORDED_SECONDS * self._runtime.fps:
                    return
                recording.close()
            except OutputError as error:
                problem = str(error)
            self._recording = None
        self._publish({"type": "recorded", "name": recording.path.name, "error": problem})

    def _publish(self, event: dict[str, Any]) -> dict[str, Any]:
        self._append(event)
        return event

    def _append(self, item: Item, number: int | None = None) -> None:
        with self._changed:
            self._place = self._place + 1 if number is None else number * PLACES
            self._items.append((self._place, item))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        news, self._news = self._news, self._loop.create_future()
        news.set_result(None)


def _entry(text: str, block: int, over: int | None) -> Entry:
    return {"text": text, "block": block, "over": over, "asked": time.time()}


def load_model(model: Path, options: Mapping[str, Any], memory: str | None, like: Snapshot | None) -> Runtime:
    """Load a model with the options of :meth:`Runtime.from_pretrained`, in a memory mode unless that is None."""
    return Runtime.from_pretrained(model, **{**options, "memory": memory or options["memory"]}, like=like)
