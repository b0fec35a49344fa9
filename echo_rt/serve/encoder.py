"""One H.264 encoder for all viewers of a video, and recordings of what it made."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.video import load_av
from echo_rt.serve.session import CLOCK, Picture
from echo_rt.utils.wording import first_line

_TICK = Fraction(1, CLOCK)
_GOP_SECONDS = 2  # a viewer who lost a picture waits so long at most
_BT709 = 1
# Each picture is a fragment of its own, which is emitted when the next one tells how long it is shown.
_LIVE = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
_TIME = b"tfdt\1\0\0\0"  # before the time of a fragment, 64 bits
# Fragments that a kill leaves playable; closing makes an ordinary file of them.
_RECORDED = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}


class LiveEncoder:
    """Encodes frames without delay: no B-frames, no lookahead, a bounded rate.

    Args:
        size: width and height of the frames in pixels, even.
        fps: nominal frames a second, for the rate control; frames may come at any times.
        megabits: most megabits a second, averaged over half a second.

    ``header``: the beginning of a fragmented MP4, before any picture's ``mp4``; ``codec``: its type for a browser.
    """

    def __init__(self, size: tuple[int, int], fps: int, megabits: float) -> None:
        if size[0] % 2 or size[1] % 2:
            raise ConfigError(f"H.264 with 4:2:0 colour needs an even width and height, got {size[0]}x{size[1]}")
        self._av = av = load_av()
        self._sink, self._key, self._pts = io.BytesIO(), False, -1
        self._first: int | None = None  # ticks of the first picture, from which the muxer counts
        try:
            self._container = av.open(self._sink, "w", format="mp4", options=_LIVE)
            self.stream = stream = self._container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt, stream.time_base = *size, "yuv420p", _TICK
            context = stream.codec_context
            context.time_base, context.gop_size, context.thread_count = _TICK, _GOP_SECONDS * fps, 1
            rate = round(megabits * 1e6)
            context.options = {"preset": "superfast", "tune": "zerolatency", "crf": "23", "forced-idr": "1"}
            context.options |= {"maxrate": str(rate), "bufsize": str(rate // 2)}
            context.profile = "Baseline"
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = av.video.reformatter.ColorRange.MPEG
            self._container.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise OutputError(f"H.264 cannot be encoded at {size[0]}x{size[1]}: {first_line(error)}") from None
        self._parameters = bytes(context.extradata)  # SPS and PPS, which go before each key frame of a bare stream
        start = self._parameters.index(b"\0\0\1\x67") + 4
        self.codec = f"avc1.{self._parameters[start : start + 3].hex()}"
        self.header = self._take()

    def encode(self, frame: NDArray[np.uint8], seconds: float, *, key: bool) -> Picture:
        """Encode ``frame`` [height, width, 3] RGB, shown ``seconds`` after the epoch; ``key``: as a key frame."""
        image = self._av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        image.pts = self._pts = max(round(seconds * CLOCK), self._pts + 1)
        self._first = self._pts if self._first is None else self._first
        image.time_base = _TICK
        if key:
            image.pict_type = self._av.video.frame.PictureType.I
        (packet,) = self.stream.encode(image)
        data, last_key = bytes(packet), self._key
        self._key = packet.is_keyframe
        self._container.mux(packet)
        fragment = self._take()
        if fragment:
            at = fragment.index(_TIME) + len(_TIME)
            ticks = int.from_bytes(fragment[at : at + 8], "big") + self._first
            fragment = fragment[:at] + ticks.to_bytes(8, "big") + fragment[at + 8 :]
        return Picture(self._pts, self._key, self._parameters * self._key + data, fragment, last_key)

    def _take(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data


def plays(path: Path) -> bool:
    """Whether a file that may have been cut short has a picture."""
    av = load_av()
    try:
        with av.open(str(path)) as file:
            return any(packet.size for packet in file.demux(video=0))
    except (av.FFmpegError, IndexError):
        return False


class Recording:
    """Writes pictures to ``path``, from the next key frame on, evenly at the nominal rate; ``OutputError`` on failure.

    The file has a hidden name until :meth:`close`, which then calls ``hand_in`` with its path.
    """

    def __init__(self, path: Path, encoder: LiveEncoder, fps: int, hand_in: Callable[[Path], None]) -> None:
        self.path, self.frames, self._fps, self._av, self._hand_in = path, 0, fps, load_av(), hand_in
        self._part = path.with_name(f".{path.name}")
        self._container = self._guarded(self._av.open, str(self._part), "w", format="mp4", options=_RECORDED)
        self._stream = self._container.add_stream_from_template(encoder.stream)

    def write(self, picture: Picture) -> None:
        """Append a picture; one before the first key frame is left out."""
        if not self.frames and not picture.key:
            return
        packet = self._av.Packet(picture.h264)
        packet.pts = packet.dts = packet.duration = None
        packet.pts = packet.dts = self.frames * CLOCK // self._fps
        packet.duration, packet.time_base = CLOCK // self._fps, _TICK
        packet.is_keyframe, packet.stream = picture.key, self._stream
        self._guarded(self._container.mux, packet)
        self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name; without pictures there is none."""
        try:
            self._guarded(self._container.close)
        finally:
            if self.frames:
                self._part.replace(self.path)
            else:
                self._part.unlink(missing_ok=True)
        self._hand_in(self.path)

    def _guarded(self, call: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except (self._av.FFmpegError, OSError) as error:
            raise OutputError(f"{self.path}: cannot be written: {first_line(error)}") from None
