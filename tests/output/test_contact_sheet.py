"""The contact sheet: bounded, evenly spaced, readable."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from echo_rt.errors import ConfigError
from echo_rt.output.contact_sheet import ContactSheet

Image, ImageDraw = (pytest.importorskip(f"PIL.{name}") for name in ("Image", "ImageDraw"))


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def flat(first: int, count: int) -> np.ndarray:
    """Frames of one grey level each, their number (to 255)."""
    levels = np.minimum(np.arange(first, first + count), 255).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 12, 16, 3))


@pytest.mark.parametrize(
    ("frames", "distance"), [(1, 1), (8, 1), (9, 1), (16, 2), (17, 2), (100, 14), (1000, 142)], ids=str
)
def test_kept_frames_are_even_and_bounded(tmp_path, frames, distance):
    sheet = ContactSheet(tmp_path / "s.png", fps=16, limit=8, picture_width=16)
    assert sheet.kept == []
    for first in range(0, frames, 12):
        sheet.write(flat(first, min(12, frames - first)))
    assert len(sheet.kept) == min(frames, 8) and sheet.kept[0] == 0
    finest = max(1, 2 ** math.ceil(math.log2(frames / 32)))  # four times as many are held
    assert frames - finest <= sheet.kept[-1] < frames
    assert all(abs(later - earlier - distance) <= finest for earlier, later in pairwise(sheet.kept))


def test_what_repeats_is_seen_at_many_of_its_moments(tmp_path):
    """Thirty seconds of the demo, in which a day takes three: not the same three moments again and again."""
    sheet = ContactSheet(tmp_path / "s.png", fps=16, picture_width=16)
    sheet.write(np.zeros((480, 12, 16, 3), np.uint8))
    moments = sorted({frame % 48 for frame in sheet.kept})
    assert len(sheet.kept) == 48 and len(moments) >= 12
    assert max(later - earlier for earlier, later in pairwise([*moments, 48])) <= 4


def test_the_picture_shows_the_frames(tmp_path):
    path = tmp_path / "s.png"
    with ContactSheet(path, fps=16, columns=3, limit=5, picture_width=80) as sheet:
        sheet.write(flat(0, 9))  # shows 0, 2, 4, 6, 8
        assert not path.exists()
    image = picture(path)
    cell, gap = (60, 80), 4
    assert image.shape == (2 * cell[0] + 3 * gap, 3 * cell[1] + 4 * gap, 3)
    corners = [
        image[gap + (n // 3 + 1) * cell[0] + n // 3 * gap - 2, gap + n % 3 * (cell[1] + gap) + 2] for n in range(5)
    ]
    assert [int(corner[0]) for corner in corners] == [0, 2, 4, 6, 8]
    assert image[gap : gap + 14, gap : gap + 34].max() > 200, "the time is written in the corner"
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts as they are drawn."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def note(self: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *more: object, **named: object) -> None:
        texts.append(text)
        draw(self, place, text, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


@pytest.mark.parametrize("fps", [16, 24, 29.97, 1, 240, 0.1])
@pytest.mark.parametrize("frames", [5, 48, 90, 2000])
def test_the_times_differ(tmp_path, drawn, fps, frames):
    with ContactSheet(tmp_path / "s.png", fps=fps, picture_width=16) as sheet:
        sheet.write(np.zeros((frames, 12, 16, 3), np.uint8))
    assert len(drawn) == len(set(drawn)) == len(sheet.kept)
    for frame, time in zip(sheet.kept, drawn, strict=True):
        *larger, seconds = time.split(":")
        total = sum(60 ** (place + 1) * int(one) for place, one in enumerate(reversed(larger))) + float(seconds)
        assert total == pytest.approx(frame / fps, abs=1.0 * sheet.kept[-1] / fps / (len(sheet.kept) - 1))


def test_prompts_are_shown_where_they_change(tmp_path, drawn):
    long = "a red fox in the deep snow of a forest at night, which looks at the moon and waits for a very long time"
    with ContactSheet(tmp_path / "s.png", fps=16, columns=3, limit=8, picture_width=120) as sheet:
        sheet.write(flat(0, 3), "a fox")
        sheet.write(flat(3, 2), long)
        sheet.write(flat(5, 1))
        sheet.write(flat(6, 1), "a fox")
    prompts = [text for text in drawn if ":" not in text]
    assert [prompts[0], prompts[2]] == ["a fox", "a fox"] and len(prompts) == 3
    first, second = prompts[1].split("\n")
    assert long.startswith(first) and second.endswith("…") and second[:-1].strip() in long
    assert picture(tmp_path / "s.png").shape[0] > 3 * 90 + 4 * 4, "there is room for them"


def test_a_prompt_of_any_characters(tmp_path):
    for name, prompt in (("a", "\x1b[31m\nred"), ("b", "x" * 5000), ("c", "狐狸"), ("d", " ")):
        with ContactSheet(tmp_path / f"{name}.png", fps=16, limit=8, picture_width=60) as sheet:
            sheet.write(flat(0, 3), prompt)
        assert picture(tmp_path / f"{name}.png").max() > 100


def test_nothing_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "s.png"
    path.write_bytes(b"good")
    ContactSheet(path, fps=16).close()
    assert path.read_bytes() == b"good"


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="a limit of 2 or more"):
        ContactSheet(tmp_path / "s.png", fps=16, limit=1)
    with pytest.raises(ConfigError, match="uint8 frames"):
        ContactSheet(tmp_path / "s.png", fps=16).write(np.zeros((1, 4, 4, 3)))
