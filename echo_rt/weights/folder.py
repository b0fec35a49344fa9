"""A whole Wan2.1 model, in a folder of its original or the diffusers layout or in single files, read part by part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.weights import layout_diffusers, layout_original
from echo_rt.weights.hub import local_model
from echo_rt.weights.layout_diffusers import DiffusersLayout
from echo_rt.weights.layout_original import OriginalLayout
from echo_rt.weights.parts import TEXT_ENCODER, TRANSFORMER, VAE, PartTensors, open_part

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


class _Layout(Protocol):
    """Where the parts of a model are, and the sizes that a config says; None where shapes have to say them."""

    @property
    def name(self) -> str: ...
    @property
    def transformer(self) -> Path: ...
    @property
    def vae(self) -> Path: ...
    @property
    def text_encoder(self) -> Path: ...
    @property
    def tokenizer(self) -> Path: ...

    def transformer_config(self) -> TransformerConfig | None: ...
    def rollout_defaults(self) -> dict[str, Any]: ...
    def vae_config(self) -> VaeConfig | None: ...
    def text_encoder_config(self) -> TextEncoderConfig | None: ...


class ModelFolder:
    """A Wan2.1 text-to-video model on disk; make one with :meth:`open`.

    A part is read when it is asked for, and no file of another part is touched. All tensors come under Wan's original
    names, are mapped rather than loaded, and are checked: a missing, surplus or misshapen one is a ``WeightsError``.
    """

    def __init__(self, path: Path, layout: _Layout, given: Mapping[str, Path]) -> None:
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
            if part is not None and not (isinstance(part, (str, os.PathLike)) and os.fspath(part)):
                raise ConfigError(f"{option} must be a path or None, got {part!r}")
        given = {option: Path(part) for option, part in named.items() if part is not None}
        for option, part in given.items():
            if not os.path.exists(part):
                raise WeightsError(f"{option}: expected a file or folder, found none at {part}")
        model = local_model(Path(path), downloads)
        if os.path.isfile(model):
            return cls(model.parent, OriginalLayout(model.parent, model), given)
        if not os.path.isdir(model):
            raise WeightsError(f"{model}: expected a Wan2.1 model folder or file, but it does not exist")
        # The configs of a diffusers folder lie deeper; a stray config.json above them says nothing.
        if any((model / mark).exists() for mark in _DIFFUSERS_MARKS):
            return cls(model, DiffusersLayout(model), given)
        layout = OriginalLayout(model)
        if not layout.present:
            raise WeightsError(
                f"{model}: expected a Wan2.1 model, either {', '.join(_ORIGINAL_MARKS)} (original layout), "
                f"{', '.join(_DIFFUSERS_MARKS)} (diffusers layout) or files with ComfyUI's names, found none of them"
            )
        return cls(model, layout, given)

    @property
    def layout(self) -> str:
        """``"original"``, ``"diffusers"``, or ``"files"`` for single files with no config beside them."""
        return self._layout.name

    def transformer_config(self) -> TransformerConfig:
        """Sizes of the transformer, from its ``config.json``, else from the shapes of its tensors."""
        return self._layout.transformer_config() or open_part(TRANSFORMER, self._layout.transformer).config()

    def rollout_defaults(self) -> dict[str, Any]:
        """How this model's video is rolled out: the object ``echo_rt`` of the transformer's ``config.json``.

        ``width`` and ``height`` in pixels, and keys of ``ModelConfig.from_flat``; empty for a stock Wan folder.
        """
        return self._layout.rollout_defaults()

    def transformer_tensors(self) -> Mapping[str, Tensor]:
        """The transformer."""
        config = self._layout.transformer_config()
        found = open_part(TRANSFORMER, self._layout.transformer)
        return found.original(config or found.config())

    def vae_config(self) -> VaeConfig:
        """Sizes of the VAE, from its config, else from the shapes of its tensors."""
        return self._configured_vae() or open_part(VAE, self._vae).config()

    def latents_config(self) -> VaeConfig:
        """What another decoder of its latents has to know of the VAE, which need not be there; no weights are read.

        Wan2.1's, where no config says otherwise.
        """
        return self._configured_vae() or VaeConfig()

    def vae_tensors(self) -> Mapping[str, Tensor]:
        """The whole VAE, encoder and decoder."""
        found = open_part(VAE, self._vae)
        return found.original(self._configured_vae() or found.config())

    def text_encoder_config(self) -> TextEncoderConfig:
        """Sizes of the text encoder, from its config, else from the shapes of its tensors."""
        return self._configured_text_encoder() or self._open_text_encoder().config()

    def text_encoder_tensors(self) -> Mapping[str, Tensor]:
        """The umT5 encoder."""
        found = self._open_text_encoder()
        return found.original(self._configured_text_encoder() or found.config())

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
        """What the VAE is read from, for messages: its own file where one was given, else the model."""
        return self._given.get("vae_file", self.path)

    @property
    def _vae(self) -> Path:
        return self._given.get("vae_file") or self._layout.vae

    def _configured_vae(self) -> VaeConfig | None:
        return None if "vae_file" in self._given else self._layout.vae_config()

    def _configured_text_encoder(self) -> TextEncoderConfig | None:
        return None if "text_encoder" in self._given else self._layout.text_encoder_config()

    def _open_text_encoder(self) -> PartTensors[TextEncoderConfig]:
        path = self._given.get("text_encoder") or self._layout.text_encoder
        # It is kept as it is stored or narrower: what was quantized takes no more room than the released file.
        return open_part(TEXT_ENCODER, path, widen_to=torch.bfloat16)


def holds_vae(folder: Path) -> bool:
    """Whether there is a VAE of a model, in either layout, whatever else there is or lacks."""
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    return any(os.path.exists(folder / mark) for mark in (layout_original.VAE_FILE, layout_diffusers.VAE_CONFIG))
