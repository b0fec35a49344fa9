"""How a feed ends: errors, closing from anywhere, the end of its process, forks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
from feeding import LONG, feed_threads, until
from streaming import Gate, amid_blocks, embeds, load, same, video, within

import echo_rt
from echo_rt.errors import NumericalError, StreamError
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

# ---------------------------------------------------------------- errors and ends


def test_an_error_comes_after_the_blocks_before_it(
    runtime: echo_rt.Runtime,
    stream: echo_rt.Stream,
    expected: list[echo_rt.Chunk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def poisoned(block: int, step: int) -> None:
        if block == 2:
            runtime._engine.rollout.state.x.fill_(float("nan"))  # type: ignore[union-attr]

    with monkeypatch.context() as patch, echo_rt.Feed(stream, depth=4) as feed:
        amid_blocks(stream, poisoned, patch)
        until(lambda: stream.failure is not None)
        made = [next(feed), next(feed)]
        with pytest.raises(NumericalError, match="block 2: latent"):
            next(feed)
        for use in (lambda: next(feed), feed.poll, lambda: list(feed)):
            with pytest.raises(StreamError, match="the stream cannot go on: block 2 failed"):
                use()
    assert same(made, expected[:2])
    assert same(video(runtime, 2), expected[:2])


@pytest.mark.parametrize("closed", ["behind the failure", "amid it"])
def test_blocks_made_before_an_error_outlive_a_closed_feed(
    stream: echo_rt.Stream, expected: list[echo_rt.Chunk], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amid, closing = threading.Event(), threading.Event()

    def fail(block: int, step: int) -> None:
        if block == 2:
            amid.set()
            assert closing.wait(LONG)
            raise ValueError("broken")

    amid_blocks(stream, fail, monkeypatch)
    feed = echo_rt.Feed(stream, depth=4)
    assert amid.wait(LONG) and feed.waiting == 2
    if closed == "amid it":
        closer = threading.Thread(target=feed.close, daemon=True)
        closer.start()
        until(lambda: feed.closed)
        closing.set()
        closer.join(LONG)
    else:
        closing.set()
        until(lambda: stream.failure is not None)
        feed.close()
    assert same([next(stream), next(stream)], expected[:2])
    with pytest.raises(StreamError, match="block 2 failed"):
        next(stream)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_thread_that_dies_is_an_error_and_not_a_silence(
    stream: echo_rt.Stream, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(block: int, step: int) -> None:
        raise kind("pulled out")

    with echo_rt.Feed(stream, depth=1) as feed:
        next(feed)
        amid_blocks(stream, die, monkeypatch)
        with pytest.raises(StreamError, match=f"the feed's thread died of {kind.__name__}: pulled out"):
            within(LONG, lambda: list(feed))
    assert feed_threads() == []


def test_closing_the_stream_or_the_runtime_ends_the_loop(small_model: Path) -> None:
    with load(small_model) as runtime:
        for close in ("stream", "runtime"):
            stream = runtime.stream(prompt_embeds=embeds(runtime))
            with echo_rt.Feed(stream) as feed:
                next(feed)
                (stream if close == "stream" else runtime).close()
                # What was made before still comes, then the end.
                assert within(LONG, lambda feed=feed: [chunk.index for chunk in feed])[:1] in ([], [1])
                with pytest.raises(StreamError, match=f"the {close} is closed"):
                    feed.poll()


def test_closing_from_another_thread_ends_a_wait(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(stream, monkeypatch)
    feed = echo_rt.Feed(stream)
    assert gate.reached.wait(LONG)
    closer = threading.Timer(0.1, feed.close)
    closer.start()
    assert within(LONG, lambda: list(feed)) == []
    assert closer.is_alive(), "close did not wait for the block"
    gate.open()
    closer.join(LONG)
    feed.close()
    assert next(stream).index == 0


def test_a_failure_keeps_nothing_alive(small_model: Path) -> None:
    runtime = load(small_model)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    kv = weakref.ref(runtime._engine.rollout.state.kv)  # type: ignore[union-attr]
    rollout = weakref.ref(runtime._engine.rollout)  # type: ignore[union-attr]

    def fail() -> None:
        raise ValueError("broken")

    gc.collect()
    gc.disable()
    try:
        rollout().next_block = fail  # type: ignore[method-assign, union-attr]
        feed = echo_rt.Feed(stream)
        until(lambda feed=feed: feed._feeder.over)
        runtime.close()
        del feed, stream  # the error was never asked for
        until(lambda: feed_threads() == [])
        assert kv() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_wait_has_taken_nothing(
    stream: echo_rt.Stream, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler raises in a thread that waits for a block."""

    def handler(*_: object) -> None:
        gate.open()
        raise stop

    gate, main = Gate(stream, monkeypatch), threading.main_thread().ident
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with echo_rt.Feed(stream) as feed:
            assert gate.reached.wait(LONG)
            waiters = feed._ready.changed._waiters  # type: ignore[attr-defined]

            def interrupt() -> None:
                until(lambda: len(waiters) > 0)
                signal.pthread_kill(main, signal.SIGUSR1)

            sender = threading.Thread(target=interrupt)
            sender.start()
            with pytest.raises(stop):
                next(feed)
            sender.join()
            assert next(feed).index == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---------------------------------------------------------------- processes


PROGRAM = """
    import sys, echo_rt, torch
    runtime = echo_rt.Runtime.from_pretrained(sys.argv[1], checkpoint=sys.argv[2], device="cpu")
    embeds = torch.zeros(1, runtime.config.transformer.text_dim)
    feed = echo_rt.Feed(runtime.stream(prompt_embeds=embeds), when_full=sys.argv[3])
    print(next(feed).index, flush=True)
    if sys.argv[4] == "error":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize(("when_full", "end"), [("wait", "end"), ("drop", "error")])
def test_a_program_may_end_while_its_feed_runs(small_model: Path, when_full: str, end: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(PROGRAM), small_model, small_model / CHECKPOINT_FILE),
            *(when_full, end),
        ],
        capture_output=True,
        text=True,
        timeout=2 * LONG,
        env={**os.environ, "PYTHONPATH": str(Path(echo_rt.__file__).parent.parent)},
    )
    assert done.stdout == "0\n"
    if end == "end":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError")


def test_a_fork_has_no_thread_to_wait_for(stream: echo_rt.Stream) -> None:
    with echo_rt.Feed(stream) as feed:
        until(lambda: feed.waiting == 2)
        locked, forked = threading.Event(), threading.Event()

        def hold() -> None:  # as a thread that is amid a queue's change
            with feed._ready.lock:
                locked.set()
                forked.wait(LONG)

        holder = threading.Thread(target=hold)
        holder.start()
        assert locked.wait(LONG)
        child = os.fork()
        if child == 0:
            signal.alarm(int(LONG))  # a deadlock is a failure, and no hang
            code = 1
            try:
                for use in (lambda: next(feed), feed.poll, lambda: list(feed)):
                    with pytest.raises(StreamError, match="the feed belongs to process"):
                        use()
                feed.close()
                del feed
                stream.close()
                code = 0
            finally:
                os._exit(code)
        forked.set()
        holder.join()
        assert os.waitpid(child, 0)[1] == 0
        assert next(feed).index == 0
