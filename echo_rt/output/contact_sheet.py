"""One picture of a whole video: small frames at even distances, each with its time, however long the video is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.video import load_av
from echo_rt.utils.atomic_file import Closing, check_writable, write_whole

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Image = NDArray[np.uint8]

_GAP = 4  # pixels between two pictures
_BACKGROUND = 24
_INK = 235
_SCALE = 2  # pixels of the sheet on a side of one dot of a glyph

# Digits and the colon, three dots wide and five high, a row in three bits.
_GLYPHS = {
    "0": (0b111, 0b101, 0b101, 0b101, 0b111),
    "1": (0b010, 0b110, 0b010, 0b010, 0b111),
    "2": (0b111, 0b001, 0b111, 0b100, 0b111),
    "3": (0b111, 0b001, 0b111, 0b001, 0b111),
    "4": (0b101, 0b101, 0b111, 0b001, 0b001),
    "5": (0b111, 0b100, 0b111, 0b001, 0b111),
    "6": (0b111, 0b100, 0b111, 0b101, 0b111),
    "7": (0b111, 0b001, 0b001, 0b010, 0b010),
    "8": (0b111, 0b101, 0b111, 0b101, 0b111),
    "9": (0b111, 0b101, 0b111, 0b001, 0b111),
    ":": (0b000, 0b010, 0b000, 0b010, 0b000),
}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _caption(text: str) -> Image:
    """``text`` as grey levels, with a border of one dot around each glyph."""
    dots = np.zeros((7, 4 * len(text) + 1), bool)
    for position, character in enumerate(text):
        rows = [[row >> bit & 1 for bit in (2, 1, 0)] for row in _GLYPHS[character]]
        dots[1:6, 4 * position + 1 : 4 * position + 4] = rows
    return np.where(dots, _INK, 0).astype(np.uint8).repeat(_SCALE, 0).repeat(_SCALE, 1)


class ContactSheet(Closing):
    """Gathers at most ``limit`` thumbnails of a video of any length and writes them as one PNG at :meth:`close`.

    It begins by keeping every frame; whenever ``limit`` are kept, every second one is dropped and the distance
    between those to come is doubled. So between ``limit / 2`` and ``limit`` frames at even distances remain.

    Args:
        path: the PNG; nothing is written when no frame came.
        fps: frames a second, for the times.
        columns: pictures in a row.
        limit: most pictures kept, an even number.
        picture_width: pixels, the height follows.
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
        self.in_place = False  # whether the sheet stands under its name, whole on the disk

    @property
    def kept(self) -> list[int]:
        """Numbers of the frames that are on the sheet as it stands."""
        return [i * self._stride for i in range(len(self._pictures))]

    def write(self, frames: ArrayLike) -> None:
        """Look at the next frames of the video: uint8 [T, H, W, 3] RGB, anything that numpy can view."""
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
            caption = _caption(_clock(frame / self.fps))[:height, :width]
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
