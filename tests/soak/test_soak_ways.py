"""A soak goes on by the backend, attention and convolutions that its snapshot names, whatever would be chosen now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from soaking import hashes, soak_of

import echo_rt.soak
from echo_rt.attention.backends import IMPLEMENTATIONS
from echo_rt.autotune.tuner import Selection, Tuner
from echo_rt.ops.backends import BACKEND_VARIABLE, available_backends


def test_another_choice_changes_no_block(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = soak_of(smallest_model, tmp_path / "whole", blocks=12)
    echo_rt.soak.run(whole)
    out = tmp_path / "out"
    assert echo_rt.soak.run(soak_of(smallest_model, out, blocks=6, snapshot_every=3)).exit_code == 0
    (other,) = (kind for kind in IMPLEMENTATIONS if kind.name == "sdpa-math")
    default = Tuner.default

    def another(tuner: Tuner[Any, Any]) -> Selection[Any]:
        return Selection(other.load(), "another") if tuner.cache.subject == "attention" else default(tuner)

    monkeypatch.setattr(Tuner, "default", another)
    outcome = echo_rt.soak.run(soak_of(smallest_model, out, blocks=12, snapshot_every=3))
    assert (outcome.exit_code, outcome.blocks, outcome.failure) == (0, 12, None)
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.skipif(available_backends()["emulated"] != "available", reason="this build has no emulated kernels")
def test_another_default_backend_changes_no_block(
    smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU for which the kernels were built only after the soak had begun, or are gone."""
    out, facts = tmp_path / "out", {"memory": "prior", "hash_every": 1}
    monkeypatch.setenv(BACKEND_VARIABLE, "emulated")
    echo_rt.soak.run(soak_of(smallest_model, tmp_path / "whole", blocks=6, **facts))
    assert echo_rt.soak.run(soak_of(smallest_model, out, blocks=4, snapshot_every=2, **facts)).backend == "emulated"
    monkeypatch.delenv(BACKEND_VARIABLE)
    outcome = echo_rt.soak.run(soak_of(smallest_model, out, blocks=6, snapshot_every=2, **facts))
    assert (outcome.backend, outcome.backend_reason) == ("emulated", "as in the snapshot")
    assert hashes(out) == hashes(tmp_path / "whole")
    # From the beginning there is no snapshot to say so, and it is another video.
    echo_rt.soak.run(soak_of(smallest_model, tmp_path / "torch", blocks=6, **facts))
    assert hashes(tmp_path / "torch") != hashes(out)
