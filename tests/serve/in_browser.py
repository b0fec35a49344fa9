"""The page in a real Chromium. ``test_serve_browser.py`` runs this file in a network namespace of its own.

WebRTC needs an address that is not 127.0.0.1, and nothing here may reach the world.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import LONG, Served, connect, plain, served
from streaming import OTHER, PROMPT
from test_serve_api import shown

from echo_rt.serve.app import make_app
from echo_rt.serve.encoder import LiveEncoder
from echo_rt.serve.guard import Rules
from echo_rt.serve.server import listen, make_server
from echo_rt.serve.session import ParkedError

CHROMIUM = os.environ.get("ECHO_RT_CHROMIUM", "/usr/bin/chromium")
SCREENSHOTS = os.environ.get("ECHO_RT_SCREENSHOTS")  # a folder to keep them in
FULL = "ECHO_RT_LONG_SERVE" in os.environ
MS = 1000 * LONG
MANY = 30 if FULL else 10  # frames, which are waited for in their time
expect.set_options(timeout=MS)


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    """Frames come at the model's own rate here."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--autoplay-policy=no-user-gesture-required"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(small_model, tmp_path_factory.mktemp("live") / "out", most_viewers=16) as found:
        yield found


def open_page(browser: Browser, port: int, transport: str, **options: Any) -> Page:
    """The page with frames coming; its errors and its requests elsewhere fail the test that looks at ``wrong``."""
    page = browser.new_page(**options)
    page.set_default_timeout(MS)
    page.wrong = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.wrong.append(str(error)))  # type: ignore[attr-defined]
    page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)  # type: ignore[attr-defined]
    page.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "blob:", "data:"))
            else page.wrong.append(asked.url)  # type: ignore[attr-defined]
        ),
    )
    page.add_init_script(f"localStorage.transport = {transport!r}")
    page.goto(f"http://127.0.0.1:{port}/")
    more_frames(page, 5)
    return page


def more_frames(page: Page, count: int) -> None:
    page.wait_for_function("([n, at]) => echo.frames >= at + n", arg=[count, page.evaluate("echo.frames")], timeout=MS)


def keep(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


PIXELS = """() => {
  const video = document.querySelector("video"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [16, 16];
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.drawImage(video, 0, 0, 16, 16);
  return [...pen.getImageData(0, 0, 16, 16).data];
}"""


@pytest.mark.parametrize("transport", ["webrtc", "mp4"])
def test_the_pictures_move_and_a_typed_prompt_shows_at_its_block(
    browser: Browser, server: Served, transport: str
) -> None:
    server.live.post("/restart", seed=0, prompt=PROMPT)
    page = open_page(browser, server.port, transport, viewport={"width": 1440, "height": 900})
    before = page.evaluate(PIXELS)
    more_frames(page, MANY)
    assert np.abs(np.subtract(before, page.evaluate(PIXELS))).max() > 4, "a still"
    size = page.evaluate("[document.querySelector('video').videoWidth, document.querySelector('video').videoHeight]")
    assert size == server.live.get("")["size"] and page.evaluate("echo.transport") == transport
    page.wait_for_function("echo.delays.length > 3", timeout=MS)
    expect(page.locator("#connection")).to_contain_text("ms")

    page.keyboard.press("/")
    page.keyboard.type(OTHER)
    page.keyboard.press("Enter")
    row = page.locator("#prompts li").first
    expect(row).to_contain_text(OTHER)
    switch = server.live.get("/prompts")["prompts"][-1]["block"]
    expect(row).to_have_class("now")
    expect(row).to_contain_text(f"since block {switch}")
    keep(page, f"page-{transport}")
    blocks = shown(server, 1, first=switch)
    assert page.wrong == []  # type: ignore[attr-defined]
    page.close()
    video = plain(server.model, max(blocks) + 1, (switch, OTHER))
    without = plain(server.model, max(blocks) + 1)
    assert all(frames == video[index] != without[index] for index, frames in blocks.items())


def test_controls_keys_and_a_recording(browser: Browser, server: Served, tmp_path: Path) -> None:
    page = open_page(browser, server.port, "mp4", color_scheme="dark", viewport={"width": 1440, "height": 900})
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press(" ")
    expect(page.locator("#connection")).to_have_text("paused")
    assert server.live.get("/figures")["state"] == "paused"
    page.keyboard.press(" ")
    more_frames(page, 3)
    page.keyboard.press("r")
    expect(page.locator("#recording")).to_be_visible()
    more_frames(page, MANY)
    with page.expect_download(timeout=MS) as download:
        page.keyboard.press("r")
    download.value.save_as(tmp_path / "seen.mp4")
    with av.open(str(tmp_path / "seen.mp4")) as video:
        assert len(list(video.decode(video=0))) > 5
    page.keyboard.press("s")
    expect(page.locator("#snapshots option").first).to_contain_text("block")
    page.fill("#seed", str(2**64 - 1))
    page.click("#restart button")
    expect(page.locator("#figures")).to_contain_text(str(2**64 - 1))
    page.click("#resume button")
    expect(page.locator("#message")).to_contain_text("Goes on with block")
    page.fill("#text", "bell \u0007")
    page.click("#compose button")
    expect(page.locator("#message")).to_contain_text("printable")
    keep(page, "page-light")
    wrong = [said for said in page.wrong if "422" not in said]  # type: ignore[attr-defined]
    assert wrong == []
    page.close()


def test_a_phone_shows_all_of_it(browser: Browser, server: Served) -> None:
    page = open_page(browser, server.port, "mp4", viewport={"width": 390, "height": 844}, has_touch=True)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "it scrolls sideways"
    for name in ("#video", "#text", "#pause", "#record", "#figures", "#restart", "#resume"):
        page.locator(name).scroll_into_view_if_needed()
        assert page.locator(name).is_visible(), name
    page.evaluate("scrollTo(0, 0)")
    keep(page, "page-phone")
    page.close()


def test_the_page_comes_back_with_the_server(browser: Browser, small_model: Path, tmp_path: Path) -> None:
    with served(small_model, tmp_path / "out") as first:
        pages = [open_page(browser, first.port, transport) for transport in ("webrtc", "mp4")]
        at = first.live.get("/figures")["block"]
        port = first.port
    for page in pages:
        expect(page.locator("#connection")).to_have_text("server away")
    rtc = pages[0]
    stalled = rtc.evaluate("(echo.viewers = null, [echo.lastFrame, echo.frames])")
    with served(small_model, tmp_path / "out", resume=True, port=port) as second:
        rtc.wait_for_function("() => echo.viewers !== null", timeout=MS)
        at_last, frames, connecting = rtc.evaluate("[echo.lastFrame, echo.frames, echo.first]")
        # Or the page would wait for pictures until the browser notices that nobody sends any.
        assert connecting or frames > stalled[1] or at_last == stalled[0], "figures pass for a picture"
        for page in pages:
            more_frames(page, 10)
            page.wait_for_function("block => echo.block >= block", arg=at, timeout=MS)
            page.close()
        assert second.session.resumed is not None


def test_ten_viewers_and_one_that_is_frozen(browser: Browser, server: Served) -> None:
    """Viewers in the browser and without one; a frozen one takes nothing of what is sent."""
    pages = [open_page(browser, server.port, "webrtc" if number % 2 else "mp4") for number in range(10 if FULL else 2)]
    address = f"ws://127.0.0.1:{server.port}/api/sessions/main/video?format=h264"
    leaving = {"compression": None, "close_timeout": 0}  # behind unread frames no good-bye is read
    with ExitStack() as stack:
        stack.enter_context(connect(address, max_queue=1, **leaving))  # the frozen one
        others = [stack.enter_context(connect(address, **leaving)) for _ in range(10 - len(pages))]
        for viewer in others:
            assert all(viewer.recv(LONG) for _ in range(MANY))
        for page in pages:
            more_frames(page, MANY)
        assert server.live.get("/figures")["viewers"] == 11
    for page in pages:
        page.close()


# ---------------------------------------------------------------- the delay, by a counter in the picture


class Counting:
    """A session whose pictures are a counter: the row of squares at the top is its number in binary.

    While ``parked`` it shows nothing; a command, or a viewer who asks once more, brings it back.
    """

    size, fps = (832, 480), 16

    def __init__(self) -> None:
        self.parked = False
        self.shown_at: dict[int, float] = {}
        self._items: list[Any] = []
        self._over = threading.Event()

    async def start(self) -> None:
        self._encoder = LiveEncoder(self.size, self.fps, 4.0)
        self._epoch, self._key = time.time(), True
        self._encoder.encode(np.zeros((480, 832, 3), np.uint8), 0.0, key=True)
        self._thread = threading.Thread(target=self._show)
        self._thread.start()

    def _show(self) -> None:
        noise = np.random.default_rng(0).integers(0, 60, (480, 832, 3), np.uint8)
        number = 0
        while not self._over.wait(max(0.0, self._epoch + (number + 1) / self.fps - time.time())):
            number += 1
            frame = np.roll(noise, number, axis=1)
            for bit in range(12):
                frame[:64, 64 * bit : 64 * bit + 64] = 255 * (number >> bit & 1)
            now = time.time()
            self.shown_at[number] = now
            key, self._key = self._key, False
            self._items = [*self._items[-50:], (number, self._encoder.encode(frame, now - self._epoch, key=key))]

    async def describe(self) -> dict[str, Any]:
        about = {"size": list(self.size), "fps": self.fps, "codec": self._encoder.codec, "epoch": self._epoch}
        return {**about, "header": self._encoder.header, "model": "-", "device": "-", "memories": []}

    async def wake(self) -> None:
        self.parked = False

    async def next(self, after: int | None, audience: Any = None) -> list[Any]:
        after = (self._items[-1][0] if self._items else 0) if after is None else after
        if self.parked:
            raise ParkedError("parked")
        while not (found := [item for item in self._items if item[0] > after]):
            await asyncio.sleep(0.002)
        return found

    async def block(self, after: int) -> None:
        await asyncio.sleep(1)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._key = self._key or command == "keyframe"
        if self.parked and command == "figures":
            return {"state": "parked"}
        self.parked = self.parked and command == "keyframe"
        lists = {name: [] for name in ("prompts", "snapshots", "recordings")}
        return {"state": "playing", "failure": None, "seed": 0, "memory": "", "recording": None, **lists}

    async def close(self) -> None:
        self._over.set()
        self._thread.join()


READ = """() => new Promise((done) => {
  const video = document.querySelector("video"), canvas = document.createElement("canvas"), seen = [];
  [canvas.width, canvas.height] = [768, 64];
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const look = (now, frame) => {
    pen.drawImage(video, 0, 0, 768, 64, 0, 0, 768, 64);
    let number = 0;
    for (let bit = 0; bit < 12; bit++) number |= (pen.getImageData(64 * bit + 32, 32, 1, 1).data[0] > 128) << bit;
    seen.push([number, (performance.timeOrigin + performance.now()) / 1000]);
    seen.length < 100 ? video.requestVideoFrameCallback(look) : done([seen, [...echo.delays]]);
  };
  video.requestVideoFrameCallback(look);
})"""


@contextmanager
def counted(session: Counting) -> Iterator[int]:
    """Serve it; yields the port."""
    listener = listen("127.0.0.1", 0)
    server = make_server(make_app({"main": session}, Rules()))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LONG)


def test_a_parked_video_stays_so_until_somebody_plays_it(browser: Browser) -> None:
    session = Counting()
    with counted(session) as port:
        page = open_page(browser, port, "mp4")
        session.parked = True
        expect(page.locator("#connection")).to_have_text("parked")
        expect(page.locator("#notice")).to_contain_text("Play brings it back")
        if FULL:  # by then the page would connect again, if it thought that the video stalls
            page.wait_for_function("() => performance.now() - echo.lastFrame > 8000", timeout=MS)
        assert session.parked, "who watched brought it back"
        page.keyboard.press(" ")
        more_frames(page, 5)
        expect(page.locator("#connection")).to_contain_text("MP4")
        page.close()


@pytest.mark.skipif(not FULL, reason="measures a server on an idle machine: set ECHO_RT_LONG_SERVE=1")
@pytest.mark.parametrize(("transport", "most"), [("webrtc", 60), ("mp4", 150)])
def test_delay_at_832x480(browser: Browser, transport: str, most: float) -> None:
    session = Counting()
    with counted(session) as port:
        page = open_page(browser, port, transport)
        more_frames(page, 32)
        seen, told = page.evaluate(READ)
        page.close()
    delays = [1000 * (at - session.shown_at[number]) for number, at in seen if number in session.shown_at]
    assert len(delays) > 80
    median, told_median = statistics.median(delays), statistics.median(told)
    print(
        f"{transport} 832x480 at 16 fps: median {median:.0f} ms, p95 {sorted(delays)[int(len(delays) * 0.95)]:.0f} ms; "
        f"the page says {told_median:.0f} ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    assert abs(median - told_median) < max(40, 0.5 * median), "the page's own figure is wrong"
    assert median <= most
