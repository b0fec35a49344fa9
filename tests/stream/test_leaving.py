"""What ends a program amid a block: Ctrl-C, and an interpreter that exits beside daemon threads."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import OTHER, PROMPT, amid_blocks, embeds, load, same, take

import echo_rt
from echo_rt import StreamError
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

# The main thread ends while another one is certainly in a library, and certainly comes back from it. Each work has a
# fork of its own, which ends as any interpreter does, without importing everything once more.
PROGRAM = """
import os, sys, threading
import torch
import echo_rt
from echo_rt.stream import Stream

def long_operation():
    inside.set()
    a = torch.ones(600, 600)
    for _ in range(10):
        a = a @ a * 1e-3

model, checkpoint, path, *works = sys.argv[1:]
for work in works:
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), work, flush=True)
else:
    sys.exit()
inside = threading.Event()
runtime = echo_rt.Runtime.from_pretrained(model, checkpoint=checkpoint, device="cpu", keep_text_encoder=True)
stream = runtime.stream("a fox")
next(stream)
places = {
    "next(stream)": (type(runtime._engine.rollout), "next_block"),
    "stream.set_prompt('a bear')": (type(runtime._engine.prompts), "encode"),
    "stream.snapshot(path)": (type(runtime._engine), "save_state"),
}
owner, name = places[work]
whole = getattr(owner, name)

def slow(*arguments, **options):
    long_operation()
    return whole(*arguments, **options)

setattr(owner, name, slow)
def run():
    while True:
        eval(work)

threading.Thread(target=run, daemon=True).start()
inside.wait()
"""


def test_the_interpreter_exits_beside_a_daemon_thread(small_model: Path, tmp_path: Path) -> None:
    works = ["next(stream)", "stream.set_prompt('a bear')", "stream.snapshot(path)"]
    program = [sys.executable, "-c", PROGRAM, small_model, small_model / CHECKPOINT_FILE, tmp_path / "snapshot"]
    environment = os.environ | {"PYTHONPATH": str(Path(echo_rt.__file__).parent.parent)}
    done = subprocess.run([*program, *works], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"0 {work}" for work in works]


# ---------------------------------------------------------------- Ctrl-C


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises ``KeyboardInterrupt``, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_amid_a_block_leaves_the_stream_as_it_was(
    runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        sent = []

        def press(block: int, step: int) -> None:
            if (block, step) in ((2, 1), (4, 0)):
                sent.append(block)
                signal.raise_signal(signal.SIGINT)

        amid_blocks(stream, press, monkeypatch)
        made: list[echo_rt.Chunk] = []
        for _ in range(3):
            try:
                while len(made) < 6:
                    made.append(next(stream))
            except KeyboardInterrupt:
                assert stream.failure is None and stream.next_block == sent[-1] == len(made)
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sent == [2, 4] and same(made, expected)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_interrupts_the_block(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(block: int, step: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        amid_blocks(stream, press, patch)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert stream.failure is not None and "KeyboardInterrupt" in stream.failure


def test_handlers_of_the_program_stay(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            amid_blocks(stream, lambda block, step: signal.raise_signal(signal.SIGINT), monkeypatch)
            take(stream, 2)
            assert len(came) == 2 * len(runtime.config.sampler.denoising_steps)
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- to another process


@pytest.mark.parametrize("move", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_what_belongs_to_a_process_is_not_moved(runtime: echo_rt.Runtime, move: Any) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream, stream.feed() as feed:
        for thing, instead in ((runtime, r"from_pretrained"), (stream, "snapshot"), (feed, "another feed")):
            with pytest.raises(StreamError, match=f"a {type(thing).__name__} cannot be copied or pickled: .*{instead}"):
                move(thing)


def test_advice_after_the_runtime_is_closed(small_model: Path) -> None:
    runtime = load(small_model)
    stream = runtime.stream(PROMPT)
    feed = stream.feed()
    next(feed)
    loop = iter(stream)
    next(loop)
    runtime.close()
    assert list(loop) == []
    for act in (
        lambda: next(stream),
        lambda: stream.set_prompt(OTHER),
        stream.snapshot,
        stream.feed,
        lambda: within_feed(feed),
        lambda: runtime.stream(PROMPT),
    ):
        with pytest.raises(StreamError, match=r"the runtime is closed; load another with Runtime\.from_pretrained"):
            act()
    assert "closed" in repr(runtime) and "closed" in repr(stream)


def within_feed(feed: echo_rt.Feed) -> None:
    while True:  # what was made before still comes
        next(feed)
