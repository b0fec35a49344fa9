"""An MP4 that plays wherever it is cut off while it grows, and is an ordinary one once it is whole.

It grows in fragments: the index comes in pieces, one before each group of pictures, so a file that ends after any
fragment plays. At the end libavformat appends the index of the whole video and turns what comes before it into plain
data ("hybrid"): no second copy is written. Until then the muxer keeps 74 bytes a frame (100 MB for a day at 16 frames a
second). A file that stays fragmented needs a few dozen bytes per fragment (2 MB), but many programs show no length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echo_rt.errors import BackendError, ConfigError, OutputError
from echo_rt.options import find_codec
from echo_rt.utils.atomic_file import GrowingFile, PartFile, check_ending, reason
from echo_rt.utils.packages import needing
from echo_rt.utils.wording import first_line

if TYPE_CHECKING:
    import av
    from numpy.typing import ArrayLike

_FRAGMENTS = "frag_keyframe+default_base_moof"
# An index that is rewritten at the end cannot wait for the first fragment, which tells where B-frames put the start of
# the video; so they have negative offsets instead, and the start is 0.
_ORDINARY = f"{_FRAGMENTS}+hybrid_fragmented+negative_cts_offsets"
_FRAGMENTED = f"{_FRAGMENTS}+delay_moov"
_CONTINUED = f"{_FRAGMENTED}+frag_discont+skip_trailer"
# The number that H.264 and FFmpeg give to BT.709, for primaries, transfer and matrix alike.
_BT709 = 1
_PROBE_SIZE = 256  # pixels in both directions; hardware encoders refuse much smaller ones


# With AVX-512, libx264's macroblock tree reads memory that was never written: equal frames give other bytes each time.
_REPEATABLE = "asm=MMX2,SSE2Fast,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"


@cache
def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return any(" avx512f " in line for line in islice(lines, 100))  # the first processor's
    except OSError:  # not Linux
        return False


def load_av() -> Any:
    """Import PyAV, which all writing with FFmpeg needs; :class:`BackendError` where it is not installed."""
    with needing("av", "writing a video or a picture"):
        import av.video.reformatter
    return av


def _add_stream(
    container: Any, size: tuple[int, int], fps: Fraction, codec: str, crf: float | None, preset: str | None, gop: int
) -> Any:
    """Open an encoder; :class:`ConfigError` for a quality or preset that it does not have."""
    chosen, crf, preset = find_codec(codec, crf, preset)
    os.environ.setdefault("SVT_LOG", "1")  # errors only: SVT-AV1 prints a page at each start
    av = load_av()
    try:
        stream = container.add_stream(chosen.encoder, rate=fps)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        context = stream.codec_context
        options = {**chosen.options, chosen.quality: f"{crf:g}", "preset": preset, "g": str(gop)}
        if chosen.encoder == "libx264" and _has_avx512():
            options["x264-params"] = _REPEATABLE
        context.options = options
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        if codec.startswith("hevc"):
            context.codec_tag = "hvc1"  # the kind of HEVC that Apple's players take
        context.open()
    except (av.FFmpegError, ValueError) as error:
        if codec.endswith("_nvenc") and not isinstance(error, av.codec.codec.UnknownCodecError):
            needed = "an NVIDIA GPU that encodes (H100 and H200 do not) and its driver"
            raise BackendError(f"codec {codec}: needs {needed}; --codec {codec[:-6]} encodes on the CPU") from error
        cause = f"cannot be opened for {size[0]}x{size[1]} pixels: {first_line(error)}"
        raise BackendError(f"codec {codec}: the encoder {chosen.encoder} of PyAV {av.__version__} {cause}") from None
    return stream


def check_encoding(codec: str = "h264", crf: float | None = None, preset: str | None = None) -> None:
    """Raise ``ConfigError`` for settings that ``codec`` does not have, ``BackendError`` where it cannot run here."""
    with load_av().open(_Sink(), "w", format="mp4") as container:
        _add_stream(container, (_PROBE_SIZE, _PROBE_SIZE), Fraction(16), codec, crf, preset, 32)


class _Sink:
    """What the muxer writes, in memory as (place, bytes), so that no disk error and no signal surfaces in FFmpeg."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self._at = self._end = 0

    def write(self, data: bytes) -> int:
        self.pieces.append((self._at, bytes(data)))
        self._at += len(data)
        self._end = max(self._end, self._at)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at


class VideoWriter(GrowingFile):
    """Writes frames to ``path`` as an MP4.

    Args:
        path: the file; it appears (or is replaced) at :meth:`close`, and only if it has at least one frame.
        width, height: of the frames in pixels, even.
        fps: frames a second.
        codec: a name in :data:`echo_rt.options.CODECS`.
        crf: constant quality; 0 is the best, and 18 of h264 is hard to tell from the source. None: the codec's default.
        preset: speed preset of the encoder. None: the codec's default.
        gop_seconds: longest time between two key frames, which is also the most that a crash loses,
            besides the frames in the encoder's lookahead.
        fragmented: leave the file in fragments at the end.
        continues: number of frames of the video before this file, which is a piece of it: times go on from there,
            and the file stays fragmented.

    Raises ``ConfigError`` for a size or setting that cannot be encoded, ``BackendError`` without PyAV or the encoder,
    and ``OutputError`` when the file cannot be written; then :meth:`close` still puts a playable file of the frames
    that reached the disk in place.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: float | Fraction,
        *,
        codec: str = "h264",
        crf: float | None = None,
        preset: str | None = None,
        gop_seconds: float = 2.0,
        fragmented: bool = False,
        continues: int | None = None,
    ) -> None:
        check_ending(path, ".mp4", "video")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ConfigError(f"{path}: video with 4:2:0 colour needs an even width and height, got {width}x{height}")
        if not fps > 0 or not gop_seconds > 0:
            raise ConfigError(f"{path}: fps and gop_seconds must be above 0, got {fps} and {gop_seconds}")
        self.path = Path(path)
        self.width, self.height = width, height
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames_encoded = 0
        self.frames_on_disk = 0
        self.header = b""  # of a piece: what a player needs before the fragments
        self._continues = continues
        self._muxed = 0
        self._failed = False
        self._closed = False
        self._av = av = load_av()
        self._sink = _Sink()
        self._part = PartFile(path)
        kind = _CONTINUED if continues is not None else _FRAGMENTED if fragmented else _ORDINARY
        try:
            self._container = av.open(self._sink, "w", format="mp4", options={"movflags": kind})
            gop = max(1, round(self.fps * gop_seconds))
            self._stream = _add_stream(self._container, (width, height), self.fps, codec, crf, preset, gop)
        except BaseException:
            self._part.discard()
            raise

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
        with self._encoding():
            for image in array:
                frame = self._av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                frame.pts, frame.time_base = (self._continues or 0) + self.frames_encoded, 1 / self.fps
                self._mux(self._stream.encode(frame))
                self.frames_encoded += 1

    def close(self) -> None:
        """Finish the file and put it in place; without frames, leave an older file as it is. May be called twice."""
        if self._closed:
            return
        self._closed = True
        problem: OutputError | None = None
        if not self._failed and self.frames_encoded:
            try:
                with self._encoding():
                    self._mux(self._stream.encode(None))
                    self._container.close()
                self._drain(self._muxed)
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

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            self._failed = True
            raise OutputError(f"{self.path}: the encoder failed: {first_line(error)}") from None

    def _mux(self, packets: list[av.Packet[av.VideoStream]]) -> None:
        for packet in packets:
            self._container.mux(packet)
            # A key frame ends the fragment of all packets before it, and the muxer emits that whole.
            self._drain(self._muxed)
            self._muxed += 1

    def _drain(self, frames: int) -> None:
        """Write what the muxer has emitted: whole fragments with the first ``frames`` frames."""
        pieces, self._sink.pieces = self._sink.pieces, []
        if not pieces:
            return
        size, new = self._part.size, bytearray()
        for place, data in pieces:
            if place >= size:
                new[place - size : place - size + len(data)] = data
        if self._continues is not None and not size:
            while new[size + 4 : size + 8] != b"moof":
                size += int.from_bytes(new[size : size + 4], "big")
            self.header, size = bytes(new[:size]), 0
        self._failed = True  # until these fragments are on the disk: after a lost one nothing would play
        try:
            self._part.append(new)
            # The index at the end is on the disk before the header at the start is changed.
            for place, data in pieces:
                if place < size:
                    self._part.overwrite(place, data)
        except OSError as error:
            kept = f"its first {self.frames_on_disk} frames are kept" if self.frames_on_disk else "it is not kept"
            raise OutputError(f"{self.path}: cannot go on writing: {reason(error)}; {kept}") from None
        self.frames_on_disk, self._failed = frames, False
