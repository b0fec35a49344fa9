"""Sessions that survive their process, without Ray: what one leaves in its store at any moment is what the next has."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import av
import fsspec
import pytest
from serving import plain, served
from streaming import OTHER, PROMPT, load

from echo_rt.errors import OutputError
from echo_rt.serve import screen as screen_module
from echo_rt.serve.live import LiveSession
from echo_rt.serve.session import PLACES, Picture
from echo_rt.serve.viewers import Channel

EVERY = 2  # blocks between two snapshots


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}"


@contextlib.asynccontextmanager
async def session(model: Path, place: str, prompt: str = PROMPT) -> AsyncIterator[LiveSession]:
    def runtime(memory: str | None, like: Any) -> Any:
        return load(model, memory=memory, like=like)

    found = await asyncio.to_thread(lambda: LiveSession(runtime, place, prompt, resume=True, every=EVERY))
    await found.start()
    try:
        yield found
    finally:
        await found.close()
        assert found.problem is None


def killed(store: str) -> str:
    """What a process that is killed now leaves of the session ``a``, as session ``b``."""
    fs, root = fsspec.core.url_to_fs(store)
    fs.copy(f"{root}/a/", f"{root}/b/", recursive=True)
    return f"{store}/b"


class Viewer:
    """Takes pictures and raw blocks; each comes once."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.numbers, self.blocks = after, list[int](), dict[int, bytes]()
        self.block, self.first = after, list[Picture]()

    async def take(self, session: LiveSession, until: Callable[[], bool]) -> None:
        await asyncio.gather(self._pictures(session, until), self._blocks(session, until))

    async def _pictures(self, session: LiveSession, until: Callable[[], bool]) -> None:
        while not until():
            for place, item in await session.next(self.after):
                self.after = place
                if isinstance(item, Picture):
                    assert not self.numbers or place // PLACES == self.numbers[-1] + 1, "left out, or shown twice"
                    self.numbers.append(place // PLACES)
                    self.first = self.first or [item]

    async def _blocks(self, session: LiveSession, until: Callable[[], bool]) -> None:
        while not until():
            if (block := await session.block(self.block)) is not None:
                assert block.index not in self.blocks, "shown twice"
                self.block, self.blocks[block.index] = block.place, block.data


def check(viewer: Viewer, video: list[bytes]) -> None:
    assert all(viewer.blocks[index] == video[index] for index in viewer.blocks)
    assert list(viewer.blocks) == list(range(min(viewer.blocks), max(viewer.blocks) + 1))


async def stored(store: str, blocks: int) -> None:
    """Return once a snapshot is stored that was taken when that many blocks, of 9 and 12 pictures, were shown."""
    fs, root = fsspec.core.url_to_fs(f"{store}/a/current")
    shown = 0
    while shown < 9 + 12 * (blocks - 1):
        fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):  # it was one too many, meanwhile
            shown = max(json.loads(fs.cat_file(path))["shown"] for path in fs.glob(f"{root}/*-block-*.json"))
        await asyncio.sleep(0.01)


def test_another_process_goes_on_with_the_very_next_picture(store: str, small_model: Path) -> None:
    async def trial() -> tuple[Viewer, list[tuple[int, str]]]:
        viewer = Viewer()
        async with session(small_model, f"{store}/a") as first:
            await asyncio.gather(viewer.take(first, lambda: 4 in viewer.blocks), stored(store, 2))
            asked = (await first.ask("prompt", text=OTHER))["block"]
            await asyncio.to_thread(first._secure_on_the_way)  # amid a block that viewers do not have yet
            asked_later = (await first.ask("prompt", text="rain"))["block"]
            place = killed(store)
        late = Viewer(viewer.after - 5 * PLACES)  # of a gateway that had less of it
        late.block, viewer.first = viewer.block, []
        async with session(small_model, place, "not begun again") as second:
            prompts = (await second.ask("prompts"))["prompts"]
            expected = [(PROMPT, 0), (OTHER, asked), ("rain", asked_later)]
            assert [(entry["text"], entry["block"]) for entry in prompts] == expected
            seen = viewer.after // PLACES
            takers = [one.take(second, lambda: asked_later + 1 in viewer.blocks) for one in (viewer, late)]
            await asyncio.gather(*takers)
            shown = [place // PLACES for place, item in second._screen._items if isinstance(item, Picture)]
        assert late.numbers[0] == seen - 4 and (len(shown) > 200 or shown[0] == seen - 4), "shown again"
        assert viewer.first[0].key and late.first[0].key, "they go on with another encoder"
        assert late.first[0].mp4 and late.first[0].mp4_key, "the last picture before is in no fragment"
        return viewer, [(asked, OTHER), (asked_later, "rain")]

    viewer, switches = asyncio.run(trial())
    check(viewer, plain(small_model, max(viewer.blocks) + 1, *switches))
    assert viewer.numbers[0] == 1


def test_an_older_snapshot_will_do_and_a_restart_is_remembered(tmp_path: Path, small_model: Path) -> None:
    async def trial() -> Viewer:
        viewer, begun = Viewer(), Viewer()
        async with session(small_model, f"{tmp_path}/a") as first:
            await first.ask("prompt", text=OTHER)
            await viewer.take(first, lambda: 1 in viewer.blocks)
            assert (await first.ask("restart", seed=9))["seed"] == "9"
            begun.after = begun.block = viewer.after
            await asyncio.gather(begun.take(first, lambda: 6 in begun.blocks), stored(str(tmp_path), 4))
            place = killed(str(tmp_path))
        damaged = max(Path(place, "current").glob("*.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-100])
        async with session(small_model, place) as second:
            assert second.resumed is not None and second.resumed < damaged.stem
            await begun.take(second, lambda: 8 in begun.blocks)
        return begun

    viewer = asyncio.run(trial())
    check(viewer, plain(small_model, max(viewer.blocks) + 1, seed=9, prompt=OTHER))


def test_a_prompt_that_cannot_be_logged_is_not_taken(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trial() -> Viewer:
        viewer = Viewer()
        async with session(small_model, f"{tmp_path}/a") as first:
            with monkeypatch.context() as patch:

                def full(number: int, entry: dict[str, Any]) -> None:
                    raise OutputError("the store is full")

                patch.setattr(first._history._current, "log", full)
                with pytest.raises(OutputError, match="full"):
                    await first.ask("prompt", text=OTHER)
            await viewer.take(first, lambda: 5 in viewer.blocks)
            assert len((await first.ask("prompts"))["prompts"]) == 1
        return viewer

    viewer = asyncio.run(trial())
    check(viewer, plain(small_model, max(viewer.blocks) + 1))


@pytest.mark.parametrize("ended", [False, True])
def test_a_pause_is_remembered(store: str, small_model: Path, ended: bool) -> None:
    async def trial() -> None:
        viewer, stored_with_it = Viewer(), 5
        async with session(small_model, f"{store}/a") as first:
            await viewer.take(first, lambda: 1 in viewer.blocks)
            await first.ask("prompt", text=OTHER)
            await first.ask("pause", paused=True)
            await first.ask("pause", paused=False)
            await first.ask("restart", seed=2)  # which keeps the pause as it is, and stores it in a snapshot
            await first.ask("pause", paused=True)
            place = killed(store)
        async with session(small_model, f"{store}/a" if ended else place) as second:
            reader = asyncio.ensure_future(Viewer(viewer.after).take(second, lambda: False))
            while second._chunk is None:  # who watches sees it once more, until it goes on
                await asyncio.sleep(0.01)
            while len(second._screen._items) < stored_with_it:
                await asyncio.sleep(0.01)
            assert (await second.ask("figures"))["state"] == "paused"
            pictures = [place // PLACES for place, item in second._screen._items if isinstance(item, Picture)]
            assert len(set(pictures)) == 1, "it goes on by itself"
            reader.cancel()
            await second.ask("pause", paused=False)
            begun = Viewer(second._screen.place)
            await begun.take(second, lambda: len(begun.blocks) > 2)
            assert (await second.ask("figures"))["seed"] == "2"

    asyncio.run(trial())


def test_a_recording_goes_on_in_another_file(tmp_path: Path, small_model: Path) -> None:
    async def trial() -> None:
        viewer = Viewer()
        async with session(small_model, f"{tmp_path}/a") as first:
            name = (await first.ask("record"))["name"]
            await viewer.take(first, lambda: 14 in viewer.blocks)  # a fragment is two seconds: ten blocks
            place = killed(str(tmp_path))
        async with session(small_model, place) as second:
            await viewer.take(second, lambda: 16 in viewer.blocks)
            assert second.recording not in (None, name)
            frames = (await second.ask("stop_recording"))["frames"]
            assert frames > 12
            names = [one["name"] for one in (await second.ask("recordings"))["recordings"]]
            assert len(names) == 2 and names[1] == name
        for recording in names:
            with av.open(f"{place}/{recording}") as video:
                assert len(list(video.decode(video=0))) > 12
        async with session(small_model, place) as third:
            assert third.recording is None, "it was stopped"

    asyncio.run(trial())


def test_viewers_of_all_gateways_are_counted(tmp_path: Path, small_model: Path) -> None:
    async def trial() -> None:
        async with session(small_model, f"{tmp_path}/a") as found:
            gateways = [Channel(found, 8) for _ in range(3)]

            async def figures(gateway: Channel) -> dict[str, Any]:
                return await found.ask("figures", audience=gateway.audience)

            with contextlib.ExitStack() as stack:
                viewers = [stack.enter_context(gateways[number].view("h264")) for number in (0, 1, 1, 2)]
                stack.enter_context(gateways[2].view("events"))
                for viewer in viewers:
                    await viewer.get()
                assert [(await figures(gateway))["viewers"] for gateway in gateways] == [4, 4, 4]
                gateways[1].close()  # as if its process had died
                while (await figures(gateways[0]))["viewers"] != 2:
                    await asyncio.sleep(0.05)
            while (seen := await figures(gateways[0]))["viewers"] != 0:
                await asyncio.sleep(0.05)
            assert seen["pictures"] > 0 and seen["dropped"] >= 0

    asyncio.run(trial())


def test_the_log_is_no_longer_than_it_must_be(tmp_path: Path, small_model: Path) -> None:
    async def trial() -> None:
        viewer = Viewer()
        async with session(small_model, f"{tmp_path}/a") as first:
            for text in (OTHER, "rain", "snow"):
                await first.ask("prompt", text=text)
            names = {path.name for path in Path(tmp_path, "a", "current").glob("prompt-*")}
            assert names == {f"prompt-{number:010}.json" for number in (1, 2, 3)}
            await viewer.take(first, lambda: 8 in viewer.blocks)
        left = sorted(Path(tmp_path, "a", "current").iterdir())
        assert not [path for path in left if path.name.startswith("prompt-")]
        assert [path.suffix for path in left] == [".json", ".safetensors"] * 2 + [".json"], (
            "two snapshots, and the owner"
        )
        assert json.loads(left[-3].read_text())["logged"] == 3

    asyncio.run(trial())


def test_a_process_that_was_only_out_of_reach_writes_no_more(tmp_path: Path, small_model: Path) -> None:
    async def trial() -> None:
        first = session(small_model, f"{tmp_path}/a")
        lost = await first.__aenter__()
        async with session(small_model, f"{tmp_path}/a"):
            with pytest.raises(OutputError, match="another process has taken over"):
                await lost.ask("prompt", text=OTHER)
            with pytest.raises(AssertionError):  # its end cannot be stored either
                await first.__aexit__(None, None, None)
            assert isinstance(lost.problem, OutputError)

    asyncio.run(trial())


def test_nobody_watches(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "_LEASE_SECONDS", 0.2)

    async def trial() -> None:
        viewer = Viewer()
        async with session(small_model, f"{tmp_path}/a") as first:
            assert (await first.ask("figures"))["state"] == "unwatched"
            await viewer.take(first, lambda: 1 in viewer.blocks)
            while (await first.ask("figures"))["state"] != "unwatched":
                await asyncio.sleep(0.01)
            place = first._screen.place
            for _ in range(20):
                await asyncio.sleep(0.02)
            assert first._screen.place <= place + PLACES, "it goes on for nobody"  # one was on the way
            await viewer.take(first, lambda: 3 in viewer.blocks)

    asyncio.run(trial())


def test_recordings_and_snapshots_in_an_object_store(small_model: Path, tmp_path: Path) -> None:
    place: Any = f"memory://{tmp_path.name}"
    with served(small_model, place) as server:
        server.wait_block(1)
        name = server.live.post("/recordings")["name"]
        server.wait_block(server.live.get("/figures")["block"] + 2)
        stopped = server.live.post("/recordings/stop")
        server.live.download(name, tmp_path / "seen.mp4")
        with av.open(str(tmp_path / "seen.mp4")) as video:
            assert video.streams.video[0].frames == stopped["frames"] > 0
        assert server.live.get("/recordings")["recordings"] == [
            {"name": name, "bytes": (tmp_path / "seen.mp4").stat().st_size}
        ]
        snapshot = server.live.post("/snapshots")["name"]
        block = server.live.get("/snapshots")["snapshots"][0]["block"]
        server.live.post("/restart", seed=4)
        assert server.live.post("/resume", snapshot=snapshot)["block"] == block
