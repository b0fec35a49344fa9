"""Checks of a command's output files before any work: their names, places and what they would replace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from echo_rt.errors import ConfigError, TargetError
from echo_rt.utils.atomic_file import check_ending, check_results_folder, check_writable, raising
from echo_rt.utils.folder_lock import FolderClaim

_WEIGHTS = ("--checkpoint", "--lora", "--text-encoder", "--vae-file")  # options whose value may name several files
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
_INDEX_SUFFIX = ".safetensors.index.json"


class Named(NamedTuple):
    """A path and the option that names it."""

    option: str
    path: Path


def check_outputs(outputs: Sequence[tuple[Named, str]], inputs: Sequence[Named], *, overwrite: bool) -> None:
    """Check outputs, each with the ending that its name must have, against each other and against ``inputs``.

    An input folder stands for everything in it. Raises ``ConfigError`` for a wrong ending, for two outputs in one file
    and for an output that would replace an input, ``TargetError`` for a place that cannot be written to, and without
    ``overwrite`` for an existing file.
    """
    taken: dict[Path, str] = {}
    for output, suffix in outputs:
        other = taken.setdefault(_real(output.path), output.option)
        if other != output.option:
            raise ConfigError(f"{other} and {output.option}: expected two files, got {str(output.path)!r} for both")
        check_ending(output.path, suffix, output.option)
    for output, _ in outputs:
        check_apart(output, inputs, "file")
        check_writable(output.path)
        if not overwrite and os.path.exists(output.path):
            found = f"{output.path} exists; --overwrite replaces it"
            raise TargetError(f"{output.option}: expected the name of a new file, {found}")


def check_folder(output: Named, inputs: Sequence[Named]) -> None:
    """Check a folder to write into, which need not exist yet, against ``inputs``.

    Raises ``ConfigError`` if it lies in an input or contains one, ``TargetError`` if it cannot be a folder, or another
    process writes into it.
    """
    if os.path.isdir(output.path):
        FolderClaim(output.path).release()
    check_apart(output, inputs)
    for given in inputs:
        if _real(output.path) in _real(given.path).parents:
            raise _overlap(output, "folder", f"which holds {given.option} {given.path}")
    with raising(TargetError, f"{output.path}: cannot be a folder"):  # by its name
        folder = _real(output.path)
        if not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
            found = "a file" if folder.exists() else f"no folder {output.path.parent} to make it in"
            raise TargetError(f"{output.path}: expected a folder to write into, got {found}")


def check_results(output: Named, inputs: Sequence[Named]) -> None:
    """Check a folder for results, which is made with its parents when it is needed; raises as :func:`check_folder`."""
    check_apart(output, inputs)
    check_results_folder(output.path)


def check_apart(output: Named, inputs: Sequence[Named], kind: str = "folder") -> None:
    """Raise ``ConfigError`` for a file or folder to write that lies in an input."""
    # Several views of one place: the name itself may lie in a model folder and be a link that leads out of it.
    places = {_real(output.path), Path(os.path.abspath(output.path)), _real(output.path.parent) / output.path.name}
    for given in inputs:
        # With the targets of all links in a folder: only an existing file can be one.
        inner = given.path.rglob("*") if os.path.exists(output.path) and os.path.isdir(given.path) else ()
        sources = [_real(entry) for entry in (given.path, *(entry for entry in inner if entry.is_symlink()))]
        if any(place == source or source in place.parents for source in sources for place in places) or (
            given.option in _WEIGHTS and any(_is_part_of(place, given.path) for place in places)
        ):
            raise _overlap(output, kind, f"which belongs to {given.option} {given.path}")


def _overlap(output: Named, kind: str, why: str) -> ConfigError:
    return ConfigError(f"{output.option}: expected a {kind} apart from what is read, got {str(output.path)!r}, {why}")


def _real(path: Path) -> Path:
    # Path.resolve raises for circular links, and differently in each Python version.
    return Path(os.path.realpath(path))


def _is_part_of(place: Path, weights: Path) -> bool:
    """Whether ``place`` has the name of the file or of a shard of weights named by index or without an ending."""
    stem = weights.name.removesuffix(_INDEX_SUFFIX)
    whole = stem == weights.name and (weights.suffix.lower() in _WEIGHT_SUFFIXES or os.path.isdir(weights))
    return (
        not whole
        and place.parent == _real(weights.parent)
        and place.suffix.lower() in _WEIGHT_SUFFIXES
        and place.name.startswith((f"{stem}.", f"{stem}-"))
    )
