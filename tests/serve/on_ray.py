"""Sessions on a real Ray cluster: what viewers see when actors, gateways and sessions end and come back.

``test_ray.py`` runs these in a network namespace of their own: Ray's processes listen on all addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import ray
from streaming import OTHER, PROMPT
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from echo_rt.cli.main import main
from echo_rt.client import Live
from echo_rt.errors import ConfigError, PromptError, SnapshotError
from echo_rt.serve.session import PLACES, ParkedError, Picture
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

FULL = "ECHO_RT_LONG_SERVE" in os.environ
LONG = 240.0  # seconds; only a deadlock takes that long
EVERY = 3  # blocks between two snapshots
SETTINGS = {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",  # most of them would do nothing but start
    "RAY_prestart_worker_first_driver": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until(true: Any) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def start_node(*options: str) -> subprocess.Popen[bytes]:
    """A process that runs a node of a cluster, which is up; the end of this namespace ends it."""
    words = [*options, "--block", "--disable-usage-stats", f"--object-store-memory={100 << 20}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
    for _ in range(5):
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert started.stdout is not None
        said = b""
        while b"--block" not in said and (line := started.stdout.readline()):
            said += line
        if b"--block" in said:
            threading.Thread(target=started.stdout.read, daemon=True).start()
            return started
        kill_node(started)
        assert b"timed out during startup" in said, said.decode()  # Ray gives it 30 s, which a busy machine exceeds
    raise AssertionError("a node does not start")


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of a node."""
    found = [node.pid]
    for pid in found:  # which grows
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait(LONG)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster, which this process is connected to."""
    from echo_rt.serve import cluster

    port = free_port()
    head = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={6 if FULL else 2}"]
    head += ["--resources", '{"seat": 1}', "--include-dashboard=false", f"--temp-dir={tmp_path_factory.mktemp('ray')}"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        node = start_node(*head)
        try:
            cluster.connect(f"127.0.0.1:{port}")
            yield f"127.0.0.1:{port}"
        finally:
            ray.shutdown()
            kill_node(node)


@pytest.fixture(scope="module")
def settings(address: str, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How sessions run: a fixture for tests that leave others' sessions alone."""
    from echo_rt.serve.cluster import Cluster

    options = {"checkpoint": small_model / CHECKPOINT_FILE, "device": "cpu", "dtype": "float32", "memory": None}
    storage = tmp_path_factory.mktemp("ray") / "storage"
    return Cluster(small_model, options, str(storage), EVERY, 600.0, {"num_cpus": 1})


@pytest.fixture(scope="module")
def port(settings: Any) -> Iterator[int]:
    """Where gateways serve."""
    from echo_rt.serve import cluster
    from echo_rt.serve.app import make_app
    from echo_rt.serve.guard import Rules

    port = free_port()

    def make() -> Any:
        return make_app(cluster.RaySessions(settings), Rules())

    cluster.deploy(make, host="127.0.0.1", port=port, gateways=2 if FULL else 1, most_requests=100)
    yield port
    if FULL:
        ray.serve.shutdown()


def kill(actors: list[Any]) -> None:
    for pid in ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in actors]):
        os.kill(pid, signal.SIGKILL)


def gateways() -> list[Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(**one) for one in named if one["name"].startswith("SERVE_REPLICA::echo-rt#gateway")]


def session_actor(name: str) -> Any:
    return ray.get_actor(name, "echo-rt")


class Watching(threading.Thread):
    """A viewer who takes H.264, and connects again where it was; ``seen``: numbers and times of pictures."""

    def __init__(self, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.address = f"ws://127.0.0.1:{port}/api/sessions/{name}/video?format=h264&after="
        self.seen: list[tuple[int, float]] = []
        self.frames: list[np.ndarray] = []
        self.again = -1
        self.over, self.error = False, None
        self.start()

    def run(self) -> None:
        decoder = av.CodecContext.create("h264", "r")
        after = 0
        while not self.over:
            try:
                with connect(self.address + str(after), compression=None, open_timeout=LONG) as socket:
                    self.again += 1
                    json.loads(socket.recv(LONG))
                    while not self.over:
                        message = socket.recv(LONG)
                        after = int.from_bytes(message[:8], "big")
                        self.seen.append((after // PLACES, time.monotonic()))
                        self.frames += [f.to_ndarray(format="rgb24") for f in decoder.decode(av.Packet(message[8:]))]
            except (ConnectionClosed, InvalidHandshake, OSError):
                time.sleep(0.05)

    def wait_for(self, number: int) -> None:
        until(lambda: self.seen and self.seen[-1][0] >= number)

    @property
    def gap(self) -> float:
        """The longest time between two pictures, in seconds."""
        return max(b - a for (_, a), (_, b) in pairwise(self.seen))

    def check(self, video: list[bytes]) -> None:
        """Every picture came once, and is that of the video."""
        numbers = [number for number, _ in self.seen]
        assert numbers == list(range(1, len(numbers) + 1)), "left out, or shown twice"
        expected = np.concatenate([np.frombuffer(block, np.uint8).reshape(-1, 32, 32, 3) for block in video])
        assert len(expected) >= len(self.frames) >= len(numbers) - 1
        for number, frame in enumerate(self.frames):
            errors = np.abs(expected.astype(np.int16) - frame).mean(axis=(1, 2, 3))
            assert errors.argmin() == number, f"picture {number + 1} is that of {errors.argmin() + 1}"


class Raw(threading.Thread):
    """A viewer who takes raw blocks, in this process."""

    def __init__(self, session: Any) -> None:
        super().__init__(daemon=True)
        self.session, self.blocks, self.over = session, list[tuple[int, bytes]](), False
        self.start()

    def run(self) -> None:
        async def take() -> None:
            after = 0
            while not self.over:
                if (block := await self.session.block(after)) is not None:
                    after = block.place
                    self.blocks.append((block.index, block.data))

        asyncio.run(take())

    def check(self, video: list[bytes], least: int) -> None:
        """Every block came once, more than ``least`` of them, and is that of the video."""
        indices = [index for index, _ in self.blocks]
        assert indices == list(range(len(indices))) and len(indices) > least
        differ = [index for index, data in self.blocks if data != video[index]]
        assert not differ, f"{differ} of {len(indices)} blocks are not those of an unbroken video"


def test_viewers_see_an_unbroken_video_when_an_actor_and_then_gateways_are_killed(
    port: int, settings: Any, small_model: Path
) -> None:
    from echo_rt.serve.cluster import RaySessions

    names = {"ann": 1, "bob": 2, "eve": 3} if FULL else {"ann": 1, "bob": 2}
    with Live(f"http://127.0.0.1:{port}", timeout=LONG) as live:
        for name, seed in names.items():
            answer = live._http.post("/api/sessions", json={"name": name, "prompt": PROMPT, "seed": seed})
            assert answer.status_code == 200, answer.text
    viewers = {name: Watching(port, name) for name in names}
    raw = Raw(asyncio.run(RaySessions(settings).find("ann")))
    for viewer in viewers.values():
        viewer.wait_for(9 + 12 * EVERY)
    stored = Path(settings.storage, "ann", "current")
    with Live(f"http://127.0.0.1:{port}", session="ann", timeout=LONG) as live:
        until(lambda: len(list(stored.glob("*.safetensors"))) == 2)  # that of the beginning, and one on the way
        asked = [live.prompt(OTHER)["block"], live.prompt("rain", over=2)["block"]]
    logged = [json.loads(path.read_text()) for path in sorted(stored.glob("prompt-*.json"))]
    assert [entry["block"] for entry in logged[-2:]] == asked

    connections = [viewer.again for viewer in viewers.values()]
    kill([session_actor("ann")])
    last = viewers["ann"].seen[-1][0]
    viewers["ann"].wait_for(last + 30 + 12 * (asked[-1] - raw.blocks[-1][0]))
    print(f"an actor killed: {viewers['ann'].gap:.2f} s without a picture, with the start of a process and its model")
    assert connections == [viewer.again for viewer in viewers.values()], "who watches need not connect again"

    raw.over = True  # with all gateways away nobody watches, and the video holds still
    raw.join(LONG)
    kill(gateways())
    until(lambda: all(viewer.again > before for viewer, before in zip(viewers.values(), connections, strict=True)))
    for viewer in viewers.values():
        viewer.wait_for(viewer.seen[-1][0] + 30)
    gaps = ", ".join(f"{viewer.gap:.2f}" for viewer in list(viewers.values())[1:])
    print(f"all gateways killed: {gaps} s without a picture")
    for viewer in viewers.values():
        viewer.over = True
    for viewer in viewers.values():
        viewer.join(LONG)
    for name, seed in names.items():
        switches = zip(asked, (OTHER, "rain"), strict=True) if name == "ann" else ()
        video = blended(small_model, viewers[name], seed, list(switches))
        viewers[name].check(video)
        if name == "ann":
            raw.check(video, asked[-1])


def blended(model: Path, viewer: Watching, seed: int, switches: list[tuple[int, str]]) -> list[bytes]:
    """The unbroken video that a viewer should have seen; the second of the prompts is reached in two blocks."""
    import torch
    from streaming import load, take

    torch.set_num_threads(int(SETTINGS["OMP_NUM_THREADS"]))  # a video's last bits depend on it
    with load(model) as runtime, runtime.stream(PROMPT, seed=seed) as stream:
        for over, (block, text) in enumerate(switches, 1):
            stream.set_prompt(text, block=block, over=over)
        return [chunk.frames.numpy().tobytes() for chunk in take(stream, viewer.seen[-1][0] // 12 + 2)]


def test_a_session_goes_on_on_another_node_when_its_own_dies(
    address: str, port: int, settings: Any, small_model: Path
) -> None:
    from echo_rt.serve.cluster import RaySessions

    room = ("--address", address, "--num-cpus=0", "--resources", '{"room": 1}', "--dashboard-agent-listen-port=0")
    in_room = dataclasses.replace(settings, resources={"num_cpus": 0, "resources": {"room": 1}})
    sessions = RaySessions(in_room)
    asyncio.run(sessions.create("moved", PROMPT, 4))
    first = start_node(*room)
    raw = Raw(asyncio.run(sessions.find("moved")))
    until(lambda: raw.blocks)
    viewer = Watching(port, "moved")
    viewer.wait_for(9 + 12 * EVERY)
    second = start_node(*room)
    home = node_of("moved")
    try:
        with Live(f"http://127.0.0.1:{port}", session="moved", timeout=LONG) as live:
            asked = [live.prompt(OTHER)["block"]]
        kill_node(first)
        last = viewer.seen[-1][0]
        viewer.wait_for(last + 30 + 12 * (asked[0] - raw.blocks[-1][0]))
        assert node_of("moved") != home
        print(f"a node killed: {viewer.gap:.2f} s without a picture, with Ray's own bounds for noticing it")
        raw.over = viewer.over = True
        raw.join(LONG)
        viewer.join(LONG)
        assert viewer.again == 0, "who watches need not connect again"
        video = blended(small_model, viewer, 4, list(zip(asked, (OTHER,), strict=True)))
        viewer.check(video)
        raw.check(video, asked[0])
    finally:
        asyncio.run(park(sessions, "moved"))
        kill_node(second)


def node_of(name: str) -> str:
    where = session_actor(name).__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
    return str(ray.get(where))


async def park(sessions: Any, name: str) -> None:
    await (await sessions.find(name)).close()


def test_a_paused_session_comes_back_paused_and_a_parked_one_stays_so_until_somebody_asks(port: int) -> None:
    with Live(f"http://127.0.0.1:{port}", session="still", timeout=LONG) as live:
        assert live._http.post("/api/sessions", json={"name": "still", "prompt": PROMPT}).status_code == 200
        viewers = [Watching(port, "still") for _ in range(4)]
        for viewer in viewers:
            viewer.wait_for(20)
        until(lambda: live.get("/figures")["viewers"] == 4)
        assert [live.get("/figures")["viewers"] for _ in range(10)] == [4] * 10, "those of all gateways"

        live.post("/pause", paused=True)
        kill([session_actor("still")])
        seen = set[str]()
        while (state := live.get("/figures")["state"]) != "paused" or not seen:
            seen.add(state)
        assert "playing" not in seen
        live.post("/pause", paused=False)

        events = live.events()
        assert next(events)["type"] == "hello"
        assert live._http.post("/api/sessions/still/park").json() == {"state": "parked"}
        assert next(event for event in events if event["type"] in ("parked", "failed"))["type"] == "parked"
        for _ in range(30):  # a viewer asks every second
            time.sleep(0.1)
            figures = live.get("/figures")
            assert figures["state"] == "parked" and figures["viewers"] <= 4
        last = viewers[0].seen[-1][0]
        assert live.get("/prompts")["prompts"][0]["text"] == PROMPT
        for viewer in viewers:
            viewer.wait_for(last + 20)
            viewer.over = True
        for viewer in viewers:
            viewer.join(LONG)
            numbers = [number for number, _ in viewer.seen]
            assert viewer.again == 0 and sorted(set(numbers)) == list(range(numbers[0], numbers[-1] + 1))
        assert live._http.post("/api/sessions/still/park").json() == {"state": "parked"}


def test_webrtc_goes_through_gateways_and_outlives_the_session_s_process(port: int) -> None:
    import aiortc

    def offer(sdp: str) -> str:
        with Live(f"http://127.0.0.1:{port}", session="phone", timeout=LONG) as live:
            return str(live.post("/offer", sdp=sdp)["sdp"])

    async def connected() -> tuple[Any, Any]:
        peer = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
        tracks: asyncio.Queue[Any] = asyncio.Queue()
        peer.on("track", tracks.put_nowait)
        peer.addTransceiver("video", direction="recvonly")
        await peer.setLocalDescription(await peer.createOffer())
        answer = await asyncio.to_thread(offer, peer.localDescription.sdp)
        await peer.setRemoteDescription(aiortc.RTCSessionDescription(answer, "answer"))
        return peer, await tracks.get()

    async def pictures(track: Any, count: int) -> None:
        seen = set()
        while len(seen) < count:
            seen.add((await asyncio.wait_for(track.recv(), LONG)).to_ndarray(format="rgb24").tobytes())

    async def trial() -> None:
        peer, track = await connected()
        await pictures(track, 10)
        await asyncio.to_thread(kill, [session_actor("phone")])
        await pictures(track, 60)  # more than were on the way
        await asyncio.to_thread(kill, gateways())
        again, another = await connected()  # as the page does, by the age of the last picture
        await pictures(another, 10)
        await asyncio.gather(peer.close(), again.close())

    with Live(f"http://127.0.0.1:{port}", timeout=LONG) as live:
        assert live._http.post("/api/sessions", json={"name": "phone", "prompt": PROMPT}).status_code == 200
        asyncio.run(trial())
        assert live._http.post("/api/sessions/phone/park").json() == {"state": "parked"}


class Reader:
    """A viewer without a gateway: takes a session's pictures until it has enough of them."""

    def __init__(self, session: Any) -> None:
        self.session, self.after, self.numbers = session, 0, list[int]()

    async def read(self, pictures: int, *, shown: int = 0) -> None:
        """Take as many more; each is the next one, the first of all the one after ``shown``."""
        begin = len(self.numbers)
        while len(self.numbers) < begin + pictures:
            try:
                items = await self.session.next(self.after)
            except ParkedError:  # a later call brings it back
                await asyncio.sleep(0.05)
                continue
            for place, item in items:
                self.after = place
                if isinstance(item, Picture):
                    self.numbers.append(place // PLACES)
        first = max(shown, self.numbers[begin - 1] if begin else 0) + 1
        assert self.numbers[begin:] == list(range(first, first + len(self.numbers) - begin))


def shown_by(settings: Any, name: str) -> int:
    """The number of the last picture that a parked session has shown."""
    newest = max(Path(settings.storage, name, "current").glob("*-block-*.json"))
    return int(json.loads(newest.read_text())["shown"])


async def state_of(session: Any) -> str:
    return (await session.ask("figures"))["state"]


def test_who_finds_no_machine_waits_and_parked_sessions_come_back(settings: Any) -> None:
    from echo_rt.serve.cluster import RaySessions

    one_seat = dataclasses.replace(settings, resources={"num_cpus": 0, "resources": {"seat": 1}})

    async def trial() -> None:
        sessions = RaySessions(one_seat)
        await sessions.create("first", PROMPT)
        await sessions.create("second", PROMPT, seed=5)
        first, second = [Reader(await sessions.find(name)) for name in ("first", "second")]
        assert await state_of(first.session) == "parked", "nobody has watched it"
        await first.read(20)
        asked = await first.session.ask("prompt", text=OTHER)
        waiting = asyncio.ensure_future(second.read(5))
        while await state_of(second.session) != "waiting":
            await asyncio.sleep(0.05)
        await first.read(20)
        assert not waiting.done() and await state_of(first.session) == "playing"
        await first.session.close()
        await waiting  # there is a seat now
        assert await state_of(first.session) == "parked" and await state_of(second.session) == "playing"

        again = asyncio.ensure_future(Reader(await RaySessions(one_seat).find("first")).session.ask("prompts"))
        await second.session.close()
        assert (await again)["prompts"][-1] == {**asked_entry(asked), "asked": asked["asked"]}
        # With the very next picture, or again with those that this viewer has missed.
        await first.read(30, shown=min(first.numbers[-1], shown_by(settings, "first")))
        await first.session.close()
        assert {"first", "second"} <= set(await sessions.names())

    asyncio.run(trial())


def asked_entry(answer: dict[str, Any]) -> dict[str, Any]:
    """What the list of prompts has of the answer to one."""
    return {key: answer[key] for key in ("text", "block", "over")}


def test_a_session_that_nobody_watches_holds_still_and_is_parked(settings: Any) -> None:
    from echo_rt.serve.cluster import RaySessions

    async def trial() -> None:
        sessions = RaySessions(dataclasses.replace(settings, idle_seconds=4.0))
        await sessions.create("idle", PROMPT)
        reader = Reader(await sessions.find("idle"))
        await reader.read(10)
        await reader.session.ask("pause", paused=True)
        begin = time.monotonic()
        while time.monotonic() < begin + 8.0:  # a viewer who is connected is enough, even if nothing moves
            await reader.session.next(None)
        assert await state_of(reader.session) == "paused"
        await reader.session.ask("pause", paused=False)
        seen = set[str]()
        while (state := await state_of(reader.session)) != "parked":
            seen.add(state)
            await asyncio.sleep(0.05)
        assert "unwatched" in seen
        await reader.session.close()  # which waits until it is stored
        await reader.read(10)  # with the very next picture, though more were shown before anyone knew that it had left
        await reader.session.close()

    asyncio.run(trial())


def test_what_a_session_may_not_be(settings: Any, tmp_path: Path) -> None:
    from echo_rt.serve.cluster import RaySessions

    async def trial() -> None:
        sessions = RaySessions(dataclasses.replace(settings, storage=str(tmp_path / "other")))
        for name in ("", "A", "a/b", "..", "-a", "a" * 41):
            with pytest.raises(ConfigError, match="name: expected"):
                await sessions.create(name, PROMPT)
            assert await sessions.find(name) is None
        with pytest.raises(PromptError, match="expected a prompt"):
            await sessions.create("a", " ")
        with pytest.raises(ConfigError, match="memory must be one of"):
            await sessions.create("a", PROMPT, memory="huge")
        assert await sessions.names() == []
        await sessions.create("a", PROMPT)
        with pytest.raises(ConfigError, match="that no session has"):
            await sessions.create("a", PROMPT)
        session = await sessions.find("a")
        assert session is not None
        with pytest.raises(SnapshotError, match="expected the name of a snapshot"):  # an actor's error is the caller's
            await session.ask("resume", snapshot="none")
        await session.close()

    asyncio.run(trial())


def test_figures_of_all_sessions_are_for_prometheus(port: int) -> None:
    with Live(f"http://127.0.0.1:{port}", timeout=LONG) as live:
        name = {"name": "measured", "prompt": PROMPT}
        assert live._http.post("/api/sessions", json=name).status_code == 200
        assert live._http.post("/api/sessions", json=name).status_code == 422
        listed = {one["name"]: one["figures"] for one in live._http.get("/api/sessions").json()}
        assert listed["measured"]["state"] == "parked"
        assert 'echo_rt_live_is_parked{session="measured"} 1.0' in live._http.get("/metrics").text
        watching = Watching(port, "measured")
        watching.wait_for(5)
        said = live._http.get("/metrics").text
        assert 'echo_rt_live_is_playing{session="measured"} 1.0' in said
        assert re.search(r'echo_rt_live_fps\{session="measured"\} \d', said)
        assert live._http.get("/readyz").status_code == 200
        watching.over = True
        watching.join(LONG)
        assert live._http.post("/api/sessions/measured/park").json() == {"state": "parked"}


def test_the_command_serves_the_page_and_parks_what_runs(
    address: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Relative paths: sessions have working folders of their own.
    here, storage = small_model.parent, os.path.relpath(tmp_path / "storage", small_model.parent)
    files = ["--model", small_model.name, "--checkpoint", f"{small_model.name}/{CHECKPOINT_FILE}", "--device", "cpu"]
    place = ["--ray", address, "--storage", storage, "--port", str(free_port())]
    command = [sys.executable, "-m", "echo_rt", "serve", *files, *place, "--prompt", PROMPT]
    for first in (1, 0):
        started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ, cwd=here)
        assert started.stdout is not None
        found = re.match(r"serving at (http://\S+)", started.stdout.readline())
        assert found is not None
        with Live(found[1], timeout=LONG) as live:
            assert b"<video" in live._http.get("/").content
            assert next(live.frames()).shape == (32, 32, 3)
            prompts = live.get("/prompts")["prompts"]
            assert [entry["text"] for entry in prompts] == ([PROMPT] if first else [PROMPT, OTHER])
            if first:
                live.prompt(OTHER)
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=LONG)
        assert started.returncode == 128 + signal.SIGTERM
        assert "main" not in ray.util.list_named_actors()
    monkeypatch.chdir(here)
    assert main([*command[3:], "--ray", "127.0.0.1:1"]) == 2
