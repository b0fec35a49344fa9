"""Figures over HTTP."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
import urllib.request
from typing import Any

import pytest

from echo_rt.errors import BackendError, ConfigError
from echo_rt.soak.checks import Status, Verdict
from echo_rt.soak.prometheus import Exporter, figures

LINE: dict[str, Any] = {
    "block": 7,
    "warm": True,
    "latency": {"p50": 250.5, "p99": None, "bins": {"-3": 4}},
    "device": None,
    "hashes": [[7, "aa"]],
    "mismatches": [],
}


def fetch(port: int) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_the_names_of_figures() -> None:
    found = dict(figures(LINE))
    assert found.pop("echo_rt_soak_latency_p99") != 0 and found.pop("echo_rt_soak_device") != 0  # NaN
    assert found == {"echo_rt_soak_block": 7.0, "echo_rt_soak_warm": 1.0, "echo_rt_soak_latency_p50": 250.5}


def test_served_figures_are_the_newest() -> None:
    pytest.importorskip("prometheus_client")
    exporter = Exporter("127.0.0.1", 0)
    try:
        assert fetch(exporter.port)["echo_rt_soak_current_block"] == "0.0"
        exporter.block_done(7, 93, 0.25)
        verdicts = [Verdict(name, status, "", "") for name, status in zip("abc", Status, strict=True)]
        exporter.line_done(LINE, verdicts)
        exporter.block_done(8, 105, 0.5)
        served = fetch(exporter.port)
    finally:
        exporter.close()
    assert served["echo_rt_soak_current_block"] == "8.0" and served["echo_rt_soak_current_block_seconds"] == "0.5"
    assert served["echo_rt_soak_block"] == "7.0" and served["echo_rt_soak_latency_p50"] == "250.5"
    assert served["echo_rt_soak_latency_p99"] == "NaN"
    assert [served[f'echo_rt_soak_promise{{promise="{name}"}}'] for name in "abc"] == ["1.0", "0.0", "NaN"]
    assert not any("bins" in name for name in served)


def test_a_port_that_is_taken() -> None:
    pytest.importorskip("prometheus_client")
    exporter = Exporter("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=f"--port: cannot serve at 127.0.0.1:{exporter.port}: "):
            Exporter("127.0.0.1", exporter.port)
    finally:
        exporter.close()


def test_silent_connections_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of them must not leave the soak without files to open."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr("echo_rt.soak.prometheus._CONNECTION_SECONDS", 1e9)
    exporter = Exporter("127.0.0.1", 0)
    open_before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", exporter.port), 60) for _ in range(100)]
    try:
        for connection in silent[8:]:
            assert connection.recv(1) == b"", "it is closed at once"
            connection.close()
        assert len(os.listdir("/proc/self/fd")) <= open_before + 16
        assert threading.active_count() <= threads + 8
        exporter._server.end_late(math.inf)  # as its thread does once their time is over
        for connection in silent[:8]:
            assert connection.recv(1) == b""
        while exporter._server._until:
            time.sleep(0.01)
        assert "echo_rt_soak_current_block" in fetch(exporter.port)
    finally:
        for connection in silent:
            connection.close()
        exporter.close()


def test_a_slow_reader_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sends a byte now and then, and one that is there when the soak ends."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr("echo_rt.soak.prometheus._CONNECTION_SECONDS", 0.1)
    exporter = Exporter("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", exporter.port), 60) as slow:
        slow.sendall(b"G")
        assert slow.recv(1) == b""
    monkeypatch.setattr("echo_rt.soak.prometheus._CONNECTION_SECONDS", 1e9)
    with socket.create_connection(("127.0.0.1", exporter.port), 60) as last:
        while not exporter._server._until:
            time.sleep(0.01)
        exporter.close()
        assert last.recv(1) == b""


@pytest.mark.parametrize("address", ["::1", "localhost"])
def test_other_addresses(address: str) -> None:
    pytest.importorskip("prometheus_client")
    try:
        exporter = Exporter(address, 0)
    except ConfigError:
        pytest.skip(f"no {address} here")
    exporter.close()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        BackendError, match=r"need prometheus-client, which is not installed: pip install 'echo-rt\[soak\]"
    ):
        Exporter("127.0.0.1", 0)
