"""Videos and recordings in a real browser, from a server that knows no ranges."""

from __future__ import annotations

import http.server
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echo_rt.output.segments import SegmentedWriter
from echo_rt.output.video import VideoWriter

pytest.importorskip("av")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

SIZE = (64, 48)
TYPES = {".mp4": "video/mp4", ".m3u8": "application/vnd.apple.mpegurl", "": "text/html"}
PLAY = """
    async ([source, to_the_end]) => {
        const video = document.querySelector("video");
        const next = (...names) => new Promise(done => names.forEach(n => video.addEventListener(n, () => done(n))));
        video.muted = true;
        const loaded = next("loadeddata", "error");
        video.src = source;
        if (await loaded == "error") return {error: video.error.message, width: 0};
        const seen = {seconds: video.duration, width: video.videoWidth};
        if (to_the_end) {
            const ended = next("ended", "error");
            video.playbackRate = 4;
            video.play();
            seen.event = await ended;
            seen.played = video.currentTime;
        }
        return seen;
    }
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = tmp_path / self.path.lstrip("/")
            known = path.suffix in TYPES and (self.path == "/" or path.is_file())
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", TYPES.get(path.suffix, "text/plain"))
            self.end_headers()
            if known:
                self.wfile.write(b"<video></video>" if self.path == "/" else path.read_bytes())

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a browser leaves amid an answer
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(served: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.goto(served)
        yield page
        browser.close()


def test_a_finished_video_has_its_length(tmp_path: Path, moving: Any, page: Any) -> None:
    for name, fragmented in (("ordinary.mp4", False), ("fragmented.mp4", True)):
        with VideoWriter(tmp_path / name, *SIZE, 16, fragmented=fragmented) as writer:
            writer.write(moving(0, 200, *SIZE))
    seen = page.evaluate(PLAY, ["ordinary.mp4", True])
    assert seen == {"seconds": 12.5, "width": 64, "event": "ended", "played": 12.5}
    assert page.evaluate(PLAY, ["fragmented.mp4", False])["seconds"] < 12, "what the ordinary kind is for"


def test_a_recording_is_followed_live(tmp_path: Path, moving: Any, page: Any, served: str) -> None:
    """A browser's own HLS: it opens a recording that grows and plays on into later segments; then it knows the end."""
    writer = SegmentedWriter(tmp_path / "r", *SIZE, 16, seconds=1)
    for number in range(4):
        writer.write(moving(16 * number, 16, *SIZE))
    if page.evaluate("document.createElement('video').canPlayType('application/vnd.apple.mpegurl')") == "":
        writer.close()
        pytest.skip("this Chromium plays no HLS")
    video = "document.querySelector('video')"
    page.evaluate(f"{{ const video = {video}; video.muted = true; video.src = 'r/video.m3u8'; video.play(); }}")
    number = 4
    while page.evaluate(f"{video}.currentTime") < 6 and number < 30:  # it was opened when there were 4 seconds
        writer.write(moving(16 * number, 16, *SIZE))
        page.wait_for_timeout(1000)  # as a stream makes one second each second
        number += 1
    assert page.evaluate(f"{video}.currentTime") >= 6
    assert page.evaluate(f"[{video}.duration, {video}.error]") == [math.inf, None], "no end is known"
    writer.close()
    page.goto(served)
    seen = page.evaluate(PLAY, ["r/video.m3u8", True])
    assert seen == {"seconds": number, "width": 64, "event": "ended", "played": number}
