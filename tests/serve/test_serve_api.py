"""What the server shows, takes and tells, on the smallest model, without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from serving import LONG, Served, connect, plain, served, until
from streaming import OTHER, PROMPT
from websockets.exceptions import ConnectionClosed

import echo_rt
from echo_rt.errors import NumericalError, StreamError
from echo_rt.serve import screen
from echo_rt.serve.app import PAGE
from echo_rt.serve.session import PLACES
from echo_rt.weights.folder import DEMO_FOLDER

REALTIME = "ws://127.0.0.1:{}/v1/realtime_video/generate"


def shown(server: Served, blocks: int, *, first: int) -> dict[int, bytes]:
    """The frames of blocks that are shown, by their number."""
    found: dict[int, bytes] = {}
    after = 0
    while len(found) < blocks:
        with ThreadPoolExecutor(1) as thread:  # that of a browser's driver has a loop already
            block = thread.submit(asyncio.run, server.session.block(after)).result()
        if block is not None:
            after = block.place
            if block.index >= first:
                found[block.index] = block.data
    return found


# ---------------------------------------------------------------- the page


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and b"<video" in page and "default-src 'self'" in headers["content-security-policy"]
    for file in PAGE.iterdir():
        status, _, data = server.ask("GET", f"/page/{file.name}")
        assert status == 200 and data == file.read_bytes()
        elsewhere = re.findall(r"https?://[^\s\"']+", data.decode())
        assert elsewhere in ([], ["http://www.w3.org/2000/svg"]), file.name
    named = re.findall(r'(?:href|src)="(/[^"#]*)', page.decode())
    assert named and all(server.ask("GET", path)[0] == 200 for path in named), named
    assert server.ask("GET", "/page/../app.py")[0] == 404


def test_the_api_describes_itself(server: Served) -> None:
    api = json.loads(server.ask("GET", "/openapi.json")[2])
    assert {"/api/sessions/{name}/prompts", "/api/sessions/{name}/restart", "/metrics"} <= set(api["paths"])
    assert server.ask("GET", "/docs")[0] == 200
    about = server.live.get("")
    assert about["size"] == [32, 32] and about["codec"].startswith("avc1.42")


# ---------------------------------------------------------------- prompts


def test_a_prompt_shows_at_the_announced_block(small_model: Path, tmp_path: Path) -> None:
    with served(small_model, tmp_path / "out") as server:
        taken = server.live.prompt(OTHER)
        blocks = shown(server, 3, first=taken["block"] - 1)
    last = max(blocks)
    with_switch, without = plain(small_model, last + 1, (taken["block"], OTHER)), plain(small_model, last + 1)
    assert all(frames == with_switch[index] for index, frames in blocks.items())
    assert [index for index in blocks if blocks[index] != without[index]] == [i for i in blocks if i >= taken["block"]]


def test_prompts_are_listed_and_told(server: Served) -> None:
    events = server.live.events()
    assert next(events)["type"] == "hello"
    taken = server.live.prompt("  rain\nand wind ", over=2)
    assert taken["text"] == "rain\nand wind" and taken["shows_in"] >= 0
    assert server.live.get("/prompts")["prompts"][-1]["block"] == taken["block"]
    said = next(event for event in events if event["type"] == "prompt")
    assert said["block"] == taken["block"] and said["over"] == 2
    begun = next(event for event in events if event["type"] == "block" and event["prompt"] is not None)
    assert (begun["block"], begun["prompt"]) == (taken["block"], "rain\nand wind")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/prompts", b'{"text": ""}'),
        ("/prompts", b'{"text": " \\n "}'),
        ("/prompts", b'{"text": "bell \\u0007"}'),
        ("/prompts", b'{"text": "half \\ud800"}'),
        ("/prompts", json.dumps({"text": "x" * 2001}).encode()),
        ("/prompts", b'{"text": 7}'),
        ("/prompts", b'{"text": "a fox", "over": 0}'),
        ("/prompts", b'{"text": "a fox", "colour": 1}'),
        ("/prompts", json.dumps({"text": "a fox", "\n" * 3000: 1}).encode()),
        ("/prompts", b'{"text": "a fox", "\\ud800": 1}'),
        ("/prompts", b"{}"),
        ("/prompts", b"\xff\xfe"),
        ("/prompts", b"[" * 20000),
        ("/restart", b'{"seed": -1}'),
        ("/restart", b'{"seed": 18446744073709551616}'),
        ("/restart", b'{"seed": 1.5}'),
        ("/restart", b'{"seed": 1, "memory": "huge"}'),
        ("/restart", b'{"seed": 1, "prompt": ""}'),
        ("/resume", b'{"snapshot": "../../etc/passwd"}'),
        ("/offer", b'{"sdp": "v=0"}'),
        ("/offer", b'{"sdp": ""}'),
    ],
)
def test_what_cannot_be_taken_is_422_and_changes_nothing(server: Served, path: str, body: bytes) -> None:
    before = server.live.get("/prompts")["prompts"]
    status, _, answer = server.ask("POST", f"/api/sessions/main{path}", body, Content_Type="application/json")
    assert status == 422, answer
    detail = json.loads(answer)["detail"]
    assert isinstance(detail, str) and len(detail) < 500 and detail.isprintable()
    assert server.live.get("/prompts")["prompts"] == before


def test_names_that_are_not_there(server: Served) -> None:
    assert server.ask("GET", "/api/sessions/other")[0] == 404
    assert server.ask("GET", "/api/sessions/main/recordings/%2e%2e%2fa.mp4")[0] in (404, 422)
    with pytest.raises(StreamError, match=r"422: .*expected the name of a recording"):
        server.live.download("20200101-000000000.mp4", Path("nowhere.mp4"))
    assert not Path("nowhere.mp4").exists()


# ---------------------------------------------------------------- pictures


def test_mp4_over_a_websocket_plays_from_the_first_message_on(server: Served) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/api/sessions/main/video", compression=None) as viewer:
        about = json.loads(viewer.recv(60))
        file = b"".join(bytes(viewer.recv(60)) for _ in range(20))  # the header, and a picture each
    assert about["codec"].startswith("avc1.") and about["fps"] == server.live.get("")["fps"]
    with av.open(io.BytesIO(file)) as video:
        frames = list(video.decode(video=0))
    assert len(frames) >= 18 and frames[0].key_frame and (frames[0].width, frames[0].height) == (32, 32)
    times = [frame.time for frame in frames]
    assert times == sorted(set(times)) and about["epoch"] + times[0] > 0


def test_the_client_sees_what_is_shown(small_model: Path, tmp_path: Path) -> None:
    expected = plain(small_model, 4)
    video = np.concatenate([np.frombuffer(block, np.uint8).reshape(-1, 32, 32, 3) for block in expected])
    with served(small_model, tmp_path / "out") as server:
        for number, frame in enumerate(server.live.frames()):
            errors = np.abs(video.astype(np.int16) - frame).mean(axis=(1, 2, 3))
            nearest, second = np.partition(errors, 1)[:2]  # the encoder loses much of frames that are noise
            assert nearest < 0.7 * second, "no such frame is in the video"
            if number == 5:
                break


def test_a_viewer_goes_on_where_it_was(server: Served) -> None:
    address = f"ws://127.0.0.1:{server.port}/api/sessions/main/video?format=h264&after="
    decoder, numbers, after = av.CodecContext.create("h264", "r"), [], -1
    for _ in range(3):
        with connect(address + str(after), compression=None) as viewer:
            assert json.loads(viewer.recv(60))["codec"].startswith("avc1.")
            for _ in range(8):
                message = bytes(viewer.recv(60))
                after = int.from_bytes(message[:8], "big")
                numbers.append(after // PLACES)
                assert len(decoder.decode(av.Packet(message[8:]))) <= 1
    assert numbers[8:] == list(range(numbers[8], numbers[8] + 16)) and numbers[8] == numbers[7] + 1


def test_one_session_is_all_that_a_server_without_a_cluster_has(server: Served) -> None:
    status, _, answer = server.ask(
        "POST", "/api/sessions", '{"name": "a", "prompt": "b"}', Content_Type="application/json"
    )
    assert status == 422 and b"more need a cluster" in answer
    assert server.post("/park")[0] == 422
    (listed,) = json.loads(server.ask("GET", "/api/sessions")[2])
    assert listed["name"] == "main" and listed["size"] == [32, 32] and listed["figures"]["viewers"] == 0


def test_more_viewers_than_allowed_are_refused(small_model: Path, tmp_path: Path) -> None:
    with served(small_model, tmp_path / "out", most_viewers=2) as server:
        address = f"ws://127.0.0.1:{server.port}/api/sessions/main/video"
        with connect(address) as one, connect(address) as two, connect(address) as three:
            assert all(viewer.recv(60) and viewer.recv(60) for viewer in (one, two))
            with pytest.raises(ConnectionClosed) as refused:
                three.recv(60)
            assert refused.value.rcvd is not None and refused.value.rcvd.code == 1013
            assert "2 viewers" in refused.value.rcvd.reason and server.live.get("/figures")["viewers"] == 2
        until(lambda: server.live.get("/figures")["viewers"] == 0)
        with connect(address) as again:
            assert again.recv(60) and again.recv(60)


# ---------------------------------------------------------------- the video


def test_pause_holds_the_picture_for_all(server: Served) -> None:
    server.wait_block(0)
    events = server.live.events()
    assert next(events)["type"] == "hello"
    server.live.post("/pause", paused=True)
    assert next(event["type"] for event in events if event["type"] in ("paused", "playing")) == "paused"
    assert server.live.get("/figures")["state"] == "paused" and server.ask("GET", "/readyz")[0] == 200
    at = server.live.get("/figures")["block"]
    with connect(f"ws://127.0.0.1:{server.port}/api/sessions/main/video", compression=None) as late:
        # Of more pictures than two blocks have.
        assert all(late.recv(60) for _ in range(40)), "who comes now sees nothing"
    assert server.live.get("/figures")["block"] <= at + 1, "the block that was on its way is the last"
    server.live.post("/pause", paused=False)
    server.wait_block(at + 2)


def test_restart_with_a_seed_and_another_memory(small_model: Path, tmp_path: Path) -> None:
    with served(small_model, tmp_path / "out") as server:
        server.wait_block(2)
        answer = server.live.post("/restart", seed=2**64 - 1, prompt=OTHER)
        assert answer["prompt"] == OTHER and answer["memory"] == "evolve"
        blocks = shown(server, 2, first=0)
        video = plain(small_model, max(blocks) + 1, seed=2**64 - 1, prompt=OTHER)
        assert all(frames == video[index] for index, frames in blocks.items())
        assert server.live.post("/restart", seed=0, memory="off")["memory"] == "off"
        server.wait_block(4)
        figures = server.live.get("/figures")
        assert figures["memory"] == "off" and figures["memory_norm"] is None
        assert server.live.get("/prompts")["prompts"][0]["text"] == OTHER


def test_a_snapshot_goes_on_bit_for_bit(small_model: Path, tmp_path: Path) -> None:
    with served(small_model, tmp_path / "out") as server:
        first = server.live.prompt(OTHER)["block"]
        server.wait_block(first)
        name = server.live.post("/snapshots")["name"]
        (listed,) = server.live.get("/snapshots")["snapshots"]
        assert listed["name"] == name and listed["bytes"] > 0
        server.live.post("/restart", seed=5)
        assert server.live.post("/resume", snapshot=name)["block"] == listed["block"]
        blocks = shown(server, 2, first=listed["block"])
        assert [entry["text"] for entry in server.live.get("/prompts")["prompts"]] == [PROMPT, OTHER]
    video = plain(small_model, max(blocks) + 1, (first, OTHER))
    assert all(frames == video[index] for index, frames in blocks.items())
    with served(small_model, tmp_path / "out", resume=True) as server:  # what the end of the first one wrote
        assert server.session.resumed is not None and server.session.resumed != name
        blocks = shown(server, 2, first=0)
        assert server.live.get("/prompts")["prompts"][-1]["text"] == OTHER
    video = plain(small_model, max(blocks) + 1, (first, OTHER))
    assert all(frames == video[index] for index, frames in blocks.items())


def test_a_recording_is_an_ordinary_mp4(server: Served, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"422: .*no recording is running"):
        server.live.post("/recordings/stop")
    server.wait_block(0)
    name = server.live.post("/recordings")["name"]
    with pytest.raises(StreamError, match=r"422: .*a recording is running"):
        server.live.post("/recordings")
    server.wait_block(server.live.get("/figures")["block"] + 4)  # a recording begins amid a block, and lags behind it
    assert server.live.get("/figures")["recording"] == name and not server.live.get("/recordings")["recordings"]
    stopped = server.live.post("/recordings/stop")
    server.live.download(name, tmp_path / "seen.mp4")
    boxes, data = [], (tmp_path / "seen.mp4").read_bytes()
    while data:
        size = int.from_bytes(data[:4], "big")
        boxes.append(data[4:8])
        data = data[size:]
    assert b"moov" in boxes and b"moof" not in boxes, boxes
    with av.open(str(tmp_path / "seen.mp4")) as video:
        frames = list(video.decode(video=0))
        assert len(frames) == stopped["frames"] == video.streams.video[0].frames >= 12
        assert float(video.streams.video[0].average_rate) == server.live.get("")["fps"]


def test_a_video_that_fails_is_told_and_can_begin_again(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(small_model, tmp_path / "out") as server:
        server.wait_block(1)
        events = server.live.events()
        assert next(events)["type"] == "hello"
        with monkeypatch.context() as patch:

            def lost(stream: echo_rt.Stream, *given: Any) -> None:
                if stream is server.session._stream:  # and not that of the server which the other tests share
                    raise NumericalError("block 7: NaN in the latents")
                make(stream, *given)

            make = echo_rt.Stream._make
            patch.setattr(echo_rt.Stream, "_make", lost)
            said = next(event for event in events if event["type"] == "failed")
            assert said["error"] == "block 7: NaN in the latents"
            status, _, answer = server.ask("GET", "/readyz")
            assert status == 503 and json.loads(answer) == {"main": "failed"}
            assert server.ask("GET", "/healthz")[0] == 200
        server.live.post("/restart", seed=1)
        assert next(event for event in events if event["type"] == "block")["block"] == 0
        assert server.ask("GET", "/readyz")[0] == 200


def test_a_session_that_ends_amid_a_restart_lets_it_end_first(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(small_model, tmp_path / "out") as server:
        session, begun, go = server.session, threading.Event(), threading.Event()
        stream = session._runtime.stream

        def slow(*given: Any, **options: Any) -> echo_rt.Stream:
            begun.set()
            assert go.wait(LONG)
            return stream(*given, **options)

        monkeypatch.setattr(session._runtime, "stream", slow)
        answers: list[int] = []
        restart = threading.Thread(target=lambda: answers.append(server.post("/restart", seed=2)[0]))
        restart.start()
        assert begun.wait(LONG)
        end = threading.Thread(target=lambda: asyncio.run(session.close()))
        end.start()
        until(lambda: session._closed)
        go.set()
        for thread in (restart, end):
            thread.join(LONG)
        assert answers == [200] and session._stream.seed == 2 and session.problem is None


def test_every_metric_says_what_it_is(server: Served) -> None:
    """Not its name once more."""
    server.wait_block(1)
    for line in server.ask("GET", "/metrics")[2].decode().splitlines():
        if line.startswith("# HELP echo_rt_live_"):
            name, _, meaning = line.removeprefix("# HELP echo_rt_live_").partition(" ")
            assert meaning != name.replace("_", " ") and (" while " in meaning) == name.startswith("is_"), line


def test_metrics_are_for_prometheus(server: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.wait_block(4)  # by then the memory has been updated
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(server.ask("GET", "/metrics")[2].decode())
        for sample in family.samples
    }
    assert found["echo_rt_live_block"] >= 0 and found["echo_rt_live_fps"] > 0 and found["echo_rt_live_viewers"] == 0
    assert found["echo_rt_live_memory_norm"] > 0


def test_clocks_can_be_compared(server: Served) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/api/sessions/main/events") as events:
        events.send('{"ping": 12.5}')
        pong = next(said for said in map(json.loads, events) if "pong" in said)
    assert pong["pong"] == 12.5 and abs(pong["now"] - server.live.get("")["epoch"]) < 3600


def test_the_lines_of_the_docs(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}"), {})
    said = capsys.readouterr().out
    assert "'block': " in said and "(32, 32, 3)" in said


def test_a_model_of_no_recipe_goes_by_its_name(tmp_path: Path) -> None:
    with served(DEMO_FOLDER, tmp_path / "out") as server:
        assert server.live.get("")["model"] == DEMO_FOLDER.name


# ---------------------------------------------------------------- as SGLang's


def test_a_client_of_sglang_gets_raw_blocks(small_model: Path, tmp_path: Path) -> None:
    init = {"type": "init", "prompt": OTHER, "seed": 3, "size": "32x32", "fps": 16, "max_chunks": 2, "num_frames": 9}
    with served(small_model, tmp_path / "out") as server, connect(REALTIME.format(server.port)) as client:
        assert json.loads(server.ask("GET", "/v1/models")[2])["data"][0]["id"] == server.live.get("")["model"]
        client.send(msgspec.msgpack.encode(init))
        seen = {}
        for _ in range(2):
            header = msgspec.msgpack.decode(client.recv(60))
            data = client.recv(60)
            stats = msgspec.msgpack.decode(client.recv(60))
            assert header["type"] == "frame_batch_header" and header["content_type"] == "application/x-raw-rgb"
            assert len(data) == header["num_frames"] * header["bytes_per_frame"]
            assert stats["type"] == "chunk_stats" and stats["chunk_index"] == header["chunk_index"]
            seen[header["chunk_index"]] = data
        with pytest.raises(ConnectionClosed):  # after max_chunks
            client.recv(60)
    video = plain(small_model, max(seen) + 1, seed=3, prompt=OTHER)
    assert all(data == video[index] for index, data in seen.items())


def test_a_client_of_sglang_changes_the_prompt_and_is_alone(server: Served) -> None:
    with connect(REALTIME.format(server.port)) as client, connect(REALTIME.format(server.port)) as other:
        client.send(msgspec.msgpack.encode({"type": "init", "prompt": PROMPT}))
        told = (message for message in client if len(message) < 1000)
        assert msgspec.msgpack.decode(next(told))["type"] == "frame_batch_header"
        assert msgspec.msgpack.decode(other.recv(60))["content"].startswith("another client has the session")
        client.send(msgspec.msgpack.encode({"type": "event", "kind": "camera", "payload": ["w"]}))
        client.send(msgspec.msgpack.encode({"type": "event", "kind": "prompt", "payload": OTHER, "event_id": 9}))
        answers = [
            said for said in map(msgspec.msgpack.decode, _take(told, "event_ack")) if "chunk" not in said["type"]
        ]
        kinds = [said["type"] for said in answers if said["type"] != "frame_batch_header"]
        assert kinds == ["error", "event_ack"] and answers[-1]["event_id"] == 9


def _take(messages: Any, last: str) -> list[bytes]:
    taken = []
    for message in messages:
        taken.append(message)
        if msgspec.msgpack.decode(message)["type"] == last:
            return taken
    raise AssertionError(f"no {last}")


@pytest.mark.parametrize(
    ("first", "error"),
    [
        ({"type": "init", "prompt": ""}, "expected a prompt"),
        ({"type": "init", "prompt": "x", "size": "832x480"}, "size: expected 32x32"),
        ({"type": "init", "prompt": "x", "realtime_output_format": "webp"}, "expected raw"),
        ({"type": "init"}, "missing required field `prompt`"),
        ({"type": "start", "prompt": "x"}, "Invalid value 'start'"),
        (None, "MessagePack data is malformed"),
    ],
)
def test_a_wrong_first_message_is_told(server: Served, first: dict[str, str] | None, error: str) -> None:
    def answer() -> dict[str, str]:
        with connect(REALTIME.format(server.port)) as client:
            with contextlib.suppress(ConnectionClosed):
                client.send(b"\xc1\xc1" if first is None else msgspec.msgpack.encode(first))
            said: dict[str, str] = msgspec.msgpack.decode(client.recv(60))
            return said

    while "another client has the session" in (said := answer())["content"]:
        pass  # the client of another test is still leaving
    assert said["type"] == "error" and error in said["content"], said


def test_waits_in_which_nothing_comes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_NEWS_SECONDS", 1e-3)
    one = screen.Screen((32, 32), 16, 1.0, leased=False, shown=0, epoch=0.0)

    async def wait() -> None:
        for _ in range(50):
            assert await one.next(None) == []

    asyncio.run(wait())
    assert len(one._news._done_callbacks) <= 1  # type: ignore[attr-defined]
