"""Self-Forcing's pipeline beside ours: without its checkout there is nothing to measure."""

from __future__ import annotations

import sys

import pytest
import self_forcing


def test_without_a_checkout_it_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pipeline", None)
    assert self_forcing.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("self_forcing.py: expected a checkout of Self-Forcing on PYTHONPATH: ")
    assert error.count("\n") == 1
