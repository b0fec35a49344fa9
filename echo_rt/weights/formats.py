"""Files that hold weights in a way that is not read here: what each is, and what makes a file that is."""

from __future__ import annotations

import zipfile
from pathlib import Path

ZIP_MAGIC = b"PK\x03\x04"

_UNPACK = "unpack it and give the file inside"
_SAVE = "save its state_dict() with safetensors.torch.save_file or torch.save"
_CONVERT = "convert it with transformers or diffusers: from_pretrained(...), then save_pretrained(...)"

# By their first bytes.
_MAGICS = {
    b"\x89HDF": f"a Keras or HDF5 file: {_CONVERT}",
    b"\x93NUMPY": "a NumPy array: save all tensors with safetensors.numpy.save_file",
    b"\x1f\x8b": f"a gzip archive: {_UNPACK}",
    b"\xfd7zXZ": f"an xz archive: {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive: {_UNPACK}",
    b"Rar!": f"a rar archive: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a zstd archive: {_UNPACK}",
}
_WEB_PAGE = "a web page: the download was one of a page about the file; download the file itself"
# By how the text in them begins, in lower case.
_TEXTS = {b"<!doctype html": _WEB_PAGE, b"<html": _WEB_PAGE, b"{": "a JSON file, which holds no weights"}
_TENSORRT = "a TensorRT engine, built for one GPU: give the weights it was built from"
# By their names, where their first bytes say nothing.
_SUFFIXES = {
    ".onnx": f"an ONNX graph: give the weights it was exported from, or {_SAVE} there",
    ".engine": _TENSORRT,
    ".plan": _TENSORRT,
    ".trt": _TENSORRT,
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


def other_format(path: Path, head: bytes) -> str | None:
    """Name the format of ``path``, a file that begins with ``head`` or a folder, and what to do; None if unknown."""
    if not head:
        return next((what for name, what in _FOLDERS.items() if (path / name).exists()), None)
    if head.startswith(ZIP_MAGIC):
        return zip_format(path)
    if head[_TAR_AT:].startswith(_TAR_MAGIC):
        return f"a tar archive: {_UNPACK}"
    text = head.lstrip().lower()
    known = [what for magic, what in _MAGICS.items() if head.startswith(magic)]
    known += [what for start, what in _TEXTS.items() if text.startswith(start)]
    return known[0] if known else _SUFFIXES.get(path.suffix.lower())


def zip_format(path: Path) -> str | None:
    """Name the kind of a zip archive; None where it is damaged or looks like torch's, which compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        return f"a TorchScript program: {_SAVE}"
    if any(name.endswith(".npy") for name in names):
        return _SUFFIXES[".npz"]
    if "data.pkl" not in names:
        return f"a zip archive of other files: {_UNPACK}"
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return "a torch file that was compressed: unpack it, and pack it again without compression" if packed else None
