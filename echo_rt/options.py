"""What users may choose, checked: modes, dtypes, seeds, sizes, settings of the rollout. Does not import torch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from echo_rt.config import TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, did_you_mean, not_one_of
from echo_rt.recipes import find_recipe

if TYPE_CHECKING:
    import torch

# Width and height of the released recipe's video in pixels, for a Wan folder that names none.
RELEASED_SIZE = (832, 480)

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float8")
DTYPE_ALIASES = dict(fp32="float32", float="float32", bf16="bfloat16", fp16="float16", half="float16", fp8="float8")
# Dtypes that the VAE can decode in.
VAE_DTYPE_NAMES = ("float32", "bfloat16", "float16")

# The decoder that turns latents into frames: the model's own VAE, or a tiny one in its folder. Or a path.
WAN_VAE, TINY_VAE = "wan", "tiny"

# Settings of a rollout that a caller may choose, or the object "echo_rt" in a model folder's config.json. All others
# come from the weights.
OVERRIDES = (
    *("frames_per_block", "sink_frames", "local_frames", "max_temporal_id"),
    *("denoising_steps", "first_block_steps", "timestep_shift", "context_timestep"),
    *("memory_frames", "memory_reads", "rebuild_on_prompt_switch", "recache_sink"),
)
# Further settings of a model folder; its recipe has the values that the folder does not state. Its checkpoint is a file
# in it, used where the caller gives none. Its words are all that its prompts may have, for a model of a small world.
RECIPE, CHECKPOINT, WORDS = "recipe", "checkpoint", "words"
FOLDER_FACTS = ("width", "height", "tiny_seed", RECIPE, CHECKPOINT, WORDS)

# The model that the package holds (a folder of that name is written ./demo), and a prompt of words that it knows.
DEMO = "demo"
DEMO_PROMPT = "a red ball bouncing in the desert"

# Id of a model on the Hugging Face hub.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# LoRAs as callers give them: a path, or a sequence of paths and (path, strength) pairs.
Lora = str | Path | Sequence[str | Path | tuple[str | Path, float]] | None

# How an initial video of another size is fitted: cropped, or padded with black.
FITS = CROP, PAD = "crop", "pad"
# Longest initial video, at the model's frame rate. Its latents wait on the host: 0.1 MB per frame of 832x480.
MOST_INITIAL_SECONDS = 600

_SEEDS = 2**64


class Codec(NamedTuple):
    """An encoder of FFmpeg: its presets, its option of constant quality with the highest value, and our defaults."""

    encoder: str
    presets: tuple[str, ...]
    preset: str
    quality: str
    crf: float
    most: int
    options: Mapping[str, str] = MappingProxyType({})


_X26 = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
_P = tuple(f"p{number}" for number in range(1, 8))
_VARIABLE = MappingProxyType({"rc": "vbr", "b": "0"})  # or cq has no effect
CODECS = {
    "h264": Codec("libx264", _X26, "veryfast", "crf", 18, 51),
    "hevc": Codec("libx265", _X26, "veryfast", "crf", 20, 51, {"x265-params": "log-level=error:open-gop=0"}),
    "av1": Codec("libsvtav1", tuple(map(str, range(14))), "10", "crf", 28, 63),
    "h264_nvenc": Codec("h264_nvenc", _P, "p4", "cq", 19, 51, _VARIABLE),
    "hevc_nvenc": Codec("hevc_nvenc", _P, "p4", "cq", 21, 51, _VARIABLE),
    "av1_nvenc": Codec("av1_nvenc", _P, "p4", "cq", 28, 63, _VARIABLE),
}
_OTHERS = {"h265": "hevc", "x265": "hevc", "libx265": "hevc", "avc": "h264"}  # names of these elsewhere


def find_codec(codec: str, crf: float | None, preset: str | None) -> tuple[Codec, float, str]:
    """Return a codec with its quality and preset, by default its own; :class:`ConfigError` for what it has not."""
    if codec not in CODECS:
        hint = did_you_mean(_OTHERS.get(codec, codec), CODECS)
        raise ConfigError(f"codec: expected one of {', '.join(CODECS)}, got {codec!r}{hint}")
    chosen = CODECS[codec]
    crf, preset = chosen.crf if crf is None else crf, chosen.preset if preset is None else preset
    if preset not in chosen.presets:
        hint = did_you_mean(preset, chosen.presets)
        raise ConfigError(f"preset of {codec}: expected one of {', '.join(chosen.presets)}, got {preset!r}{hint}")
    if not 0 <= crf <= chosen.most:
        raise ConfigError(f"crf of {codec}: expected 0 (best) to {chosen.most}, got {crf:g}")
    return chosen, crf, preset


# What to do instead of what other libraries' pipelines take or can do, and ours do not.
_INSTEAD = {
    "a stream has no end; take as many blocks as you need, as in itertools.islice(stream, 10)": "num_frames",
    "these models are distilled, and guidance is in their weights; say in the prompt what there should be": (
        "negative_prompt negative_prompt_embeds guidance_scale guidance_scale_2"
    ),
    "noise is a function of the seed; give seed=, an integer, or noise=, a function": "generator",
    "give noise=, a function, or initial_latents=, the beginning of the video, to Runtime.stream": "latents",
    "frames that a video begins with are initial_video= of Runtime.stream": "image video last_image strength",
    "a video has no end; iterate over runtime.stream(prompt, seed=...), whose chunks have frames": "__call__",
    "every chunk has its frames as chunk.frames, chunk.numpy() and chunk.pil()": "output_type",
    "a stream hands out chunks; iterate over it": "return_dict",
    "a stream hands out its blocks as they are made; iterate over it": (
        "callback callback_on_step_end set_progress_bar_config progress_bar"
    ),
    "a runtime makes one video at a time; stream again with another seed=": "num_videos_per_prompt",
    "the size is the runtime's, frame_size; give width= and height= to Runtime.from_pretrained": "height width",
    "the frame rate is the model's, runtime.fps": "fps frame_rate",
    "the length of a prompt is the model's": "max_sequence_length",
    "the weights are trained for their recipe's steps; from_pretrained(..., overrides={'denoising_steps': ...}) "
    "changes them": "num_inference_steps timesteps sigmas scheduler eta",
    "a model is on one device; give device=": "device_map",
    "a model stays where and as it was loaded; give device= and dtype= to Runtime.from_pretrained": (
        "to cuda cpu half float bfloat16"
    ),
    "files of a variant are found by themselves, and dtype= says what they are computed in": "variant",
    "nothing is downloaded; give the folder or file itself, as in text_encoder=, tokenizer= or vae_file=": (
        "revision cache_dir local_files_only token use_safetensors trust_remote_code from_single_file save_pretrained"
    ),
    "to need less memory, give vae_tiles=, keep_text_encoder=False or dtype='float8' to from_pretrained": (
        "low_cpu_mem_usage quantization_config max_memory offload_folder enable_model_cpu_offload "
        "enable_sequential_cpu_offload enable_group_offload enable_vae_tiling disable_vae_tiling enable_vae_slicing "
        "enable_attention_slicing maybe_free_model_hooks"
    ),
    "LoRAs are merged as the model is loaded; give lora= to Runtime.from_pretrained": (
        "load_lora_weights fuse_lora set_adapters unload_lora_weights"
    ),
    "give attention= to Runtime.from_pretrained": "enable_xformers_memory_efficient_attention attention_kwargs",
    "the parts of the model are the runtime's own, in kernels and graphs; from_pretrained takes their files, as in "
    "text_encoder=, tokenizer= and vae_file=": "transformer unet text_encoder tokenizer image_processor components",
    "a stream decodes its own blocks, as chunk.frames beside chunk.latents; the decoder that vae= of "
    "Runtime.from_pretrained chose is named by runtime.decoder": "vae",
    "it is compiled and in inference already": "compile eval train requires_grad_",
}
_NOT_HERE = {name: answer for answer, names in _INSTEAD.items() for name in names.split()}

P = ParamSpec("P")
_Options = TypeVar("_Options", bound="RuntimeOptions")
R = TypeVar("R")


def explains_habits(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that arguments of other libraries' functions get an answer: :class:`ConfigError`.

    The ``TypeError`` about any other unknown name says which one may be meant.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def explaining(*arguments: P.args, **options: P.kwargs) -> R:
        for name in (name for name in options if name not in known):
            if name in _NOT_HERE:
                raise ConfigError(f"{function.__qualname__} has no {name}: {_NOT_HERE[name]}")
            if meant := did_you_mean(name, known):
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{meant}")
        return function(*arguments, **options)

    return explaining


class NotHereError(ConfigError, AttributeError):
    """An attribute of other libraries' pipelines, with an answer; for ``hasattr`` and ``getattr`` it is not there."""


class ExplainsHabits:
    """Base of a class in which attributes of other libraries' pipelines get an answer: :class:`NotHereError`."""

    if not TYPE_CHECKING:  # type checkers are to report them

        def __getattr__(self, name):
            if name in _NOT_HERE:
                raise NotHereError(f"{type(self).__name__} has no {name}: {_NOT_HERE[name]}", name=name, obj=self)
            return object.__getattribute__(self, name)  # raises the usual error

        def __call__(self, *arguments, **options):
            return self.__getattr__("__call__")


class MemoryMode(str, Enum):
    """How the memory behaves: it evolves with the video, stays as it was learned, or is off."""

    EVOLVE = "evolve"
    PRIOR = "prior"
    OFF = "off"

    @classmethod
    def parse(cls, value: str | MemoryMode) -> MemoryMode:
        """Return the mode called ``value``; :class:`ConfigError` names the choices."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(not_one_of("memory", (mode.value for mode in cls), value)) from None


@dataclass(frozen=True)
class RuntimeOptions:
    """How a model is loaded and runs; :meth:`echo_rt.Runtime.from_pretrained` explains each option.

    Raises :class:`ConfigError` for what is wrong on any device and with any model.
    """

    checkpoint: str | Path | None = None
    lora: Lora = None
    lora_alpha: float | None = None
    ema: bool | None = None
    recipe: str | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    float8_except: Sequence[str] = ()
    vae_dtype: str | torch.dtype | None = None
    memory: str | MemoryMode | None = None
    vae: str | Path = WAN_VAE
    vae_tiles: int = 1
    vae_file: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    backend: str | None = None
    attention: str | None = None
    linear: str | None = None
    convolution: str | None = None
    graphs: bool | None = None
    lookahead: int | None = None
    width: int | None = None
    height: int | None = None
    overrides: Mapping[str, Any] | None = None
    check: bool = False
    keep_text_encoder: bool | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None:
            find_recipe(self.recipe)
        if not is_whole(self.vae_tiles, 1):
            raise ConfigError(f"vae_tiles must be an integer of 1 or more, got {self.vae_tiles!r}")
        if not isinstance(self.convolution, str | None):
            raise ConfigError(
                f"convolution must be text, names with commas between, or left out; got {self.convolution!r}"
            )
        loras, alpha = lora_files(self.lora), self.lora_alpha
        if alpha is not None and not (is_number(alpha) and alpha > 0):
            raise ConfigError(f"lora_alpha must be a number above 0, got {alpha!r}")
        if alpha is not None and not loras:
            raise ConfigError(f"lora_alpha is that of LoRAs without one: expected a LoRA beside lora_alpha={alpha:g}")
        if self.vae_file is not None and self.vae != WAN_VAE:
            raise ConfigError(
                f"vae_file is the file of the model's own VAE: expected vae={WAN_VAE!r} beside it, got {self.vae!r}"
            )
        if self.lookahead is not None and not is_whole(self.lookahead, 0):
            raise ConfigError(f"lookahead must be a number of blocks, 0 or more, got {self.lookahead!r}")

    def arguments(self) -> dict[str, Any]:
        """Return the options by name, for :meth:`echo_rt.Runtime.from_pretrained`; without a subclass's own."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(RuntimeOptions)}

    def absolute(self: _Options) -> _Options:
        """Return the options with absolute paths, which mean the same in every working folder."""
        files = ["checkpoint", "text_encoder", "tokenizer", "vae_file"]
        files += [] if self.vae in (WAN_VAE, TINY_VAE) else ["vae"]
        given = {name: value for name in files if (value := getattr(self, name)) is not None}
        paths: dict[str, Any] = {name: str(Path(value).absolute()) for name, value in given.items()}
        loras = tuple((path.absolute(), strength) for path, strength in lora_files(self.lora))
        return dataclasses.replace(self, **paths, lora=loras or None)


def is_name(model: str | Path) -> bool:
    """Return whether ``model`` is no path: the model in the package, or an id of the Hugging Face hub."""
    return model == DEMO or (HUB_ID.fullmatch(str(model)) is not None and not os.path.exists(model))


def absolute_model(model: str | Path) -> str:
    """Return the name or the absolute path of a model."""
    return str(model if is_name(model) else Path(model).absolute())


def is_path(value: object) -> bool:
    """Return whether ``value`` is a path; an empty one, which would mean the working folder, is not."""
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))


def is_whole(value: object, least: int) -> bool:
    """Return whether ``value`` is an int, no bool, of ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite real number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lora_files(lora: Lora) -> tuple[tuple[Path, float], ...]:
    """Return the paths of LoRAs with their strengths, by default 1; raises :class:`ConfigError`."""
    entries: Any = lora if isinstance(lora, Sequence) and not isinstance(lora, str) else [lora]
    files = []
    for entry in [] if lora is None else entries:
        path, strength = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0)
        if not is_path(path):
            raise ConfigError(f"lora must be a path, a list of paths and (path, strength) pairs, or None; got {lora!r}")
        if not is_number(strength):
            raise ConfigError(f"the strength of a LoRA must be a finite number, got {strength!r} for {path}")
        files.append((Path(path), float(strength)))
    return tuple(files)


def lora_text(path: str | Path, strength: float) -> str:
    """Write a LoRA as on the command line: ``FILE`` or ``FILE:STRENGTH``."""
    return str(path) if strength == 1 else f"{path}:{strength}"


def check_overrides(overrides: Mapping[str, Any], source: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return ``overrides`` as a dict; :class:`ConfigError` for a name not in :data:`OVERRIDES` or ``also``."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{source} must be a mapping of names to values, got {overrides!r}")
    unknown = sorted(map(str, set(overrides) - {*OVERRIDES, *also}))
    if unknown:
        known = (*also, *OVERRIDES)
        got = ", ".join(f"{name}{did_you_mean(name, known)}" for name in unknown)
        raise ConfigError(f"{source} may name {', '.join(known)}; got {got}")
    return dict(overrides)


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int; :class:`ConfigError` unless it is an integer in 0 .. 2^64-1."""
    try:
        whole = -1 if isinstance(seed, bool) else operator.index(seed)  # numpy's integers are integers too
    except TypeError:
        whole = -1
    if not 0 <= whole < _SEEDS:
        raise ConfigError(f"seed must be an integer in 0..2^64-1, got {seed!r}")
    return whole


def latent_size(width: int, height: int, vae: VaeConfig, transformer: TransformerConfig) -> tuple[int, int]:
    """Latent height and width of a video; :class:`ConfigError` for pixels that are not multiples of a patch's."""
    _, patch_rows, patch_columns = transformer.patch_size
    for name, pixels, patch in (("width", width, patch_columns), ("height", height, patch_rows)):
        step = vae.spatial_stride * patch
        if not is_whole(pixels, step) or pixels % step:
            raise ConfigError(f"the video's {name} must be a positive multiple of {step} pixels, got {pixels!r}")
    return height // vae.spatial_stride, width // vae.spatial_stride
