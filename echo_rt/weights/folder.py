"""A whole Wan2.1 model, in a folder of its original or the diffusers layout or in single files, read part by part."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.options import DEMO, is_path
from echo_rt.weights.files import open_tensors
from echo_rt.weights.keymaps import bare
from echo_rt.weights.layouts import DIFFUSERS_MARKS, DIFFUSERS_VAE_CONFIG, OPTIONS, ORIGINAL_MARKS, VAE_FILE, Layout
from echo_rt.weights.parts import TEXT_ENCODER, TRANSFORMER, VAE, Config, Part, PartTensors

DEMO_FOLDER = Path(__file__).parents[1] / "demo_model"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class ModelFolder:
    """A Wan2.1 text-to-video model on disk; make one with :meth:`open`.

    A part is read when it is asked for, and no file of another part is touched. All tensors come under Wan's original
    names, are mapped rather than loaded, and are checked: a missing, surplus or misshapen one is a ``WeightsError``.
    """

    def __init__(self, path: Path, layout: Layout, given: Mapping[str, Path]) -> None:
        self.path = path
        self._layout = layout
        self._given = given

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        vae_file: str | Path | None = None,
        downloads: Sequence[str] = (),
    ) -> ModelFolder:
        """The model at ``path``: a folder, whose layout is told by the names of its files, or a transformer's file.

        The word ``demo`` is the model that the package holds; a folder of that name is ``./demo`` or a ``Path``.
        A folder of the Hugging Face cache stands for its newest snapshot, a hub id for that in the cache. What is given
        beside it takes the place of the model's own part. ``downloads``: commands that fetch what else is needed, for
        the message about an id that is not in the cache.

        Errors: ``WeightsError`` for what is missing, and for a folder without a file of any layout; ``ConfigError`` for
        a part that is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise WeightsError(f"expected the path of a folder with a Wan2.1 model, got {path!r}")
        named = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae_file": vae_file}
        for option, part in named.items():
            if part is not None and not is_path(part):
                raise ConfigError(f"{option} must be a path or None, got {part!r}")
        given = {option: Path(part) for option, part in named.items() if part is not None}
        for option, part in given.items():
            if not os.path.exists(part):
                raise WeightsError(f"{option}: expected a file or folder, found none at {part}")
        model = DEMO_FOLDER if path == DEMO else _local_model(Path(path), downloads)
        if os.path.isfile(model):
            return cls(model.parent, Layout(model.parent, model), given)
        if not os.path.isdir(model):
            raise WeightsError(f"{model}: expected a Wan2.1 model folder or file, but it does not exist")
        layout = Layout(model)
        if not layout.present:
            raise WeightsError(
                f"{model}: expected a Wan2.1 model, either {', '.join(ORIGINAL_MARKS)} (original layout), "
                f"{', '.join(DIFFUSERS_MARKS)} (diffusers layout) or files with ComfyUI's names, found none of them"
            )
        return cls(model, layout, given)

    def transformer_config(self) -> TransformerConfig:
        """Sizes of the transformer, from its ``config.json``, else from the shapes of its tensors."""
        return self._config(TRANSFORMER)

    def rollout_defaults(self) -> dict[str, Any]:
        """Facts of the rollout of this model's video: the object ``echo_rt`` of the transformer's ``config.json``.

        ``width`` and ``height`` in pixels, and keys of ``ModelConfig.from_flat``; empty for a stock Wan folder.
        """
        return self._layout.rollout_defaults()

    def transformer_tensors(self) -> Mapping[str, Tensor]:
        """The transformer."""
        return self._tensors(TRANSFORMER)

    def vae_config(self) -> VaeConfig:
        """Sizes of the VAE, from its config, else from the shapes of its tensors."""
        return self._config(VAE)

    def latents_config(self) -> VaeConfig:
        """The VAE's sizes that another decoder of its latents needs; no weights are read, and the VAE may be missing.

        Wan2.1's, where no config says otherwise.
        """
        return self._stated(VAE) or VaeConfig()

    def vae_tensors(self) -> Mapping[str, Tensor]:
        """The whole VAE, encoder and decoder."""
        return self._tensors(VAE)

    def text_encoder_config(self) -> TextEncoderConfig:
        """Sizes of the text encoder, from its config, else from the shapes of its tensors."""
        return self._config(TEXT_ENCODER)

    def text_encoder_tensors(self) -> Mapping[str, Tensor]:
        """The umT5 encoder."""
        return self._tensors(TEXT_ENCODER)

    def tokenizer_path(self) -> Path:
        """The tokenizer's folder."""
        path = self._given.get("tokenizer") or self._layout.tokenizer
        if not path.is_dir():
            raise WeightsError(f"{path}: expected the tokenizer's folder, found none (another is given as tokenizer)")
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise WeightsError(f"{path}: expected a tokenizer ({' or '.join(_TOKENIZER_FILES)}), found none of them")
        return path

    @property
    def vae_source(self) -> Path:
        """The path that the VAE is read from, for messages: its own file where one was given, else the model."""
        return self._given.get("vae_file", self.path)

    def _config(self, part: Part[Config]) -> Config:
        return self._stated(part) or self._open(part).config()

    def _tensors(self, part: Part[Config]) -> Mapping[str, Tensor]:
        return self._open(part).original(self._stated(part))

    def _stated(self, part: Part[Config]) -> Config | None:
        """Sizes from a config, which is not that of a file given in place of the model's own."""
        stated: Config | None = None if OPTIONS[part.name] in self._given else self._layout.config(part.name)
        return stated

    def _open(self, part: Part[Config]) -> PartTensors[Config]:
        path = self._given.get(OPTIONS[part.name]) or self._layout.file(part.name)
        file = open_tensors(path, widen_to=part.widen_to)
        return PartTensors(part, bare(file, str(file.path)), str(file.path))


def holds_vae(folder: Path) -> bool:
    """Return whether ``folder`` holds a VAE in either layout, whatever else it holds or lacks."""
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    return any(os.path.exists(folder / mark) for mark in (VAE_FILE, DIFFUSERS_VAE_CONFIG))


def _cache_folder() -> Path:
    """The folder in which the tools of the Hugging Face hub keep downloads."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def _local_model(model: Path, also: Sequence[str] = ()) -> Path:
    """The folder or file that ``model`` means: itself, a repository's newest snapshot, or that of a hub id.

    ``also``: further commands of a download, for the message about an id that is not in the cache.

    Errors: ``WeightsError`` for an id without a snapshot, with the commands that download it.
    """
    # os.path answers False where a path cannot exist at all; pathlib raises.
    if os.path.exists(model):
        return _snapshot(model) or model
    name = str(model)
    if not _HUB_ID.fullmatch(name):
        return model
    found = _snapshot(_cache_folder() / f"models--{name.replace('/', '--')}")
    if found is None:
        commands = " && ".join((f"hf download {name}", *also))
        raise WeightsError(
            f"{name}: expected a folder, a file, or a model in the Hugging Face cache {_cache_folder()}, found none; "
            f"to download it: {commands}"
        )
    return found


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that main refers to, else the newest; None where ``repository`` is no folder of the cache."""
    snapshots = repository / "snapshots"
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
