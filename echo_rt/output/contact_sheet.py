"""Contact sheet: one picture of a whole video of any length, of evenly spaced thumbnails with their times."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.video import load_av
from echo_rt.utils.atomic_file import Closing, check_writable, write_whole
from echo_rt.utils.wording import clock

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Image = NDArray[np.uint8]

_GAP = 4  # pixels between pictures
_BACKGROUND = 24
_INK = 235
_SCALE = 2  # pixels of the sheet per dot of a glyph, in both directions

# Glyphs three dots wide and five high: each octal digit is a row, with a bit per dot.
_GLYPHS = {
    **{"0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711, "5": 0o74717},
    **{"6": 0o74757, "7": 0o71122, "8": 0o75757, "9": 0o75717, ":": 0o02020},
}


def _caption(text: str) -> Image:
    """``text`` as grey levels, with a border of one dot around each glyph."""
    dots = np.zeros((7, 4 * len(text) + 1), bool)
    for position, character in enumerate(text):
        rows = [[_GLYPHS[character] >> 3 * row + bit & 1 for bit in (2, 1, 0)] for row in (4, 3, 2, 1, 0)]
        dots[1:6, 4 * position + 1 : 4 * position + 4] = rows
    return np.where(dots, _INK, 0).astype(np.uint8).repeat(_SCALE, 0).repeat(_SCALE, 1)


class ContactSheet(Closing):
    """Gathers at most ``limit`` thumbnails of a video of any length and writes them as one PNG at :meth:`close`.

    It first keeps every frame; whenever it has ``limit``, it drops every second one and doubles the distance between
    the following ones. So between ``limit / 2`` and ``limit`` evenly spaced frames remain.

    Args:
        path: the PNG; not written for a video without frames.
        fps: frames per second, for the times.
        columns: pictures in a row.
        limit: most pictures kept, an even number.
        picture_width: pixels; the height follows.
    """

    def __init__(
        self, path: str | Path, *, fps: float, columns: int = 6, limit: int = 48, picture_width: int = 208
    ) -> None:
        if columns < 1 or limit < 2 or limit % 2 or picture_width < 8 or not fps > 0:
            raise ConfigError(
                f"{path}: a contact sheet needs columns of 1 or more, an even limit, pictures of 8 pixels or more "
                f"and an fps above 0, got {columns}, {limit}, {picture_width} and {fps}"
            )
        self._av = load_av()
        check_writable(path)
        self.path = Path(path)
        self.fps = fps
        self.columns, self.limit, self.picture_width = columns, limit, picture_width
        self._pictures: list[Image] = []
        self._stride = 1
        self._seen = 0
        self._closed = False
        self.in_place = False  # whether the whole sheet is on the disk under its name

    @property
    def kept(self) -> list[int]:
        """Numbers of the frames that are on the sheet so far."""
        return [i * self._stride for i in range(len(self._pictures))]

    def write(self, frames: ArrayLike) -> None:
        """Take the next frames of the video: uint8 [T, H, W, 3] RGB, anything that numpy can view."""
        array = np.asarray(frames)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ConfigError(f"{self.path}: expected uint8 frames [T, H, W, 3], got {array.dtype} {list(array.shape)}")
        for image in array:
            if self._seen % self._stride == 0 and len(self._pictures) == self.limit:
                del self._pictures[1::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self._pictures.append(self._shrink(image))
            self._seen += 1

    def close(self) -> None:
        """Write the sheet; raises ``OutputError``. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._pictures:
            write_whole(self.path, self._encode(self._compose()))
            self.in_place = True

    def _shrink(self, image: Image) -> Image:
        height = max(1, round(image.shape[0] * self.picture_width / image.shape[1]))
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        small = frame.reformat(self.picture_width, height, "rgb24", interpolation="AREA")
        picture: Image = small.to_ndarray().astype(np.uint8, copy=False)
        return picture

    def _compose(self) -> Image:
        height, width, _ = self._pictures[0].shape
        columns = min(self.columns, len(self._pictures))
        rows = -(-len(self._pictures) // columns)
        sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _BACKGROUND, np.uint8)
        for number, (frame, picture) in enumerate(zip(self.kept, self._pictures, strict=True)):
            row, column = divmod(number, columns)
            top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
            cell = sheet[top : top + height, left : left + width]
            cell[:] = picture
            caption = _caption(clock(int(frame / self.fps)))[:height, :width]
            cell[: caption.shape[0], : caption.shape[1]] = caption[..., None]
        return sheet

    def _encode(self, sheet: Image) -> bytes:
        try:
            encoder = self._av.CodecContext.create("png", "w")
            encoder.height, encoder.width = sheet.shape[:2]
            encoder.pix_fmt, encoder.framerate = "rgb24", Fraction(1)
            frame = self._av.VideoFrame.from_ndarray(sheet, format="rgb24")
            frame.pts = 0
            return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
        except self._av.FFmpegError as error:
            raise OutputError(f"{self.path}: the PNG encoder failed: {error}") from None
