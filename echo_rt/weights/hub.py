"""Models in the local Hugging Face cache, by their ids; nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from echo_rt.errors import WeightsError

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SNAPSHOTS = "snapshots"


def cache_folder() -> Path:
    """Where the hub's own tools keep what they download."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def local_model(model: Path, also: Sequence[str] = ()) -> Path:
    """The folder or file that ``model`` means: itself, a repository's newest snapshot, or that of a hub id.

    ``also``: further commands of a download, for the message about an id that is not in the cache.

    Errors: ``WeightsError`` for an id without a snapshot, with the commands that download it.
    """
    # os.path answers False where a path cannot exist at all; pathlib raises.
    if os.path.exists(model):
        return _snapshot(model) or model
    name = str(model)
    if not _ID.fullmatch(name):
        return model
    found = _snapshot(cache_folder() / f"models--{name.replace('/', '--')}")
    if found is None:
        commands = " && ".join((f"hf download {name}", *also))
        raise WeightsError(
            f"{name}: expected a folder, a file, or a model in the Hugging Face cache {cache_folder()}, found none; "
            f"to download it: {commands}"
        )
    return found


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that main refers to, else the newest; None where ``repository`` is no folder of the cache."""
    snapshots = repository / _SNAPSHOTS
    if not os.path.isdir(snapshots):
        return None
    reference = repository / "refs" / "main"  # a download by a commit's name leaves none
    if reference.is_file():
        main = snapshots / reference.read_text(encoding="utf-8", errors="replace").strip()
        if main.parent == snapshots and main.is_dir():
            return main
    return max(
        (each for each in snapshots.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime, default=None
    )
