"""The first look at a file from outside: whether it is one, its JSON, its format, and why it could not be opened.

Formats that hold weights in a way that is not read here are named, with what makes a file that is.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
import zipfile
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
ZIP_MAGIC = b"PK\x03\x04"
# The one name that makes an object of any size, filled with zeros, which torch takes for plain data.
ANY_SIZE, MAKES_ANY_SIZE = b"\nbytearray\n", "one that makes bytes of any number"

_UNPACK = "unpack it and give the file inside"
_SAVE = "save its state_dict() with safetensors.torch.save_file or torch.save"
_CONVERT = "convert it with transformers or diffusers: from_pretrained(...), then save_pretrained(...)"

_WEB_PAGE = "a web page: the download was one of a page about the file; download the file itself"
# By their first bytes; by how the text in them begins, in lower case.
_MAGICS = {
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"{": "a JSON file, which holds no weights",
    b"\x89HDF": f"a Keras or HDF5 file: {_CONVERT}",
    b"\x93NUMPY": "a NumPy array: save all tensors with safetensors.numpy.save_file",
    b"\x1f\x8b": f"a gzip archive: {_UNPACK}",
    b"\xfd7zXZ": f"an xz archive: {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive: {_UNPACK}",
    b"Rar!": f"a rar archive: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a zstd archive: {_UNPACK}",
}
_TENSORRT = "a TensorRT engine, built for one GPU: give the weights it was built from"
# By their names, where their first bytes say nothing.
_SUFFIXES = {
    ".onnx": f"an ONNX graph: give the weights it was exported from, or {_SAVE} there",
    **dict.fromkeys((".engine", ".plan", ".trt"), _TENSORRT),
    ".msgpack": f"Flax weights: {_CONVERT}",
    ".pb": f"a TensorFlow graph: {_CONVERT}",
    ".npz": "NumPy arrays: save them with safetensors.numpy.save_file",
}
_TAR_MAGIC, _TAR_AT = b"ustar", 257
# Folders that training leaves, by a file in them.
_FOLDERS = {
    ".metadata": "a distributed checkpoint: convert it with python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch FOLDER FILE.pt",
    "zero_to_fp32.py": "a DeepSpeed checkpoint: convert it with its own zero_to_fp32.py",
    "model_index.json": "a diffusers folder: give it as the model, or the folder of one part",
}


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
    except (OSError, ValueError) as error:
        raise not_opened(path, error, "a file", _said(error)) from error
    if not head:
        raise WeightsError(f"{path}: expected {what}, found an empty file")
    if head.startswith(_LFS_POINTER):
        raise WeightsError(f"{path}: expected {what}, found a git-lfs pointer: the file itself was never downloaded")
    return head


def _said(error: OSError | ValueError) -> str:
    known = {errno.ENOENT: "none", errno.EISDIR: "a folder"}
    return known.get(getattr(error, "errno", 0)) or getattr(error, "strerror", None) or str(error)


def names_in(folder: Path) -> list[str]:
    """The names of what lies in ``folder``, in order; ``WeightsError`` for one that cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise not_opened(folder, error, "a readable folder", _said(error)) from error


def read_object(path: Path, what: str, kind: type[T] = dict[str, Any]) -> T:  # type: ignore[assignment]
    """The JSON object in ``path`` as a ``kind``; ``what`` says for messages which file was expected there.

    Errors: ``WeightsError`` for a file that is missing, too long for a config, or no such object.
    """
    read_head(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_JSON + 1).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise not_opened(path, error, what, _said(error)) from error
    if len(content) > _LONGEST_JSON:
        raise WeightsError(f"{path}: expected {what}, found a file of more than {_LONGEST_JSON} bytes")
    return read_json(content, kind, f"{path}: expected {what}, found no JSON of one", WeightsError)


def not_opened(path: Path, error: BaseException, expected: str, found: str) -> EchoError:
    """The error for a file that ``error`` kept from being opened: what this machine is out of, else what was found."""
    if isinstance(error, FileNotFoundError):  # what safetensors calls any file that it cannot open
        try:
            path.open("rb").close()
        except OSError as reason:
            error = reason
    said = os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else str(error)
    for number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        if (text := os.strerror(number)) in said:  # of an OSError too
            return ResourceError(f"{path}: expected memory and file descriptors to open it with, found: {text}")
    return WeightsError(f"{path}: expected {expected}, found {found}")


def reason_of(error: BaseException) -> str:
    """One line on why a library would not open a file."""
    return one_line(error)[:_REASON_LENGTH] or type(error).__name__


def other_format(path: Path, head: bytes) -> str | None:
    """Name the format of ``path``, a file that begins with ``head`` or a folder, and what to do; None if unknown."""
    if not head:
        return next((what for name, what in _FOLDERS.items() if (path / name).exists()), None)
    if head.startswith(ZIP_MAGIC):
        return zip_format(path)
    if head[_TAR_AT:].startswith(_TAR_MAGIC):
        return f"a tar archive: {_UNPACK}"
    text = head.lstrip().lower()
    known = (what for magic, what in _MAGICS.items() if head.startswith(magic) or text.startswith(magic))
    return next(known, _SUFFIXES.get(path.suffix.lower()))


def zip_format(path: Path) -> str | None:
    """Name the kind of a zip archive; None where it is damaged or looks like torch's, which compresses nothing."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry: entry.filename.rpartition("/")[2] for entry in archive.infolist()}
            names = list(entries.values())
            if names.count("data.pkl") == 1:
                (entry,) = (entry for entry, name in entries.items() if name == "data.pkl")
                # As it lies there, after a header: torch can leave out the checksums, without which zipfile reads none.
                size = min(entry.file_size, os.fstat(file.fileno()).st_size) + 2**18
                content = os.pread(file.fileno(), size, entry.header_offset)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if "constants.pkl" in names:
        return f"a TorchScript program: {_SAVE}"
    if any(name.endswith(".npy") for name in names):
        return _SUFFIXES[".npz"]
    if names.count("data.pkl") != 1:
        return f"a zip archive of other files: {_UNPACK}"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "a torch file that was compressed: unpack it, and pack it again without compression"
    return MAKES_ANY_SIZE if ANY_SIZE in content else None
