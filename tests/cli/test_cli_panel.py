"""What a reader is shown."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from echo_rt.cli import progress
from echo_rt.cli.progress import Panel, rows
from echo_rt.soak import SoakConfig
from echo_rt.soak.checks import Status, Verdict

LINE: dict[str, Any] = {
    "block": 41,
    "frame": 501,
    "video_seconds": 31.3125,
    "fps": 36.94,
    "latency": {"p50": 251.25, "p99": None, "max": 300.0},
    "host": {"rss": 3 * 2**20},
    "device": None,
    "gpu": None,
    "position": {"newest_id": 20, "shift": 105},
    "memory_state": {"norm": 0.75, "gate_mean": None},
    "latents": {"mean": 0.01234567, "std": 1.0},
    "video": {"min": -1.25, "max": 1.0},
}
KEPT, BROKEN = Verdict("finite", Status.KEPT, "", "none"), Verdict("hashes", Status.BROKEN, "", "block 7")


def config(**changes: Any) -> SoakConfig:
    return SoakConfig(**({"model": "m", "out": "o", "blocks": 100} | changes))


def test_rows() -> None:
    shown = dict(rows(LINE))
    assert shown["latency"] == "p50 251.2  p99 -  max 300 ms" and shown["host memory"] == "3.0 MiB"
    assert shown["memory state"] == "norm 0.75, gate -" and shown["pixels"] == "-1.25 .. 1 before clamping"
    assert "GPU" not in shown and "device memory" not in shown
    gpu = {"temperature_c": 60, "sm_clock_mhz": 1980, "power_mw": 651_400, "ecc_uncorrected": None}
    shown = dict(rows(LINE | {"gpu": gpu, "device": {"allocated": 2**30, "reserved": 2**31}}))
    assert shown["GPU"] == "60 °C  1980 MHz  651.4 W  uncorrected ECC errors -"
    assert shown["device memory"] == "1024.0 MiB allocated, 2048.0 reserved"


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    panel = Panel(config())
    panel.block_done(41, 501, 0.25)
    panel.line_done(LINE, [KEPT])
    panel.line_done(LINE, [KEPT, BROKEN])
    panel.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("echo-rt: 42 blocks of 100 · video 0:31 (501 frames) · rate 36.9 fps · ")
    assert first.endswith("no promise broken") and second.endswith("BROKEN: hashes")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    panel = Panel(config(blocks=None, hours=2.0), quiet=True)
    panel.block_done(41, 501, 0.25)
    panel.line_done(LINE, [BROKEN])
    panel.close()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    broken = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError(5, "Input/output error")
        return super().write(text)


def terminal_in(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """No fixture: between set-up and test pytest puts its own standard error back."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_DRAWING_SECONDS", 0.0)
    return made


def test_a_live_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    panel = Panel(config())
    panel.block_done(1, 21, 0.25)
    assert "first interval" in terminal.getvalue()
    panel.line_done(LINE, [KEPT, BROKEN])
    panel.block_done(42, 513, 0.25)
    panel.close()
    panel.close()
    text = terminal.getvalue()
    for part in ("echo-rt soak · 43 blocks of 100, 250 ms", "newest id 20, shift 105", "hashes", "block 7", "broken"):
        assert part in text


def test_a_terminal_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    panel = Panel(config())
    panel.block_done(1, 21, 0.25)
    terminal.broken = True
    panel.block_done(2, 33, 0.25)
    panel.line_done(LINE, [KEPT])
    panel.close()
    assert sys.stderr is terminal and "3 blocks" not in terminal.getvalue()


def test_drawings_are_not_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    monkeypatch.setattr(progress, "_DRAWING_SECONDS", 3600.0)
    panel = Panel(config())
    for block in range(10):
        panel.block_done(block, 12 * block, 0.25)
    panel.close()
    assert "1 block of 100" in terminal.getvalue() and "6 blocks of" not in terminal.getvalue()
