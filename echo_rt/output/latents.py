"""Latents streamed into one safetensors file.

The format begins with a JSON header that names the shape, which is known only at the end. So space is reserved for the
header (JSON may be padded with spaces), and it is overwritten when the file is closed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from echo_rt.errors import ConfigError, OutputError
from echo_rt.utils.atomic_file import GrowingFile, PartFile, check_ending, reason

_LENGTH_BYTES = 8
# Space for the growth of the two numbers in the header (frames and bytes), however long the stream.
_SPARE_DIGITS = 48
_ALIGNMENT = 64


class LatentsWriter(GrowingFile):
    """Writes latent frames to ``path`` as the tensor ``latents`` float32 [T, C, h, w] (``shape`` is (C, h, w)).

    The file appears at :meth:`close`, and only if it has at least one frame; after an error it holds the whole
    frames written before it. ``metadata`` goes into the header. Raises ``OutputError`` when it cannot be written.
    """

    def __init__(
        self, path: str | Path, latent_shape: Sequence[int], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        check_ending(path, ".safetensors", "latents")
        self.path = Path(path)
        self.shape = tuple(int(n) for n in latent_shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ConfigError(f"{path}: the shape of a latent frame is (channels, height, width), got {self.shape}")
        self._metadata = dict(metadata or {})
        self._frame_bytes = math.prod(self.shape) * np.dtype("<f4").itemsize
        self.frames_on_disk = 0
        self._closed = False
        size = _LENGTH_BYTES + len(self._describe()) + _SPARE_DIGITS
        self._header_bytes = -(-size // _ALIGNMENT) * _ALIGNMENT
        self._part = PartFile(path)

    def _describe(self) -> bytes:
        tensor = {
            "dtype": "F32",
            "shape": [self.frames_on_disk, *self.shape],
            "data_offsets": [0, self.frames_on_disk * self._frame_bytes],
        }
        header: dict[str, object] = {"latents": tensor}
        if self._metadata:
            header["__metadata__"] = self._metadata
        return json.dumps(header, separators=(",", ":")).encode()

    def _header(self) -> bytes:
        length = self._header_bytes - _LENGTH_BYTES
        return length.to_bytes(_LENGTH_BYTES, "little") + self._describe().ljust(length)

    def write(self, latents: ArrayLike) -> None:
        """Append latent frames: [B, C, h, w], written as float32; anything that numpy can view."""
        if self._closed:
            raise OutputError(f"{self.path}: this writer is closed; nothing more can be written")
        array = np.ascontiguousarray(latents, dtype="<f4")
        if array.ndim != 4 or array.shape[1:] != self.shape:
            raise ConfigError(f"{self.path}: expected latents [B, {self.shape}], got {list(array.shape)}")
        try:
            if not self._part.size:
                self._part.append(self._header())
            for frame in array:
                self._part.append(frame.data.cast("B"))
                self.frames_on_disk += 1
        except OSError as error:
            kept = f"its first {self.frames_on_disk} latent frames are kept"
            raise OutputError(f"{self.path}: cannot go on writing: {reason(error)}; {kept}") from None

    def close(self) -> None:
        """Complete the header and put the file in place; without frames, leave an older file as it is."""
        if self._closed:
            return
        self._closed = True
        if not self.frames_on_disk:
            self._part.discard()
            return
        try:
            self._part.overwrite(0, self._header())
        except OSError as error:
            self._part.discard()
            raise OutputError(f"{self.path}: cannot write: {reason(error)}") from None
        self._part.commit()
