"""An H.264 MP4 that grows while it is made and plays wherever it is cut off.

The file is fragmented: the index comes in pieces, one before each group of pictures, instead of once at the end. So the
memory in use does not depend on the length, and a file that ends after any fragment plays. (The muxer keeps a few dozen
bytes per fragment for the table that makes seeking fast: 1 MB per day.)
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echo_rt.errors import ConfigError, OutputError
from echo_rt.utils.atomic_file import Closing, PartFile, reason
from echo_rt.utils.packages import needing

if TYPE_CHECKING:
    import av
    from numpy.typing import ArrayLike

# delay_moov: the header waits for the first fragment, so that it can say where B-frames put the start of the video.
_MOVFLAGS = "frag_keyframe+delay_moov+default_base_moof"
# The number that H.264 and FFmpeg give to BT.709, for primaries, transfer and matrix alike.
_BT709 = 1


def load_av() -> Any:
    """Import PyAV, which all writing with FFmpeg needs; :class:`BackendError` where it is not installed."""
    with needing("av", "writing a video or a picture"):
        import av.video.reformatter
    return av


class _Sink:
    """Memory that the muxer writes to, so that no disk error and no signal surfaces inside FFmpeg's call."""

    def __init__(self) -> None:
        self._pending = io.BytesIO()
        self.write = self._pending.write

    def take(self) -> bytes:
        data = self._pending.getvalue()
        self._pending.seek(0)
        self._pending.truncate()
        return data


class VideoWriter(Closing):
    """Writes frames to ``path`` as H.264 in MP4.

    Args:
        path: the file; it appears (or is replaced) at :meth:`close`, and only if it has at least one frame.
        width, height: of the frames in pixels, even.
        fps: frames a second.
        crf: x264's constant quality, 0 (lossless) to 51; 18 is hard to tell from the source.
        preset: x264's speed preset.
        gop_seconds: longest time between two key frames, which is also the most that a crash loses,
            besides the frames in the encoder's lookahead.

    Raises ``ConfigError`` for a size that cannot be encoded, ``OutputError`` when the file cannot be written and
    ``BackendError`` without PyAV. After an ``OutputError``, :meth:`close` still puts a playable file of the frames that
    reached the disk in place.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: float | Fraction,
        *,
        crf: float = 18,
        preset: str = "veryfast",
        gop_seconds: float = 2.0,
    ) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ConfigError(f"{path}: H.264 with 4:2:0 colour needs an even width and height, got {width}x{height}")
        if not fps > 0 or not gop_seconds > 0:
            raise ConfigError(f"{path}: fps and gop_seconds must be above 0, got {fps} and {gop_seconds}")
        self.path = Path(path)
        self.width, self.height = width, height
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames_encoded = 0
        self.frames_on_disk = 0
        self._muxed = 0
        self._failed = False
        self._closed = False
        self._av = av = load_av()
        self._sink = _Sink()
        self._part = PartFile(path)
        try:
            self._container = av.open(self._sink, "w", format="mp4", options={"movflags": _MOVFLAGS})
            self._stream = self._container.add_stream("libx264", rate=self.fps)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            context = self._stream.codec_context
            context.options = {"crf": str(crf), "preset": preset, "g": str(max(1, round(self.fps * gop_seconds)))}
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = av.video.reformatter.ColorRange.MPEG
            context.open()
        except (av.FFmpegError, ValueError) as error:
            self._part.discard()
            raise OutputError(
                f"{path}: the H.264 encoder (libx264) of PyAV cannot be opened for {width}x{height} pixels: {error}"
            ) from None

    @property
    def in_place(self) -> bool:
        """Whether the file is on the disk under its name."""
        return self._part.in_place

    def write(self, frames: ArrayLike) -> None:
        """Append frames: uint8 [T, H, W, 3] RGB, anything that numpy can view."""
        if self._closed or self._failed:
            raise OutputError(f"{self.path}: this writer is closed or has failed; nothing more can be written")
        array = np.ascontiguousarray(frames)
        expected = (self.height, self.width, 3)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != expected:
            raise ConfigError(
                f"{self.path}: expected uint8 frames [T, {self.height}, {self.width}, 3], "
                f"got {array.dtype} {list(array.shape)}"
            )
        try:
            for image in array:
                frame = self._av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                frame.pts, frame.time_base = self.frames_encoded, 1 / self.fps
                self._mux(self._stream.encode(frame))
                self.frames_encoded += 1
        except self._av.FFmpegError as error:
            self._failed = True
            raise OutputError(f"{self.path}: the H.264 encoder failed: {error}") from None

    def close(self) -> None:
        """Finish the file and put it in place; without frames, leave an older file as it is. May be called twice."""
        if self._closed:
            return
        self._closed = True
        problem: OutputError | None = None
        if not self._failed and self.frames_encoded:
            try:
                self._finish()
            except OutputError as error:
                problem = error
        else:
            self._container.close()  # releases the encoder; the muxer's last output is dropped
        if self.frames_on_disk:
            self._part.commit()
        else:
            self._part.discard()
        if problem is not None:
            raise problem

    def _finish(self) -> None:
        try:
            self._mux(self._stream.encode(None))
            self._container.close()
        except self._av.FFmpegError as error:
            self._failed = True
            raise OutputError(f"{self.path}: the H.264 encoder failed: {error}") from None
        self._drain(self._muxed)

    def _mux(self, packets: list[av.Packet[av.VideoStream]]) -> None:
        for packet in packets:
            self._container.mux(packet)
            # A key frame ends the fragment of all packets before it, and the muxer emits that whole.
            self._drain(self._muxed)
            self._muxed += 1

    def _drain(self, frames: int) -> None:
        """Write what the muxer has emitted: whole fragments with the first ``frames`` frames."""
        data = self._sink.take()
        if not data:
            return
        try:
            self._part.append(data)
        except OSError as error:
            self._failed = True
            kept = f"the first {self.frames_on_disk} frames are kept" if self.frames_on_disk else "nothing is kept"
            raise OutputError(f"{self.path}: cannot write on: {reason(error)}; {kept}") from None
        except BaseException:
            self._failed = True  # a fragment is lost, and nothing after it would play
            raise
        self.frames_on_disk = frames
