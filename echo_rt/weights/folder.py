"""A folder with a whole Wan2.1 model, in its original or in the diffusers layout, read part by part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights import layout_diffusers, layout_original
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.keymaps import KeyMap, text_encoder_key_map, transformer_key_map, vae_key_map
from echo_rt.weights.layout_diffusers import DiffusersLayout
from echo_rt.weights.layout_original import OriginalLayout
from echo_rt.weights.shapes import Shapes, text_encoder_shapes, transformer_shapes, vae_shapes
from echo_rt.weights.tensors import RenamedTensors

_ORIGINAL_MARKS = (
    layout_original.TRANSFORMER_CONFIG,
    layout_original.VAE_FILE,
    layout_original.TEXT_ENCODER_FILE,
)
_DIFFUSERS_MARKS = (
    layout_diffusers.TRANSFORMER_CONFIG,
    layout_diffusers.VAE_CONFIG,
    layout_diffusers.TEXT_ENCODER_CONFIG,
)
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
# transformers' second name for the token table; older versions write both.
_TABLE, _TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"


class _Layout(Protocol):
    """Where the parts of a model are, and their sizes."""

    name: str
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path

    def transformer_config(self) -> TransformerConfig: ...
    def rollout_defaults(self) -> dict[str, Any]: ...
    def vae_config(self) -> VaeConfig: ...
    def latents_config(self) -> VaeConfig: ...
    def text_encoder_config(self) -> TextEncoderConfig: ...


class ModelFolder:
    """A Wan2.1 text-to-video model on disk; make one with :meth:`open`.

    A part is read when it is asked for, and no file of another part is touched. All tensors come under Wan's original
    names, are mapped rather than loaded, and are checked: a missing, surplus or misshapen one is a ``WeightsError``.
    """

    def __init__(self, path: Path, layout: _Layout) -> None:
        self.path = path
        self._layout = layout

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """The model in folder ``path``, whose layout is told by the names of its files.

        Errors: ``WeightsError`` for a folder that is missing, is a file, or has no file of either layout.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise WeightsError(f"expected the path of a folder with a Wan2.1 model, got {path!r}")
        folder = Path(path)
        if not os.path.isdir(folder):
            came = "a file" if os.path.exists(folder) else "nothing there"
            raise WeightsError(f"{folder}: expected a folder with a Wan2.1 model, came {came}")
        # The configs of a diffusers folder lie deeper; a stray config.json above them says nothing.
        if any((folder / mark).exists() for mark in _DIFFUSERS_MARKS):
            return cls(folder, DiffusersLayout(folder))
        if any((folder / mark).exists() for mark in _ORIGINAL_MARKS):
            return cls(folder, OriginalLayout(folder))
        raise WeightsError(
            f"{folder}: expected a Wan2.1 model, either {', '.join(_ORIGINAL_MARKS)} (original layout) "
            f"or {', '.join(_DIFFUSERS_MARKS)} (diffusers layout), found none of them"
        )

    @property
    def layout(self) -> str:
        """``"original"`` or ``"diffusers"``."""
        return self._layout.name

    def transformer_config(self) -> TransformerConfig:
        """Sizes of the transformer, from its ``config.json``."""
        return self._layout.transformer_config()

    def rollout_defaults(self) -> dict[str, Any]:
        """How this model's video is rolled out: the object ``echo_rt`` of the transformer's ``config.json``.

        ``width`` and ``height`` in pixels, and keys of ``ModelConfig.from_flat``; empty for a stock Wan folder.
        """
        return self._layout.rollout_defaults()

    def transformer_tensors(self) -> Mapping[str, Tensor]:
        """The transformer."""
        return self._tensors(
            self._layout.transformer, transformer_shapes(self.transformer_config()), transformer_key_map()
        )

    def vae_config(self) -> VaeConfig:
        """Sizes of the VAE; in the original layout from the shapes of its tensors."""
        return self._layout.vae_config()

    def latents_config(self) -> VaeConfig:
        """What another decoder of its latents has to know of the VAE, which need not be there; no weights are read.

        Wan2.1's, where no config says otherwise.
        """
        return self._layout.latents_config()

    def vae_tensors(self) -> Mapping[str, Tensor]:
        """The whole VAE, encoder and decoder."""
        config = self.vae_config()
        return self._tensors(self._layout.vae, vae_shapes(config), vae_key_map(config))

    def text_encoder_config(self) -> TextEncoderConfig:
        """Sizes of the text encoder; in the original layout from the shapes of its tensors."""
        return self._layout.text_encoder_config()

    def text_encoder_tensors(self) -> Mapping[str, Tensor]:
        """The umT5 encoder."""
        shapes = text_encoder_shapes(self.text_encoder_config())
        return self._tensors(self._layout.text_encoder, shapes, text_encoder_key_map())

    def tokenizer_path(self) -> Path:
        """The tokenizer's folder."""
        path = self._layout.tokenizer
        if not path.is_dir():
            raise WeightsError(f"{path}: expected the tokenizer's folder, found none")
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise WeightsError(f"{path}: expected a tokenizer ({' or '.join(_TOKENIZER_FILES)}), found none of them")
        return path

    def _tensors(self, path: Path, shapes: Shapes, key_map: KeyMap) -> Mapping[str, Tensor]:
        file = open_tensors(path)
        if self._layout.name == OriginalLayout.name:
            check_tensors(file, shapes, str(file.path))
            return file
        found = _without_tied_table(file, str(file.path))
        # Held against the names that the file itself uses: those are the ones its owner can look for.
        check_tensors(found, key_map.to_other_shapes(shapes), str(file.path))
        return key_map.original_view(found, shapes)


def holds_vae(folder: Path) -> bool:
    """Whether there is a VAE of a model, in either layout, whatever else there is or lacks."""
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    return any(os.path.exists(folder / mark) for mark in (layout_original.VAE_FILE, layout_diffusers.VAE_CONFIG))


def _without_tied_table(tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """``tensors`` with a umT5's token table under one name only; anything else as it is."""
    if _TABLE_AGAIN not in tensors:
        return tensors
    names = {name: name for name in tensors if name != _TABLE_AGAIN}
    again = tensors[_TABLE_AGAIN]
    table = tensors.get(_TABLE)
    if table is None:
        names[_TABLE] = _TABLE_AGAIN
    elif table.dtype != again.dtype or not torch.equal(table, again):
        raise WeightsError(f"{source}: expected {_TABLE} and {_TABLE_AGAIN} to be one table, came two that differ")
    return RenamedTensors(tensors, names)
