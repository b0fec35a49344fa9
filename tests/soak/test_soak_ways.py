"""A soak goes on by the attention and the convolutions that its snapshot names, whatever would be chosen now."""

from __future__ import annotations

from pathlib import Path

import pytest
from soaking import hashes, soak_of

import echo_rt.soak
from echo_rt.attention import choice
from echo_rt.attention.kinds import KINDS
from echo_rt.trials.search import Found


def test_another_choice_changes_no_block(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = soak_of(smallest_model, tmp_path / "whole", blocks=12)
    echo_rt.soak.run(whole)
    out = tmp_path / "out"
    assert echo_rt.soak.run(soak_of(smallest_model, out, blocks=6, snapshot_every=3)).exit_code == 0
    (other,) = (kind for kind in KINDS if kind.name == "sdpa-math")
    monkeypatch.setattr(choice, "_torchs_own", lambda device, kinds: Found(other.load(), "another", {}, {}))
    outcome = echo_rt.soak.run(soak_of(smallest_model, out, blocks=12, snapshot_every=3))
    assert (outcome.exit_code, outcome.blocks, outcome.failure) == (0, 12, None)
    assert hashes(out) == hashes(tmp_path / "whole")
