"""Eight threads do anything to one runtime for some seconds: ``python -X dev -W error hammer.py MODEL SECONDS SEED``.

Ends with 1 and says why: a thread that is stuck (all stacks are printed), an error that is not the package's, a block
handed out twice, a warning, an error that nobody saw, a video that is not what it was before.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

THREADS = 8
STUCK = 120.0  # seconds for one call; only a deadlock takes that long


class Hammer:
    """What the threads share."""

    def __init__(self, runtime: Any, seconds: float, seed: int) -> None:
        from streaming import OTHER, PROMPT, embeds

        self.runtime, self.seed = runtime, seed
        self.texts, self.embeds = (PROMPT, OTHER), [embeds(runtime, number) for number in range(2)]
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()  # of what follows
        self.stream: Any = None
        self.snapshot: Any = None
        self.taken: set[tuple[Any, int]] = set()
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.since = [time.monotonic()] * THREADS  # when each thread's call began
        self.begin(random.Random(seed))

    def begin(self, dice: random.Random) -> None:
        """Another stream; the one before is closed, amid whatever the other threads do with it."""
        if self.stream is not None:
            self.stream.close()
        if self.snapshot is not None and dice.random() < 0.5:
            self.stream = self.runtime.resume(self.snapshot)
        else:
            self.stream = self.runtime.stream(prompt_embeds=dice.choice(self.embeds), seed=dice.randrange(3))

    def note(self, stream: Any, chunk: Any) -> None:
        with self.lock:
            if (stream, chunk.index) in self.taken:
                self.faults.append(f"block {chunk.index} of {stream!r} was handed out twice")
            self.taken.add((stream, chunk.index))

    def act(self, action: str, dice: random.Random) -> None:
        stream = self.stream
        if action == "next":
            self.note(stream, next(stream))
        elif action == "set_prompt":
            given = {"prompt": dice.choice(self.texts)} if dice.random() < 0.3 else {"prompt_embeds": self.embeds[0]}
            more: dict[str, Any] = dice.choice([{}, {"over": 3}, {"flush": True}, {"block": stream.next_block + 2}])
            stream.set_prompt(**given, **more)
        elif action == "snapshot":
            self.snapshot = stream.snapshot()
        elif action == "close":
            if dice.random() < 0.5:
                with self.lock:
                    kept, self.taken = self.stream, set()
                    self.begin(dice)
                del kept
            else:
                stream.close()
        elif action == "feed":
            feed = stream.feed(dice.randint(1, 3), dice.choice(["wait", "drop"]))
            for _ in range(dice.randrange(4)):
                if (chunk := feed.poll(0.2) if dice.random() < 0.5 else next(feed)) is not None:
                    self.note(stream, chunk)
            if dice.random() < 0.5:
                feed.close()  # or it is dropped as it is
        elif action == "look":
            assert repr(stream) and stream.next_prompt_block >= 0 and stream.frames_until_prompt >= 0
            assert stream.video_frames >= 0 and stream.prompt in (None, *self.texts) and stream.skipped >= 0

    def work(self, number: int) -> None:
        from echo_rt.errors import StreamError

        dice = random.Random(self.seed * THREADS + number)
        names = ["next"] * 6 + ["set_prompt", "snapshot", "close", "feed", "look"]
        while time.monotonic() < self.end and not self.faults:
            action = dice.choice(names)
            self.since[number] = time.monotonic()
            try:
                self.act(action, dice)
            except (StreamError, StopIteration):  # closed meanwhile, or begun
                action = f"{action}, refused"
                if self.stream.closed:
                    with self.lock:
                        if self.stream.closed:
                            self.taken = set()
                            self.begin(dice)
            except BaseException:
                self.faults.append(f"{action}: {traceback.format_exc()}")
            self.done[action] += 1
        self.since[number] = float("inf")

    def watch(self, threads: list[threading.Thread]) -> None:
        """Return once all threads have ended; end the process if one is stuck."""
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.1)
            if time.monotonic() - min(self.since) > STUCK:
                faulthandler.dump_traceback(all_threads=True)
                print(f"a call has not returned for {STUCK:.0f} s", file=sys.stderr, flush=True)
                os._exit(1)


def main(model: str, seconds: str, seed: str) -> None:
    """Hammer, and compare a video before and after."""
    from streaming import load, same, video

    unseen: list[str] = []
    sys.unraisablehook = lambda found: unseen.append(f"unraisable: {found.exc_value!r} in {found.object!r}")
    threading.excepthook = lambda found: unseen.append(f"in a thread: {found.exc_value!r}")
    with load(Path(model), keep_text_encoder=True) as runtime:
        expected = video(runtime, 3)
        hammer = Hammer(runtime, float(seconds), int(seed))
        threads = [threading.Thread(target=hammer.work, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        hammer.watch(threads)
        hammer.stream.close()
        hammer.since = [time.monotonic()]
        after: list[Any] = []
        last = threading.Thread(target=lambda: after.append(video(runtime, 3)), daemon=True)
        last.start()
        hammer.watch([last])
        print(", ".join(f"{count} x {name}" for name, count in sorted(hammer.done.items())))
        faults = [*hammer.faults, *unseen]
        if not after or not same(after[0], expected):
            faults.append("the video is another one afterwards")
        left = [thread.name for thread in threading.enumerate() if thread.name == "echo_rt feed"]
        if left:
            faults.append(f"threads are left: {left}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(*sys.argv[1:])
