"""Sessions on a Ray cluster: each is a named actor, found from any gateway; gateways are replicas of Ray Serve.

An actor outlives whoever made it. One that dies is made again by Ray, on whatever machine has room, and goes on from
the storage that all machines reach; one that nobody asks for anything stores its video and makes room for others.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.core
import msgspec
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from echo_rt.errors import ConfigError, StreamError
from echo_rt.options import MemoryMode
from echo_rt.serve.session import (
    Audience,
    Block,
    BusyError,
    Item,
    ParkedError,
    Sessions,
    checked_prompt,
    soon,
)
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.wording import first_line, with_type

if TYPE_CHECKING:
    from echo_rt.serve.live import LiveSession

NAMESPACE = APPLICATION = "echo-rt"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_MOST_SESSIONS = 1000
_BEGIN = "session.json"
_AGAIN_SECONDS = 0.1
_ANSWER_SECONDS = 1.0  # for figures; who does not answer waits for a machine, or loads
_CONNECT_SECONDS = 20.0
_READING = ("prompts", "snapshots", "recordings", "recording")  # commands that change nothing
_WATCHING = ("next", "block")  # calls that do not bring back a session that was parked under them

logger = logging.getLogger("echo_rt.serve")


@dataclass(frozen=True)
class Cluster:
    """How sessions run. All machines must have what is named here.

    Args:
        model, options: of :meth:`echo_rt.Runtime.from_pretrained`.
        storage: folder or address of fsspec's, in which each session has a folder.
        every: blocks between two snapshots.
        idle_seconds: after which a session that nobody asks for anything is parked.
        resources: of a session, such as ``{"num_gpus": 1}``.
        megabits: most megabits a second to one viewer.
    """

    model: str | Path
    options: Mapping[str, Any]
    storage: str
    every: int = 40
    idle_seconds: float = 60.0
    resources: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    megabits: float = 4.0


@dataclass(frozen=True)
class Begin:
    """What a session's first video begins with."""

    prompt: str
    seed: int = 0
    memory: str | None = None


class Host:
    """The actor: a session in a process of its own, loaded for the first call."""

    def __init__(self, name: str, cluster: Cluster, begin: Begin) -> None:
        self._name, self._cluster, self._begin = name, cluster, begin
        self._session: LiveSession | None = None
        self._opening = asyncio.Lock()
        self._called, self._waiting, self._closing = time.monotonic(), 0, False
        threading.Thread(target=self._park_when_idle, name="echo-rt idle", daemon=True).start()

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the session; all but a look at its figures keeps it from being parked."""
        wanted = arguments != ("figures",)
        self._waiting += wanted
        try:
            return await self._call(method, arguments, options)
        finally:
            self._waiting -= wanted
            if wanted:
                self._called = time.monotonic()

    async def _call(self, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._closing:
            raise ParkedError("the session is being parked; ask again later")
        async with self._opening:
            if self._session is None:
                self._session = await self._open()
        return await getattr(self._session, method)(*arguments, **options)

    async def close(self) -> None:
        """Store the video, and end this process."""
        if self._closing:
            return
        self._closing = True
        try:
            if self._session is not None:
                await self._session.close()
                if self._session.problem is not None:
                    raise self._session.problem
        finally:
            threading.Timer(_AGAIN_SECONDS, _end_this_actor).start()  # after the answer

    async def _open(self) -> LiveSession:
        from echo_rt.serve.live import LiveSession, load_model  # not in the gateways, which do without torch

        cluster, options = self._cluster, {"resume": True, **asdict(self._begin)}
        options |= {"megabits": cluster.megabits, "every": cluster.every}
        load, place = partial(load_model, cluster.model, cluster.options), f"{cluster.storage}/{self._name}"
        session = await asyncio.to_thread(LiveSession, load, place, **options)
        await session.start()
        return session

    def _park_when_idle(self) -> None:
        context = ray.get_runtime_context()
        itself = context.current_actor
        if context.was_current_actor_reconstructed:  # what it recorded goes on even while nobody watches
            itself.call.remote("describe")
        while (left := self._called + self._cluster.idle_seconds - time.monotonic()) > 0:
            time.sleep(left)
            if self._waiting or (self._session is not None and self._session.recording):
                self._called = time.monotonic()
        itself.close.remote()


def _end_this_actor() -> None:
    ray.kill(ray.get_runtime_context().current_actor)  # for good: Ray does not make it again


class RaySession:
    """Implements :class:`~echo_rt.serve.session.Session` from any process of the cluster.

    Calls wait for as long as the actor is away, or in a queue for a machine; the first that needs it makes the actor.
    """

    def __init__(self, name: str, cluster: Cluster, begin: Begin) -> None:
        self._given = name, cluster, begin
        self._actor: Any = None
        self._about: dict[str, Any] | None = None

    async def start(self) -> None:
        """Do nothing."""

    async def describe(self) -> dict[str, Any]:
        if self._about is None:
            self._about = dict(await self._call("describe"))
        return self._about

    async def next(self, after: int | None, audience: Audience | None = None) -> list[tuple[int, Item]]:
        items: list[tuple[int, Item]] = await self._call("next", after, audience)
        return items

    async def block(self, after: int) -> Block | None:
        block: Block | None = await self._call("block", after)
        return block

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Carry out a command; a session that is parked has no figures but its state."""
        if command == "figures":
            return await self._figures(**arguments)
        if command == "keyframe":  # is not waited for
            if (actor := self._actor or await asyncio.to_thread(self._existing)) is not None:
                actor.call.remote("ask", command)
            return {}
        if command not in _READING:
            await soon(self._call("describe"))
        answer: dict[str, Any] = await self._call("ask", command, again=command in _READING, **arguments)
        return answer

    async def close(self) -> None:
        """Park the session: store its video, and free its machine; the next call brings it back."""
        if (actor := await asyncio.to_thread(self._existing)) is not None:
            try:
                await actor.close.remote()
            except RayTaskError as error:
                raise error.cause from None
            while await asyncio.to_thread(self._existing) is not None:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _figures(self, audience: Audience | None = None) -> dict[str, Any]:
        here = {} if audience is None else {"viewers": audience.viewers, "dropped": audience.dropped}
        if (actor := await asyncio.to_thread(self._existing)) is None:
            return {"state": "parked", **here}
        try:
            answer = actor.call.remote("ask", "figures", audience=audience)
            figures: dict[str, Any] = await asyncio.wait_for(answer, _ANSWER_SECONDS)
            return figures
        except (asyncio.TimeoutError, RayActorError):
            return {"state": "waiting", **here}
        except RayTaskError as error:
            if isinstance(error.cause, ParkedError):
                return {"state": "parked", **here}
            return {"state": "failed", "failure": first_line(error.cause), **here}

    async def _call(self, method: str, *arguments: Any, again: bool = True, **options: Any) -> Any:
        """Call the actor; one that has died is waited for, and called ``again``."""
        find = self._make
        while True:
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(find)
                if self._actor is None:
                    raise ParkedError("the session was parked; connect again to bring it back")
                return await self._actor.call.remote(method, *arguments, **options)
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                self._actor = None
                if method in _WATCHING:
                    find = self._existing
                if not again:
                    raise BusyError("the session's process has died, perhaps before it took this") from error
                await asyncio.sleep(_AGAIN_SECONDS)

    def _make(self) -> Any:
        name, cluster, _ = self._given
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor = ray.remote(Host).options(max_restarts=-1, **options, **cluster.resources)
        return actor.remote(*self._given)

    def _existing(self) -> Any:
        try:
            return ray.get_actor(self._given[0], NAMESPACE)
        except ValueError:
            return None


class RaySessions(Sessions):
    """The sessions of a cluster, which are those that its storage has."""

    always = False

    def __init__(self, cluster: Cluster) -> None:
        super().__init__({})
        self._cluster, self._known = cluster, dict[str, RaySession]()
        self._fs, self._root = fsspec.core.url_to_fs(cluster.storage)

    async def find(self, name: str) -> RaySession | None:
        if name not in self._known and _NAME.fullmatch(name):
            place = f"{self._root}/{name}/{_BEGIN}"
            try:
                data = await asyncio.to_thread(self._fs.cat_file, place)
            except FileNotFoundError:
                return None
            self._known.setdefault(name, RaySession(name, self._cluster, read_json(data, Begin, place, StreamError)))
        return self._known.get(name)

    async def names(self) -> list[str]:
        """Return all names, of parked sessions too."""

        def listed() -> list[str]:
            self._fs.invalidate_cache()
            return sorted(path.split("/")[-2] for path in self._fs.glob(f"{self._root}/*/{_BEGIN}"))

        return await asyncio.to_thread(listed)

    async def create(self, name: str, prompt: str, seed: int = 0, memory: str | None = None) -> None:
        """Store what a session begins with; it begins when somebody watches."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name: expected 1 to 40 of a-z, 0-9 and -, found {name[:80]!r}")
        begin = Begin(checked_prompt(prompt), seed, None if memory is None else MemoryMode.parse(memory).value)
        names = await self.names()
        if name in names:
            raise ConfigError(f"name: expected one that no session has, found {name!r}")
        if len(names) >= _MOST_SESSIONS:
            raise BusyError(f"there are {_MOST_SESSIONS} sessions, the most; remove some from {self._root}")

        def store() -> None:
            self._fs.makedirs(f"{self._root}/{name}", exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{name}/{_BEGIN}", msgspec.json.encode(begin))

        await asyncio.to_thread(store)

    async def park_all(self) -> None:
        """Park every session that runs."""
        sessions = [session for name in await self.names() if (session := await self.find(name))]
        for error in await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True):
            if error is not None:
                logger.warning("a session goes on from an older snapshot: %s", with_type(error))


def connect(address: str) -> dict[str, float]:
    """Connect this process to the cluster at an address, or ``auto``; returns its resources.

    :class:`ConfigError` where there is none.
    """
    handler = signal.getsignal(signal.SIGTERM)
    host, colon, port = address.rpartition(":")
    try:
        if colon and "/" not in host:  # Ray itself would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        resources: dict[str, float] = ray.cluster_resources()
        return resources
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"expected a Ray cluster at {address}: {first_line(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own in its place


def deploy(make: Callable[[], FastAPI], *, host: str, port: int, gateways: int, most_requests: int) -> None:
    """Have Ray Serve run ``gateways`` replicas of the application, and restart those that die; returns once they serve.

    They take the place of any that are there. ``most_requests``: at once in each, WebSockets included.
    :class:`ConfigError` where Ray Serve has applications of others, as it serves at one port alone.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if others := set(serve.status().applications) - {APPLICATION}:
        raise ConfigError(f"expected a cluster without other applications of Ray Serve, found {', '.join(others)}")
    serve.shutdown()
    serve.start(http_options=serve.HTTPOptions(host=host, port=port))
    gateway = serve.deployment(
        serve.ingress(make)(),
        name="gateway",
        num_replicas=gateways,
        max_ongoing_requests=most_requests,
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0},
    )
    serve.run(gateway.bind(), name=APPLICATION, route_prefix="/", logging_config={"log_level": "ERROR"})
