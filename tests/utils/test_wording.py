"""Messages about one thing, and of a type with its article."""

from __future__ import annotations

from pathlib import Path

import pytest

from echo_rt.errors import WeightsError
from echo_rt.soak import Outcome
from echo_rt.utils.wording import counted, printable, type_of, warn_caller
from echo_rt.weights.folder import ModelFolder


def test_one_and_several() -> None:
    assert [counted(number, "block") for number in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]


def test_articles() -> None:
    assert [type_of(value) for value in (3, [], OSError())] == ["an int", "a list", "an OSError"]


def test_a_soak_of_one_block() -> None:
    assert Outcome("complete", 1, [], Path("r")).summary.startswith("complete after 1 block; ")


def test_a_config_of_something_else(small_model: Path, tmp_path: Path) -> None:
    for file in small_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(WeightsError, match="got `int`"):
        ModelFolder.open(tmp_path).transformer.config()


def test_printable_leaves_nothing_for_a_terminal_to_obey() -> None:
    assert printable("a\x1b[31m\nb\ud800é\u202e中 c") == "a\\x1b[31m\\nb\\ud800é\\u202e中 c"


def test_a_warning_names_the_line_outside_the_package() -> None:
    inside: dict[str, object] = {"__name__": "echo_rt.some.module", "warn_caller": warn_caller}
    exec("def outer():\n    inner()\ndef inner():\n    warn_caller('careful', RuntimeWarning)\n", inside)
    with pytest.warns(RuntimeWarning, match="careful") as caught:
        inside["outer"]()  # type: ignore[operator]
    assert caught[0].filename == __file__
