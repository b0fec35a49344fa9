"""Figures over HTTP."""

from __future__ import annotations

import os
import socket
import sys
import threading
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


def test_silent_connections_cost_one_file_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of them must not leave the soak without files to open; one that sends a byte now and then neither."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr("echo_rt.soak.prometheus._CONNECTION_SECONDS", 0.1)
    exporter = Exporter("127.0.0.1", 0)
    open_before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    silent = [socket.socket() for _ in range(200)]
    try:
        for connection in silent:
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", exporter.port))
        assert len(os.listdir("/proc/self/fd")) <= open_before + len(silent) + 1
        assert threading.active_count() <= threads + 1
        first = silent[0]
        first.setblocking(True)
        first.sendall(b"G")
        assert first.recv(1) == b"", "its time is over"
        for connection in silent:
            connection.close()
        assert "echo_rt_soak_current_block" in fetch(exporter.port)
    finally:
        exporter.close()


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
    with pytest.raises(BackendError, match=r"--port needs the package prometheus-client: .*pip install"):
        Exporter("127.0.0.1", 0)
