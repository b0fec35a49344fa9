"""``echo-rt serve``: one live video, a page to watch and steer it, and an API."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from echo_rt.cli.arguments import MODEL, Arguments, Value, model_files, number, options_of, shared, table
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.stdio import say, say_loading
from echo_rt.errors import ConfigError
from echo_rt.options import DEMO_PROMPT, RuntimeOptions, absolute_model
from echo_rt.utils.packages import needing
from echo_rt.utils.signals import StopNow, StopRequest

DESCRIPTION = """
Serve one live video: a page to watch and steer it, WebRTC, fragmented MP4 over a WebSocket, and an API (/docs). Only
this machine can reach it, unless --host names another address; then a token is needed, which is printed.
"""
EPILOG = """
Ctrl-C or SIGTERM ends it: the recording is closed, and a snapshot is written that --resume goes on from. docs/serve.md
has more, docs/serve-proxy.md tells how to serve behind a proxy, docs/serve-cluster.md on many machines.
"""
_PER_VIEWER = 8  # connections
_VIDEO = f"""
--prompt TEXT   the first prompt (default {DEMO_PROMPT})
--out DIR       folder for snapshots and recordings (default echo-rt-live)
--resume        go on from the newest snapshot in --out, or begin where there is none
--megabits N    most megabits a second of a viewer (default 4)
"""
_SERVER = """
--host ADDRESS     address to serve at (default 127.0.0.1)
--port N           port; 0 takes a free one (default 8000)
--token TEXT       what a request must have to be answered; default: a random one for all but this machine
--allow-host NAME  a name that browsers reach it by, such as that of a proxy; may be repeated
--ice URL          STUN or TURN server for WebRTC, such as turn:USER:PASSWORD@HOST:3478; may be repeated
--viewers N        most viewers (default 64)
"""
_CLUSTER = """
--ray ADDRESS        sessions as actors of this Ray cluster, or of the one of this machine: auto
--storage URL        folder or object store, such as s3://BUCKET/live, that all its machines reach (default: --out)
--gateways N         replicas that viewers are connected to (default 1)
--snapshot-blocks N  blocks between two snapshots, from which a video goes on after a failure (default 40)
--idle SECONDS       a session that nobody watches is stored, and makes room, after this time (default 60)
"""
OPTIONS = {
    "model": shared([*MODEL, "--size", "--set"]),
    "video": (*table(_VIDEO, megabits={"type": number(float, positive=True)}), *shared(["--seed"])),
    "server": table(
        _SERVER,
        host={"type": Value(str, words=("127.0.0.1", "0.0.0.0"))},
        port={"type": number(int, "a port in 0..65535", most=65535)},
        allow_host={"multiple": True},
        ice={"multiple": True},
    ),
    "cluster": table(_CLUSTER, ray={"type": Value(str, words=["auto"])}, storage={"type": Value(str, files=True)}),
}


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Serve until a signal; returns its exit code."""
    check_folder(Named("--out", arguments.out), model_files(arguments))
    options = options_of(RuntimeOptions, arguments)
    host, token = arguments.host, arguments.token
    if token == "":  # which any request would have
        raise ConfigError("--token: expected a text, got '': of a variable that is not set?")
    if token is None and not _is_loopback(host):
        token = secrets.token_urlsafe(24)
    say_loading(arguments)
    with stop.importing():
        with needing("echo-rt[serve]", "echo-rt serve"):
            from echo_rt.serve import app, guard, server
        from echo_rt.serve.live import LiveSession, load_model
    with stop.interruptible():
        listener = server.listen(host, arguments.port)
        port = listener.getsockname()[1]
        addresses = [f"http://{name}:{port}/" for name in _reached_as(host, listener)]
        given = options.arguments()
        make = partial(
            app.make_app,
            rules=guard.Rules(token, frozenset([*arguments.allow_host, host])),
            most_viewers=arguments.viewers,
            ice_servers=[_ice_server(url) for url in arguments.ice],
        )
        try:
            session = arguments.ray is None and LiveSession(
                partial(load_model, arguments.model, given),
                arguments.out,
                arguments.prompt,
                seed=arguments.seed,
                memory=arguments.memory,
                resume=arguments.resume,
                megabits=arguments.megabits,
            )
        except BaseException:
            listener.close()
            raise

    def announce(resumed: str | None = None) -> None:
        report.update(address=addresses[0], token=token, resumed=resumed)
        if not arguments.json:
            going_on = f", going on from {resumed} with its prompt and seed" if resumed else ""
            urls = [f"{address}{f'?token={token}' if token else ''}" for address in addresses]
            say(f"serving at {', from other machines '.join(urls)}{going_on}")

    if not session:
        listener.close()  # one of Ray's processes serves there
        return _serve_on_ray(arguments, options.absolute().arguments(), make, port, announce, stop)
    running = server.make_server(make({"main": session}), most_connections=_PER_VIEWER * arguments.viewers)
    announce(session.resumed)
    running.should_exit = stop.request is not None  # from here on its own handlers note a signal
    running.run([listener])
    if session.problem is not None:
        raise session.problem
    report["snapshot"] = session.saved
    if session.saved and not arguments.json:
        say(f"wrote the snapshot {session.saved} in {arguments.out}")
    return stop.request.exit_code if stop.request is not None else 0


def _serve_on_ray(
    arguments: Arguments,
    options: dict[str, Any],
    make: Callable[..., Any],
    port: int,
    announce: Callable[[], None],
    stop: StopRequest,
) -> int:
    """Put gateways in front of the cluster's sessions until a signal; then park the sessions."""
    with needing("echo-rt[ray]", "echo-rt serve --ray"):
        import ray.serve

        from echo_rt.serve import cluster
    storage = arguments.storage or str(arguments.out)
    if "://" not in storage:
        storage = os.path.abspath(storage)
    with stop.interruptible():
        has_gpus = cluster.connect(arguments.ray).get("GPU", 0) > 0
    settings = cluster.Cluster(
        absolute_model(arguments.model),  # sessions have working folders of their own
        options,
        storage,
        every=arguments.snapshot_blocks,
        idle_seconds=arguments.idle,
        resources={"num_gpus": 1} if has_gpus and arguments.device != "cpu" else {"num_cpus": 1},
        megabits=arguments.megabits,
    )
    sessions = cluster.RaySessions(settings)
    try:
        with stop.interruptible():
            if "main" not in asyncio.run(sessions.names()):
                asyncio.run(sessions.create("main", arguments.prompt, arguments.seed, arguments.memory))
            cluster.deploy(
                lambda: make(cluster.RaySessions(settings)),
                host=arguments.host,
                port=port,
                gateways=arguments.gateways,
                most_requests=_PER_VIEWER * arguments.viewers,
            )
            announce()
            threading.Event().wait()
    except StopNow as request:
        return request.exit_code
    finally:
        ray.serve.shutdown()  # the gateways, and Ray Serve with them
        asyncio.run(sessions.park_all())
        ray.shutdown()  # the cluster goes on
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reached_as(host: str, listener: socket.socket) -> list[str]:
    """Names of a server at ``host`` in an address: where that means all of this machine's, two of those."""
    names = [host]
    if ipaddress.ip_address(listener.getsockname()[0]).is_unspecified:
        names, far = (["::1"], "2001:db8::1") if listener.family == socket.AF_INET6 else (["127.0.0.1"], "192.0.2.1")
        with socket.socket(listener.family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((far, 9))  # sends nothing; without a way out there is no other address
            names += {probe.getsockname()[0]} - {*names}
    return [f"[{name}]" if ":" in name else name for name in names]


def _ice_server(url: str) -> dict[str, str]:
    """``turn:USER:PASSWORD@HOST:PORT`` as WebRTC's API takes it."""
    scheme, _, rest = url.partition(":")
    if scheme not in ("stun", "stuns", "turn", "turns") or not rest:
        raise ConfigError(f"--ice: expected stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT, got {url!r}")
    account, at, place = rest.rpartition("@")
    if not at:
        return {"urls": url}
    username, _, credential = account.partition(":")
    return {"urls": f"{scheme}:{place}", "username": username, "credential": credential}
