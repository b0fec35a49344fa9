"""The contact sheet: bounded, evenly spaced, readable."""

from __future__ import annotations

import numpy as np
import pytest

from echo_rt.errors import ConfigError
from echo_rt.output.contact_sheet import ContactSheet

av = pytest.importorskip("av")


def flat(first: int, count: int) -> np.ndarray:
    """Frames of one grey level each, their number (to 255)."""
    levels = np.minimum(np.arange(first, first + count), 255).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 12, 16, 3))


@pytest.mark.parametrize(
    ("frames", "stride"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (100, 16), (1000, 128)], ids=str
)
def test_kept_frames_are_even_and_bounded(tmp_path, frames, stride):
    sheet = ContactSheet(tmp_path / "s.png", fps=16, limit=8, picture_width=16)
    for first in range(0, frames, 12):
        sheet.write(flat(first, min(12, frames - first)))
    assert sheet.kept == list(range(0, frames, stride))
    assert len(sheet.kept) <= 8


def test_the_picture_shows_the_frames(tmp_path):
    path = tmp_path / "s.png"
    with ContactSheet(path, fps=16, columns=3, limit=8, picture_width=80) as sheet:
        sheet.write(flat(0, 9))  # keeps 0, 2, 4, 6, 8
        assert not path.exists()
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "png"
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    cell, gap = (60, 80), 4
    assert image.shape == (2 * cell[0] + 3 * gap, 3 * cell[1] + 4 * gap, 3)
    corners = [
        image[gap + (n // 3 + 1) * cell[0] + n // 3 * gap - 2, gap + n % 3 * (cell[1] + gap) + 2] for n in range(5)
    ]
    assert [int(corner[0]) for corner in corners] == [0, 2, 4, 6, 8]
    assert image[gap : gap + 14, gap : gap + 34].max() == 235, "the time is written in the corner"
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]


def test_nothing_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "s.png"
    path.write_bytes(b"good")
    ContactSheet(path, fps=16).close()
    assert path.read_bytes() == b"good"


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="even limit"):
        ContactSheet(tmp_path / "s.png", fps=16, limit=7)
    with pytest.raises(ConfigError, match="uint8 frames"):
        ContactSheet(tmp_path / "s.png", fps=16).write(np.zeros((1, 4, 4, 3)))
