"""The first look at a file from outside: a regular one, of JSON or of weights, and why one could not be opened."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from echo_rt.errors import EchoError, ResourceError, WeightsError
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.wording import one_line

T = TypeVar("T")

_LFS_POINTER = b"version https://git-lfs"
_HEAD_BYTES = 512
_LONGEST_JSON = 2**26
_REASON_LENGTH = 160


def read_head(path: Path, what: str = "weights") -> bytes:
    """The first bytes of a file of ``what``, which must be there, be a file, and be downloaded.

    Errors: ``WeightsError`` for a missing, unreadable or empty file, a folder, a pipe or device, or a git-lfs pointer.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe is to wait for whoever fills it
            raise WeightsError(f"{path}: expected a file, found a pipe or a device")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise WeightsError(f"{path}: expected a file, found none") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: expected a file, found a folder") from None
    except (OSError, ValueError) as error:
        raise not_opened(path, error, "a readable file", getattr(error, "strerror", None) or str(error)) from error
    if not head:
        raise WeightsError(f"{path}: expected {what}, found an empty file")
    if head.startswith(_LFS_POINTER):
        raise WeightsError(f"{path}: expected {what}, found a git-lfs pointer: the file itself was never downloaded")
    return head


def read_object(path: Path, what: str, kind: type[T] = dict[str, Any]) -> T:  # type: ignore[assignment]
    """The JSON object in ``path`` as a ``kind``; ``what`` says for messages which file was expected there.

    Errors: ``WeightsError`` for a file that is missing, too long for a config, or no such object.
    """
    if not os.path.exists(path):
        raise WeightsError(f"{path}: expected {what}, found no file")
    read_head(path, what)
    try:
        size = path.stat().st_size
        if size > _LONGEST_JSON:
            raise WeightsError(f"{path}: expected {what} of at most {_LONGEST_JSON} bytes, found {size}")
        content = path.read_bytes()
    except OSError as error:
        raise not_opened(path, error, what, error.strerror or str(error)) from error
    return read_json(
        content.removeprefix(codecs.BOM_UTF8), kind, f"{path}: expected {what}, found no JSON of one", WeightsError
    )


def not_opened(path: Path, error: BaseException, expected: str, found: str) -> EchoError:
    """The error for a file that ``error`` kept from being opened: what this machine is out of, else what was found."""
    if isinstance(error, FileNotFoundError):  # what safetensors calls any file that it cannot open
        try:
            path.open("rb").close()
        except OSError as reason:
            error = reason
    for number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        text = os.strerror(number)
        if (
            getattr(error, "errno", None) == number
            or text in str(error)
            or (isinstance(error, MemoryError) and number == errno.ENOMEM)
        ):
            return ResourceError(f"{path}: expected memory and file descriptors to open it with, found: {text}")
    return WeightsError(f"{path}: expected {expected}, found {found}")


def reason_of(error: BaseException) -> str:
    """One line on why a library would not open a file."""
    return one_line(error)[:_REASON_LENGTH] or type(error).__name__
