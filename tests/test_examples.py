"""The programs in docs/examples, run on the tiny model as a person would run them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import OTHER, PROMPT, load, take, within

import echo_rt
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LONG = 60.0  # seconds; only a deadlock takes that long
SERVED = ("fastapi", "uvicorn", "websockets", "aiortc", "prometheus_client")


@pytest.fixture
def run(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs an example in this process, on the CPU in float32."""
    from_pretrained = echo_rt.Runtime.from_pretrained

    def on_the_cpu(*arguments: Any, **options: Any) -> echo_rt.Runtime:
        return from_pretrained(*arguments, **(options | {"device": "cpu"}))

    monkeypatch.setattr(echo_rt.Runtime, "from_pretrained", on_the_cpu)

    def run(name: str, *arguments: object, run_name: str = "__main__") -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name=run_name)

    return run


def plain(small_model: Path, blocks: int, switch: tuple[int, str] | None = None) -> torch.Tensor:
    """The frames that the examples should show."""
    with load(small_model) as runtime, runtime.stream(PROMPT) as stream:
        if switch is not None:
            stream.set_prompt(switch[1], block=switch[0])
        return torch.cat([chunk.frames for chunk in take(stream, blocks)])


def test_every_example_is_short_and_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"README.md", "window.py", "server.py", "numbered_frames.py", "notebook.ipynb"}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in page for name in names - {"README.md"})
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 85, path.name


@pytest.mark.parametrize(
    ("name", "packages"),
    [("window.py", ()), ("numbered_frames.py", ("PIL",)), ("server.py", SERVED)],
)
def test_what_they_cannot_load_is_told_in_a_line(
    run: Callable[..., Any],
    name: str,
    packages: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "tkinter", StandIn(lambda _: False).module())
    option = [] if name == "server.py" else ["--model"]
    more = [tmp_path / "frames"] if name == "numbered_frames.py" else []
    with pytest.raises(SystemExit) as ended:
        run(name, *option, tmp_path / "absent", *more)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: {tmp_path / 'absent'}: expected a Wan2.1 model") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- numbered frames


@pytest.mark.parametrize("turn", [None, (1, OTHER)], ids=["the same command", "another prompt"])
def test_numbered_frames_go_on_where_they_were(
    run: Callable[..., Any], small_model: Path, tmp_path: Path, turn: tuple[int, str] | None
) -> None:
    image = pytest.importorskip("PIL.Image")
    signals = signal.getsignal(signal.SIGINT)
    try:
        for more in ((), () if turn is None else ("--turn-to", turn[1])):
            run(
                *("numbered_frames.py", "--model", small_model, tmp_path / "out", "--frames", 9, "--keep-every", 1),
                *("--checkpoint", small_model / CHECKPOINT_FILE, "--prompt", PROMPT, *more),
            )
    finally:
        signal.signal(signal.SIGINT, signals)
    frames = plain(small_model, 2, turn).numpy()
    names = [f"frame-{number:08d}.png" for number in range(len(frames))]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "state.safetensors"]
    written = np.stack([np.asarray(image.open(tmp_path / "out" / name)) for name in names])
    assert np.array_equal(written, frames)


def test_ctrl_c_leaves_numbered_frames_that_go_on(run: Callable[..., Any], small_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    signals = signal.getsignal(signal.SIGINT)

    def ctrl_c() -> None:
        end = time.monotonic() + LONG
        while not (tmp_path / "frame-00000009.png").exists() and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ctrl_c, daemon=True).start()
    try:
        run("numbered_frames.py", "--model", small_model, tmp_path, "--frames", 1000000)
    except KeyboardInterrupt:
        pytest.fail("the block was not brought to its end")
    finally:
        signal.signal(signal.SIGINT, signals)
    written = len(list(tmp_path.glob("frame-*.png")))
    snapshot = echo_rt.Snapshot.load(tmp_path / "state.safetensors")
    with echo_rt.Runtime.from_pretrained(small_model) as runtime, runtime.resume(snapshot) as stream:
        assert stream.video_frames == written > 9


# ---------------------------------------------------------------- notebook


@pytest.mark.slow
def test_the_notebook_runs_where_it_lies(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(EXAMPLES)
    files = set(EXAMPLES.iterdir())
    names: dict[str, Any] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None, "saved with its outputs"
                exec(compile("".join(cell["source"]), f"notebook.ipynb {cell['id']}", "exec"), names)
    assert out.getvalue().startswith("block 0 frames from 0") and "from block 1" in out.getvalue()
    one, other = names["ends"]
    assert one.shape == other.shape and not torch.equal(one, other), "two prompts, one picture"
    with pytest.raises(echo_rt.StreamError, match="closed"):
        next(names["stream"])
    assert set(EXAMPLES.iterdir()) == files, "the notebook left files beside itself"


# ---------------------------------------------------------------- window


class StandIn:
    """Tk without a screen: what would be shown is kept, what was asked for later is done at once."""

    def __init__(self, act: Callable[[StandIn], bool]) -> None:
        self.act = act  # called between two pictures; False closes the window
        self.shown: list[bytes] = []
        self.text = ""  # in place of a picture
        self.notes: list[str] = []
        self.later: list[Callable[[], None]] = []
        self.bound: dict[str, Callable[[object], None]] = {}
        self.typed = ""
        self.thread = threading.current_thread()

    def module(self) -> types.ModuleType:
        tkinter = types.ModuleType("tkinter")
        for name in ("Tk", "Label", "Entry"):
            setattr(tkinter, name, lambda *_, **options: self)
        tkinter.TclError = type("TclError", (Exception,), {})  # type: ignore[attr-defined]
        tkinter.PhotoImage = lambda data: data  # type: ignore[attr-defined]
        return tkinter

    def title(self, text: str) -> None:
        assert text

    def update(self) -> None:
        assert not self.shown, "only before the model is loaded"

    def pack(self, **options: object) -> None:
        pass

    def bind(self, event: str, act: Callable[[object], None]) -> None:
        self.bound[event] = act

    def get(self) -> str:
        return self.typed

    def configure(self, image: bytes | str | None = None, text: str = "") -> None:
        assert threading.current_thread() is self.thread, "Tk is for one thread"
        if image is None:
            self.notes.append(text)
        elif isinstance(image, bytes):
            self.shown.append(image)
        else:
            self.text = text

    def after(self, milliseconds: int, act: Callable[[], None]) -> None:
        assert isinstance(milliseconds, int) and milliseconds >= 0
        self.later.append(act)

    def mainloop(self) -> None:
        end = time.monotonic() + LONG
        while self.act(self):
            assert time.monotonic() < end, "no pictures"
            time.sleep(0.001)
            (act,) = self.later
            self.later.clear()
            act()


def test_the_window_shows_every_frame_and_takes_prompts(
    run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    set_prompt = echo_rt.Stream.set_prompt

    def remembered(self: echo_rt.Stream, prompt: str) -> None:
        set_prompt(self, prompt)
        asked.append((prompt, self.next_prompt_block))

    def act(window: StandIn) -> bool:
        if len(window.shown) == 1 and not window.typed:
            window.typed = OTHER
            window.bound["<Return>"](None)
        return len(window.shown) < 34 or not asked

    window = StandIn(act)
    program = "window.py", "--model", small_model, "--checkpoint", small_model / CHECKPOINT_FILE, "--prompt", PROMPT

    def in_one_thread() -> None:
        window.thread = threading.current_thread()
        run(*program)

    with monkeypatch.context() as patch:
        patch.setattr(echo_rt.Stream, "set_prompt", remembered)
        patch.setitem(sys.modules, "tkinter", window.module())
        within(2 * LONG, in_one_thread)
    ((text, first_open),) = asked
    assert text == OTHER
    header = b"P6 32 32 255 "
    assert all(image.startswith(header) for image in window.shown)
    shown = [image.removeprefix(header) for image in window.shown]
    blocks = 2 + len(shown) // 12
    # The prompt reached the block that was open then, or the one after it, which was begun meanwhile.
    candidates = [plain(small_model, blocks, (first_open - late, OTHER)) for late in (0, 1)]
    assert any(shown == [frame.numpy().tobytes() for frame in video[: len(shown)]] for video in candidates)


def test_without_a_display_the_window_says_so(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it loads a model, and in one line."""
    tkinter = StandIn(lambda _: False).module()

    def refuse() -> None:
        raise tkinter.TclError("no display name and no $DISPLAY environment variable")

    monkeypatch.setattr(tkinter, "Tk", refuse)
    monkeypatch.setitem(sys.modules, "tkinter", tkinter)
    with pytest.raises(SystemExit):
        run("window.py", "--model", "absent")
    assert capsys.readouterr().err == "window.py: error: no display name and no $DISPLAY environment variable\n"


def test_the_window_says_how_the_stream_failed(
    run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: echo_rt.Feed) -> None:
        raise echo_rt.StreamError("block 3: the device is lost")

    window = StandIn(lambda window: True)
    monkeypatch.setattr(echo_rt.Feed, "poll", lost)
    monkeypatch.setitem(sys.modules, "tkinter", window.module())
    with pytest.raises(SystemExit):  # here alone: Tk prints the error, and the window stays
        run("window.py", "--model", small_model, "--checkpoint", small_model / CHECKPOINT_FILE)
    assert window.text == "StreamError: block 3: the device is lost" and not window.shown and not window.later


def test_the_window_shows_what_is_wrong_with_a_prompt(
    run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(window: StandIn) -> bool:
        if len(window.shown) == 1 and not any(window.notes):
            window.bound["<Return>"](None)  # nothing was typed
        return not any(window.notes)

    window = StandIn(act)
    monkeypatch.setitem(sys.modules, "tkinter", window.module())
    with contextlib.suppress(SystemExit):
        run("window.py", "--model", small_model, "--checkpoint", small_model / CHECKPOINT_FILE)
    assert window.notes[-1].startswith("PromptError: the prompt is empty") and window.shown


@pytest.mark.skipif(not os.environ.get("DISPLAY"), reason="no screen")
def test_the_window_opens_on_a_screen(
    run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tkinter = pytest.importorskip("tkinter")
    shown: list[str] = []
    configure = tkinter.Label.configure

    def watched(self: Any, **options: Any) -> None:
        configure(self, **options)
        self.update()
        shown.append(f"{self.winfo_width()} {options['image'].width()}")
        if len(shown) == 12:
            self.winfo_toplevel().destroy()

    monkeypatch.setattr(tkinter.Label, "configure", watched)
    with contextlib.suppress(SystemExit):  # the window is gone when the next picture is asked for
        run("window.py", "--model", small_model, "--checkpoint", small_model / CHECKPOINT_FILE)
    assert len(shown) == 12 and shown[-1].endswith(" 32")


# ---------------------------------------------------------------- server


def test_the_server_shows_the_video_and_takes_prompts(
    run: Callable[..., Any], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (*SERVED, "httpx", "websockets"):
        pytest.importorskip(package)
    from echo_rt.client import Live
    from echo_rt.serve import server as serving

    monkeypatch.chdir(tmp_path)
    listener, made = serving.listen("127.0.0.1", 0), []
    make = serving.make_server
    monkeypatch.setattr(serving, "listen", lambda host, port: listener)
    monkeypatch.setattr(serving, "make_server", lambda app: made.append(make(app)) or made[0])
    program = "server.py", small_model, small_model / CHECKPOINT_FILE
    thread = threading.Thread(target=run, args=program, daemon=True)
    thread.start()
    with Live(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=5 * LONG) as live:  # the model is loaded first
        assert next(live.frames()).shape == (32, 32, 3)
        taken = live.prompt(OTHER)
        shown = next(event for event in live.events() if event.get("block", -1) >= taken["block"])
        assert shown["block"] >= taken["block"] > 0
    made[0].should_exit = True
    thread.join(LONG)
    assert not thread.is_alive()
    assert len(list((tmp_path / "echo-rt-live").glob("*.safetensors"))) == 1, "no snapshot to go on from"
