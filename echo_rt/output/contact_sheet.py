"""Contact sheet: one picture of a whole video of any length, of evenly spaced thumbnails with times and prompts."""

from __future__ import annotations

import math
import textwrap
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echo_rt.errors import ConfigError
from echo_rt.utils.atomic_file import Closing, check_ending, check_writable, write_whole
from echo_rt.utils.packages import needing
from echo_rt.utils.wording import clock, one_line

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL import Image

_GAP = 4  # pixels between pictures
_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)
_TEXT_SIZE = 12  # pixels
_LINES = 2  # of a prompt


class ContactSheet(Closing):
    """Gathers thumbnails of a video of any length and writes ``limit`` of them as one PNG at :meth:`close`.

    It first keeps every frame; whenever it has four times ``limit``, it drops every second one and doubles the distance
    between the following ones. At the end ``limit`` of them are chosen, from the first to the last and as evenly spaced
    as they allow, so their distance is hardly ever that of something which repeats in the video.

    Args:
        path: the PNG; not written for a video without frames.
        fps: frames per second, for the times.
        columns: pictures in a row.
        limit: most pictures, 2 or more.
        picture_width: pixels; the height follows.
    """

    def __init__(
        self, path: str | Path, *, fps: float, columns: int = 6, limit: int = 48, picture_width: int = 208
    ) -> None:
        check_ending(path, ".png", "contact_sheet")
        if columns < 1 or limit < 2 or picture_width < 8 or not fps > 0:
            raise ConfigError(
                f"{path}: a contact sheet needs columns of 1 or more, a limit of 2 or more, pictures of 8 pixels or "
                f"more and an fps above 0, got {columns}, {limit}, {picture_width} and {fps}"
            )
        check_writable(path)
        self.path = Path(path)
        self.fps = fps
        self.columns, self.limit, self.picture_width = columns, limit, picture_width
        with needing("pillow", "a contact sheet"):
            from PIL import ImageFont
        self._font = ImageFont.load_default(_TEXT_SIZE)
        self._pictures: list[tuple[Image.Image, str | None]] = []
        self._stride = 1
        self._seen = 0
        self._closed = False
        self.in_place = False  # whether the whole sheet is on the disk under its name

    @property
    def kept(self) -> list[int]:
        """Numbers of the frames that are on the sheet if the video ends here."""
        last = len(self._pictures) - 1
        gaps = min(self.limit - 1, last)
        return [round(i * last / max(1, gaps)) * self._stride for i in range(gaps + 1)]

    def write(self, frames: ArrayLike, prompt: str | None = None) -> None:
        """Take the next frames of the video: uint8 [T, H, W, 3] RGB, anything that numpy can view.

        The sheet has their ``prompt`` under the first picture, and wherever it is another than that of the one before.
        """
        from PIL import Image

        array = np.asarray(frames)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ConfigError(f"{self.path}: expected uint8 frames [T, H, W, 3], got {array.dtype} {list(array.shape)}")
        height, width = array.shape[1:3]
        size = (self.picture_width, max(1, round(height * self.picture_width / width)))
        for frame in array:
            if self._seen % self._stride == 0 and len(self._pictures) == 4 * self.limit:
                del self._pictures[1::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                image = Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BOX)
                self._pictures.append((image, prompt))
            self._seen += 1

    def close(self) -> None:
        """Write the sheet; raises ``OutputError``. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._pictures:
            file = BytesIO()
            self._compose().save(file, "PNG")
            write_whole(self.path, file.getvalue())
            self.in_place = True

    def _time(self, frame: int) -> str:
        """Time of a kept frame, with as many digits as tell it from the next one."""
        digits = max(0, math.ceil(math.log10(self.fps / self._stride)))
        whole, rest = divmod(int(round(frame / self.fps * 10**digits, 6)), 10**digits)
        return clock(whole) + (f".{rest:0{digits}}" if digits else "")

    def _compose(self) -> Image.Image:
        from PIL import Image, ImageDraw

        width, height = self._pictures[0][0].size
        line = round(self._font.getbbox("Ag")[3]) + 2
        told = _LINES * line if any(prompt for _, prompt in self._pictures) else 0
        kept = self.kept
        columns = min(self.columns, len(kept))
        across, down = width + _GAP, height + told + _GAP
        size = (columns * across + _GAP, math.ceil(len(kept) / columns) * down + _GAP)
        sheet = Image.new("RGB", size, _BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        before = None
        for number, frame in enumerate(kept):
            image, prompt = self._pictures[frame // self._stride]
            row, column = divmod(number, columns)
            left, top = _GAP + column * across, _GAP + row * down
            sheet.paste(image, (left, top))
            time = self._time(frame)
            draw.rectangle((left, top, left + self._font.getlength(time) + 3, top + line), _BACKGROUND)
            draw.text((left + 2, top), time, _INK, self._font)
            if prompt and prompt != before:
                draw.text((left, top + height), self._wrapped(prompt, width), _INK, self._font, spacing=0)
            before = prompt
        return sheet

    def _wrapped(self, text: str, width: int) -> str:
        """``text`` in lines of at most ``width`` pixels, as much of it as there is room for."""
        for characters in range(width, 1, -1):
            lines = textwrap.wrap(one_line(text), characters, max_lines=_LINES, placeholder="…")
            if max(map(self._font.getlength, lines), default=0) <= width:
                return "\n".join(lines)
        return ""
