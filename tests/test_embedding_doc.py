"""Every piece of code in docs/embedding.md, run in order as one program; its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import echo_rt

DOC = Path(__file__).parent.parent / "docs" / "embedding.md"


def test_the_code_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOC.read_text(encoding="utf-8")
    pieces = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(pieces) == text.count("```") // 2 == 11
    monkeypatch.chdir(tmp_path)
    load = echo_rt.Runtime.from_pretrained
    monkeypatch.setattr(
        echo_rt.Runtime, "from_pretrained", lambda *given, **options: load(*given, **options, device="cpu")
    )
    names: dict[str, object] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for number, piece in enumerate(pieces):
            exec(compile(piece, f"embedding.md, piece {number}", "exec"), names)
            if number == 0:
                assert names["chunk"].index == 1  # type: ignore[attr-defined]
            if number == 2:
                # Nothing was lost on the way here: five blocks and the next, polled for, waited for.
                assert names["chunk"].index in (6, 7)  # type: ignore[attr-defined]
    assert out.getvalue() == "0 0 (9, 64, 112, 3)\n"
    assert names["recorder"].report()["frames"] == 30 and (tmp_path / "ball.mp4").exists()  # type: ignore[attr-defined]
    (first, second), (third, fourth) = names["pairs"]  # type: ignore[misc]
    assert (second, fourth, third - first) == (0, 1, 1)


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", DOC.read_text(encoding="utf-8"))
    assert links and all((DOC.parent / link).exists() for link in links)
