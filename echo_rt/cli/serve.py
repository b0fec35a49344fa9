"""``echo-rt serve``: one live video, a page to watch and steer it, and an API."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import secrets
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import MODEL, add_options, model_files, number, options_of, parse_path
from echo_rt.cli.outputs import Named, check_folder
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import say
from echo_rt.options import RuntimeOptions
from echo_rt.utils.packages import needing

HELP = "serve one live video to any number of viewers"
DESCRIPTION = """
Serve one live video: a page to watch and steer it, WebRTC, fragmented MP4 over a WebSocket, and an API (/docs). Only
this machine can reach it, unless --host names another address; then a token is needed, which is printed.
"""
EPILOG = "Ctrl-C or SIGTERM ends it: the recording is closed and a snapshot is written, which --resume goes on from."
_PROMPT = "a red fox in the snow"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_options(parser.add_argument_group("model"), [*MODEL, "--size", "--set"])
    video = parser.add_argument_group("video")
    video.add_argument("--prompt", default=_PROMPT, metavar="TEXT", help=f"the first prompt (default: {_PROMPT})")
    add_options(video, ["--seed"])
    out = "folder for snapshots and recordings (default echo-rt-live)"
    video.add_argument("--out", type=parse_path, default=Path("echo-rt-live"), metavar="DIR", help=out)
    resume = "go on from the newest snapshot in --out, or begin where there is none"
    video.add_argument("--resume", action="store_true", help=resume)
    megabits = number(float, "a number of megabits a second above 0", positive=True)
    video.add_argument("--megabits", type=megabits, default=4.0, metavar="N", help="most Mbit/s a viewer (default 4)")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address (default 127.0.0.1)")
    port = number(int, "a port in 0..65535", most=65535)
    server.add_argument("--port", type=port, default=8000, metavar="P", help="port; 0 takes a free one (default 8000)")
    token = "needed to reach it; default: none for this machine, a random one elsewhere"
    server.add_argument("--token", metavar="TEXT", help=token)
    allow = "another name that browsers may reach it under, such as that of a proxy; may be repeated"
    server.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=allow)
    ice = "STUN or TURN server for WebRTC, such as turn:USER:PASSWORD@HOST:3478; may be repeated"
    server.add_argument("--ice", action="append", default=[], metavar="URL", help=ice)
    viewers = number(int, "a number of viewers of 1 or more", positive=True)
    server.add_argument("--viewers", type=viewers, default=64, metavar="N", help="most viewers (default 64)")


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Serve until a signal; returns its exit code."""
    check_folder(Named("--out", arguments.out), model_files(arguments))
    options = options_of(RuntimeOptions, arguments)
    host, token = arguments.host, arguments.token
    if token is None and not _is_loopback(host):
        token = secrets.token_urlsafe(24)
    with stop.interruptible():
        with needing("echo-rt[serve]", "echo-rt serve"):
            from echo_rt.serve import app, guard, server
        from echo_rt.runtime import Runtime
        from echo_rt.serve.live import LiveSession

        listener = server.listen(host, arguments.port)
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}

        def load(memory: str | None, like: Any) -> Runtime:
            asked = {**given, "memory": memory or given["memory"]}
            return Runtime.from_pretrained(arguments.model, **asked, like=like)

        session = LiveSession(
            load,
            arguments.out,
            arguments.prompt,
            seed=arguments.seed,
            memory=arguments.memory,
            resume=arguments.resume,
            megabits=arguments.megabits,
        )
    hosts = frozenset([*arguments.allow_host, host])
    ice = [_ice_server(url) for url in arguments.ice]
    rules = guard.Rules(token, hosts)
    application = app.make_app({"main": session}, rules, most_viewers=arguments.viewers, ice_servers=ice)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    report.update(address=address, token=token, resumed=session.resumed)
    if not arguments.json:
        resumed = f", going on from {session.resumed}" if session.resumed else ""
        say(f"serving at {address}{f'?token={token}' if token else ''}{resumed}")
    server.make_server(application, most_connections=8 * arguments.viewers).run([listener])
    report["snapshot"] = session.saved
    if session.saved and not arguments.json:
        say(f"wrote the snapshot {session.saved} in {arguments.out}")
    return stop.request.exit_code if stop.request is not None else 0


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ice_server(url: str) -> dict[str, str]:
    """``turn:USER:PASSWORD@HOST:PORT`` as WebRTC's API takes it."""
    scheme, _, rest = url.partition(":")
    account, at, place = rest.rpartition("@")
    if not at:
        return {"urls": url}
    username, _, credential = account.partition(":")
    return {"urls": f"{scheme}:{place}", "username": username, "credential": credential}
