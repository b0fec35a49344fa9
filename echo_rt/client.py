"""A client of ``echo-rt serve``, shown in use in docs/serve.md; needs ``pip install 'echo-rt[client]'``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from echo_rt.errors import StreamError
from echo_rt.output.video import load_av
from echo_rt.utils.atomic_file import Closing, whole_file
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.wording import first_line, printable

_MOST_MESSAGE = 16 << 20  # bytes


class Live(Closing):
    """A session of a server; what the server refuses is a :class:`StreamError` with its reason.

    Args:
        address: of the server, such as ``http://127.0.0.1:8000``.
        token: the server's, if it has one.
        session: its name.
        timeout: seconds for any answer, and between two frames.
    """

    def __init__(self, address: str, *, token: str | None = None, session: str = "main", timeout: float = 60.0) -> None:
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout, self._root = timeout, f"/api/sessions/{session}"
        self._http = httpx.Client(base_url=address, headers=self._headers, timeout=timeout)
        self._sockets = address.rstrip("/").replace("http", "ws", 1) + self._root

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def prompt(self, text: str, over: int | None = None) -> dict[str, Any]:
        """Switch to another prompt, blended in ``over`` blocks; returns its ``block`` and ``shows_in`` seconds."""
        return self.post("/prompts", text=text, over=over)

    def get(self, path: str) -> dict[str, Any]:
        """Get ``/figures``, ``/prompts``, ``/snapshots`` or ``/recordings``, or what the session is: an empty path."""
        return self._ask("GET", path)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Post a command, such as ``post("/restart", seed=7)``; the server's ``/docs`` lists them."""
        return self._ask("POST", path, body)

    def download(self, recording: str, path: str | Path) -> None:
        """Write a recording to ``path``, whole or not at all."""
        with self._http.stream("GET", f"{self._root}/recordings/{recording}") as answer, whole_file(path) as part:
            _check(answer)
            for data in answer.iter_bytes():
                part.append(data)

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Connect, and yield frames as they are shown, uint8 ``[height, width, 3]`` RGB; who is slow misses some."""
        av = load_av()
        decoder = av.CodecContext.create("h264", "r")
        for data in self._messages("/video?format=h264"):
            if isinstance(data, bytes):
                try:
                    frames = decoder.decode(av.Packet(data))
                except av.FFmpegError as error:
                    raise StreamError(f"the server's pictures cannot be decoded: {first_line(error)}") from None
                yield from (frame.to_ndarray(format="rgb24") for frame in frames)

    def events(self) -> Iterator[dict[str, Any]]:
        """Connect, and yield what happens; first a ``hello``, then blocks that are shown, prompts, ..."""
        return (read_json(text, dict[str, Any], "an event", StreamError) for text in self._messages("/events"))

    def _messages(self, path: str) -> Iterator[str | bytes]:
        options: dict[str, Any] = {"max_size": _MOST_MESSAGE, "compression": None, "open_timeout": self._timeout}
        try:
            with connect(self._sockets + path, additional_headers=self._headers, **options) as socket:
                while True:
                    yield socket.recv(self._timeout)
        except (ConnectionClosed, InvalidHandshake, OSError) as end:  # or nothing came in time
            raise StreamError(f"the server cannot be reached, or sends no more: {end}") from None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, self._root + path, json=body or None)
        except (httpx.TransportError, RuntimeError) as error:  # the latter after close()
            raise StreamError(f"the server cannot be reached: {error}") from None
        _check(answer)
        return read_json(answer.content, dict[str, Any], "the server's answer", StreamError)


def _check(answer: httpx.Response) -> None:
    if answer.is_error:
        answer.read()
        raise StreamError(f"the server answers {answer.status_code}: {printable(answer.text[:500])}")
