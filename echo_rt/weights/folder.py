"""A whole Wan2.1 model, read part by part: in its own folder, in diffusers', or in single files like ComfyUI's.

A part is called ``"transformer"``, ``"vae"`` or ``"text_encoder"``. Its sizes are those of its config, if there is one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

from torch import Tensor

from echo_rt.config import Size, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError, did_you_mean
from echo_rt.options import DEMO, HUB_ID, is_path
from echo_rt.utils.checked_json import convert
from echo_rt.utils.packages import needing
from echo_rt.utils.wording import type_of
from echo_rt.weights.files import SUFFIXES, open_tensors
from echo_rt.weights.parts import TEXT_ENCODER, TRANSFORMER, VAE, Config, Part, PartTensors, bare
from echo_rt.weights.reading import names_in, read_object
from echo_rt.weights.shapes import configured
from echo_rt.weights.tensors import first_names

DEMO_FOLDER = Path(__file__).parents[1] / "demo_model"
TRANSFORMER_CONFIG = "config.json"
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
_ORIGINAL_MARKS = (TRANSFORMER_CONFIG, VAE_FILE, TEXT_ENCODER_FILE)
_DIFFUSERS_MARKS = ("transformer/config.json", "vae/config.json", "text_encoder/config.json")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_DEFAULTS_KEY = "echo_rt"
_WAN_FIELD = "freq_dim"  # both Wan's and diffusers' config of the transformer have it, and no other model's
_DIFFUSERS_FIELD = "num_attention_heads"  # of the two, diffusers' alone has it
_HUB_NAME = 200  # characters at most, of a snapshot


@dataclass(frozen=True)
class _Format:
    """The config of one network as one program writes it.

    ``expected``: values of fields that tell ``what`` from other networks, each of which may be left out; ``required``
    and ``optional`` (left out or null): the program's name of a field -> ours; ``product``: our name of a size and the
    two whole numbers that it is the product of.
    """

    what: str
    make: type
    expected: Mapping[str, tuple[Any, ...]]
    required: Mapping[str, str]
    optional: Mapping[str, str]
    product: tuple[str, str, str] | None = None

    def parse(self, config: dict[str, Any], path: Path) -> Any:
        """The sizes in ``config``, the content of ``path``; ``WeightsError``, which names it, for no such config."""
        for name, allowed in self.expected.items():
            if name in config and config[name] not in allowed:
                wanted = " or ".join(json.dumps(value) for value in allowed)
                found = json.dumps(config[name])
                raise WeightsError(f"{path}: expected {self.what} ({name} {wanted}), found {name} {found:.80}")
        size, *factors = self.product or ("",)
        needed = dict.fromkeys((*self.required, *factors))
        missing = [name for name in needed if name not in config]
        if missing:
            raise WeightsError(f"{path}: expected the fields {', '.join(needed)}, found no {', '.join(missing)}")
        names = {name: ours for name, ours in self.optional.items() if config.get(name) is not None}
        sizes = {ours: config[name] for name, ours in {**self.required, **names}.items()}
        if factors:
            one, other = (convert(config[name], Size, f"{path}: {name}", WeightsError) for name in factors)
            sizes[size] = one * other
        return configured(self.make, path, **sizes)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_WAN_TRANSFORMER = _Format(
    "the config of a Wan2.1 text-to-video model",
    TransformerConfig,
    {"model_type": ("t2v",)},
    _same("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers"),
    {"in_dim": "in_channels", "out_dim": "out_channels"} | _same("text_dim", "text_len", "patch_size", "eps"),
)
_DIFFUSERS_TRANSFORMER = _Format(
    "the config of a Wan2.1 text-to-video transformer",
    TransformerConfig,
    {
        # The second is FastVideo's: the same tensors under the same names.
        "_class_name": ("WanTransformer3DModel", "CausalWanTransformer3DModel"),
        # Set only where images condition the video.
        "image_dim": (None,),
        "added_kv_proj_dim": (None,),
        "cross_attn_norm": (True,),
        "qk_norm": ("rms_norm_across_heads",),
    },
    {"num_attention_heads": "num_heads"} | _same("ffn_dim", "freq_dim", "num_layers", "in_channels"),
    _same("out_channels", "text_dim", "text_len", "patch_size", "eps"),
    ("dim", "num_attention_heads", "attention_head_dim"),
)
_DIFFUSERS_VAE = _Format(
    "the config of the Wan2.1 VAE",
    VaeConfig,
    {
        "_class_name": ("AutoencoderKLWan",),
        # What Wan2.2's VAE adds to this one.
        "is_residual": (False,),
        "patch_size": (None,),
        "attn_scales": ([],),
        "in_channels": (3,),
        "out_channels": (3,),
        "decoder_base_dim": (None,),
    },
    _same("base_dim", "z_dim"),
    # The misspelling is diffusers' own.
    {"temperal_downsample": "temporal_downsample"} | _same("dim_mult", "num_res_blocks", "latents_mean", "latents_std"),
)
_TRANSFORMERS_UMT5 = _Format(
    "the config of a umT5 encoder",
    TextEncoderConfig,
    {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)},
    _same("vocab_size", "d_model", "d_ff", "num_heads", "num_layers"),
    {"layer_norm_epsilon": "eps"} | _same("relative_attention_num_buckets", "relative_attention_max_distance"),
    ("d_attn", "num_heads", "d_kv"),
)

# Of Wan's config of the transformer -> ours.
WAN_FIELDS = {**_WAN_TRANSFORMER.required, **_WAN_TRANSFORMER.optional}


class _Place(NamedTuple):
    """Where a part lies: the option that replaces it, and its file, or the stem of it, in each layout.

    ``format``: of diffusers' config beside its file; ``names``: a pattern of single files, in lower case, which may lie
    in ``folders`` of ComfyUI.
    """

    option: str
    original: str
    diffusers: str
    format: _Format
    names: str
    folders: tuple[str, ...]


_TEXT_FOLDERS = ("text_encoders", "clip")
_STEMS = (TRANSFORMER_STEM, f"transformer/{TRANSFORMER_STEM}")
_PLACES = {
    "transformer": _Place("model", *_STEMS, _DIFFUSERS_TRANSFORMER, r"wan.*t2v.*1[._]3b", ("diffusion_models", "unet")),
    "vae": _Place("vae_file", VAE_FILE, f"vae/{TRANSFORMER_STEM}", _DIFFUSERS_VAE, r"wan_?(2[._]1)?_?vae", ("vae",)),
    "text_encoder": _Place(
        "text_encoder", TEXT_ENCODER_FILE, "text_encoder/model", _TRANSFORMERS_UMT5, r"umt5[_-]xxl", _TEXT_FOLDERS
    ),
}
_ROOTS = (".", "models", "split_files")  # in which single files lie, or ComfyUI's folders
_TOKENIZERS = (TOKENIZER_FOLDER, "tokenizer", "umt5-xxl")  # of which one is enough


class FolderPart(Generic[Config]):
    """One part of a model in the folder ``root``, or in a ``file`` named in place of the folder's own.

    It is read when it is asked for, and no file of another part is touched. All tensors come under Wan's original
    names, are mapped rather than loaded, and are checked: a missing, surplus or misshapen one is a ``WeightsError``.
    """

    def __init__(self, part: Part[Config], root: Path, file: Path | None, diffusers: bool) -> None:
        self._part: Part[Config] = part
        self._place, self._root, self._file, self._diffusers = _PLACES[part.name], root, file, diffusers

    def config(self) -> Config:
        """The sizes in its config, else those that the shapes of its tensors say."""
        return self.stated() or self._opened().config()

    def tensors(self) -> Mapping[str, Tensor]:
        return self._opened().original(self.stated())

    @property
    def source(self) -> Path:
        """The path that it is read from, for messages."""
        return self._file or self._root

    def stated(self) -> Config | None:
        """The sizes in its config, where it has one; no weights are read, and they may be missing."""
        found = self.read_config()
        if found is None:
            return None
        by_wan = not self._diffusers and _DIFFUSERS_FIELD not in found[0]
        stated: Config = (_WAN_TRANSFORMER if by_wan else self._place.format).parse(*found)
        return stated

    def read_config(self) -> tuple[dict[str, Any], Path] | None:
        """The content and path of its config; None where shapes have to say the sizes."""
        is_transformer = self._part.name == TRANSFORMER.name
        folder = self._root / self._part.name if self._diffusers else self._root
        path = folder / TRANSFORMER_CONFIG
        if not is_transformer and (self._file is not None or not self._diffusers):
            return None
        if not path.exists() and not (is_transformer and self._diffusers):
            return None
        config: dict[str, Any] = read_object(path, (self._place.format if self._diffusers else _WAN_TRANSFORMER).what)
        # Beside a file that was named there may be the config of anything.
        return None if self._file is not None and _WAN_FIELD not in config else (config, path)

    def _opened(self) -> PartTensors[Config]:
        file = open_tensors(self._file or self._found(), widen_to=self._part.widen_to)
        return PartTensors(self._part, bare(file, str(file.path)), str(file.path))

    def _found(self) -> Path:
        """Its file in the folder, or its stem, which need not be there: the usual name, else the only other one.

        Errors: ``WeightsError`` for several that fit.
        """
        usual = self._root / (self._place.diffusers if self._diffusers else self._place.original)
        stem = "" if usual.suffix else f"{usual.name}."
        if self._diffusers or usual.exists() or (stem and any(n.startswith(stem) for n in names_in(usual.parent))):
            return usual
        found = self.other_files()
        if len(found) > 1:
            listed = first_names([str(file.relative_to(self._root)) for file in found])
            option = self._place.option
            raise WeightsError(f"{self._root}: expected one file, found {listed}; give the one to use as {option}")
        return found[0] if found else usual

    def other_files(self) -> list[Path]:
        """The files in the folder with names that ComfyUI's users give to this part."""
        folders = [self._root / root / sub for root in _ROOTS for sub in (".", *self._place.folders)]
        files = [folder / name for folder in folders if folder.is_dir() for name in names_in(folder)]
        files = [file for file in files if file.suffix.lower() in SUFFIXES]
        return sorted(file for file in files if re.search(self._place.names, file.name.lower()))


class ModelFolder:
    """A Wan2.1 text-to-video model on disk, made of parts; make one with :meth:`open`."""

    def __init__(self, path: Path, transformer: Path | None, given: Mapping[str, Path]) -> None:
        """A model in ``path``; ``transformer``: its file where that was named, ``given``: parts by their options."""
        self.path, self._tokenizer = path, given.get("tokenizer")
        # The configs of a diffusers folder lie deeper; a stray config.json above them says nothing.
        self._diffusers = transformer is None and any((path / mark).exists() for mark in _DIFFUSERS_MARKS)
        self.transformer = FolderPart(TRANSFORMER, path, transformer, self._diffusers)
        self.vae = FolderPart(VAE, path, given.get("vae_file"), self._diffusers)
        self.text_encoder = FolderPart(TEXT_ENCODER, path, given.get("text_encoder"), self._diffusers)

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
        given: dict[str, Path] = {}
        for option, part in (("text_encoder", text_encoder), ("tokenizer", tokenizer), ("vae_file", vae_file)):
            if part is None:
                continue
            if not is_path(part):
                raise ConfigError(f"{option} must be a path or None, got {part!r}")
            if not os.path.exists(part):
                raise WeightsError(f"{option}: expected a file or folder, found none at {part}")
            given[option] = Path(part)
        model = DEMO_FOLDER if path == DEMO else _local_model(Path(path), downloads)
        if os.path.isfile(model):
            return cls(model.parent, model, given)
        if not os.path.isdir(model):
            hint = did_you_mean(str(path), (DEMO,)) or " (echo-rt recipes shows what to download)"
            raise WeightsError(f"{model}: expected a Wan2.1 model folder or file, but it does not exist{hint}")
        folder = cls(model, None, given)
        marked = any((model / mark).exists() for mark in (*_ORIGINAL_MARKS, *_DIFFUSERS_MARKS))
        parts = (folder.transformer, folder.vae, folder.text_encoder)
        if not marked and not any(part.other_files() for part in parts):
            raise WeightsError(
                f"{model}: expected a Wan2.1 model, either {', '.join(_ORIGINAL_MARKS)} (original layout), "
                f"{', '.join(_DIFFUSERS_MARKS)} (diffusers layout) or files with ComfyUI's names, found none of them"
            )
        return folder

    def latents_config(self) -> VaeConfig:
        """The VAE's sizes that another decoder of its latents needs: its config's, else Wan2.1's."""
        return self.vae.stated() or VaeConfig()

    def rollout_defaults(self) -> dict[str, Any]:
        """Facts of the rollout of this model's video: the object ``echo_rt`` of the transformer's ``config.json``.

        ``width`` and ``height`` in pixels, and keys of ``ModelConfig.from_flat``; empty for a stock Wan folder.
        """
        config, path = self.transformer.read_config() or ({}, self.path)
        defaults = config.get(_DEFAULTS_KEY, {})
        if not isinstance(defaults, dict):
            raise WeightsError(f'{path}: expected "{_DEFAULTS_KEY}" to be an object, found {type_of(defaults)}')
        return dict(defaults)

    def tokenizer_path(self) -> Path:
        """The tokenizer's folder."""
        names = ("tokenizer",) if self._diffusers else _TOKENIZERS
        places = [self.path / name for name in names]
        path = self._tokenizer or next((place for place in places if place.is_dir()), places[0])
        if not path.is_dir():
            raise WeightsError(f"{path}: expected the tokenizer's folder, found none (another is given as tokenizer)")
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise WeightsError(f"{path}: expected a tokenizer ({' or '.join(_TOKENIZER_FILES)}), found none of them")
        return path


def holds_vae(folder: Path) -> bool:
    """Return whether ``folder`` holds a VAE in either layout, whatever else it holds or lacks."""
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    return any(os.path.exists(folder / mark) for mark in (VAE_FILE, _DIFFUSERS_MARKS[1]))


def _local_model(model: Path, also: Sequence[str]) -> Path:
    """The folder or file that ``model`` means: itself, a repository's newest snapshot, or that of a hub id.

    ``also``: further commands of a download, for the ``WeightsError`` about an id that is not in the cache.
    """
    # os.path answers False where a path cannot exist at all; pathlib raises.
    if os.path.exists(model):
        return _snapshot(model) or model
    if not HUB_ID.fullmatch(str(model)):
        return model
    with needing("huggingface_hub", "the Hugging Face cache"):
        from huggingface_hub.constants import HF_HUB_CACHE
    cache = Path(HF_HUB_CACHE)
    found = _snapshot(cache / f"models--{str(model).replace('/', '--')}")
    if found is None:
        raise WeightsError(
            f"{model}: expected a folder, a file, or a model in the Hugging Face cache {cache}, found none; "
            f"to download it: {' && '.join((f'hf download {model}', *also))}"
        )
    return found


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that main refers to, else the newest; None where ``repository`` is no folder of the cache."""
    snapshots = repository / "snapshots"
    if not os.path.isdir(snapshots):
        return None
    reference = repository / "refs" / "main"  # a download by a commit's name leaves none
    if reference.is_file():
        with reference.open(encoding="utf-8", errors="replace") as file:
            main = snapshots / file.read(_HUB_NAME).strip()
        if main.parent == snapshots and main.is_dir():
            return main
    found = [snapshots / name for name in names_in(snapshots)]
    return max((each for each in found if each.is_dir()), key=lambda each: each.stat().st_mtime, default=None)
