"""Options that several commands share, declared once, and the types of their values."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from echo_rt.cli.outputs import Named
from echo_rt.config import MEMORY_READS
from echo_rt.errors import ConfigError, did_you_mean
from echo_rt.options import (
    DEMO,
    DTYPE_ALIASES,
    DTYPE_NAMES,
    OVERRIDES,
    TINY_VAE,
    VAE_DTYPE_NAMES,
    WAN_VAE,
    MemoryMode,
    RuntimeOptions,
)
from echo_rt.recipes import RECIPES
from echo_rt.utils.number import Number

Arguments = SimpleNamespace  # the arguments of a command, by name
Options = Mapping[str, Iterable[click.Parameter]]  # those of a command, by the titles of --help
_Chosen = TypeVar("_Chosen", bound=RuntimeOptions)

_MOST_AHEAD = 100  # blocks: each holds frames in pinned memory, and a new prompt waits for all of them
# Overrides whose value is a list, and those with the words that may be their value.
_LISTS = ("denoising_steps", "first_block_steps")
_WORDS = {"memory_reads": MEMORY_READS}
_CHOICES = _WORDS | dict.fromkeys(("rebuild_on_prompt_switch", "recache_sink"), ("true", "false"))
_SETTINGS = [f"{name}={value}" for name in OVERRIDES for value in _CHOICES.get(name, ("",))]
# Names that are completed; those of the modules themselves would need torch.
_ATTENTIONS = (
    *("sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa", "products", "sdpa-math"),
    *("flash-attn-2", "flash-attn-3", "flash-attn-4"),
    *(f"{library}-in-{splits}" for library in ("sdpa-cudnn", "sdpa-flash") for splits in (2, 3, 4)),
)
_LINEARS = ("torch", *(f"cublaslt-{number}" for number in range(1, 9)))
_CONVOLUTIONS = ("conv3d", "three-products", "kernel", "kernel-hopper", "enlarged", "phases")


class Value(click.ParamType[Any]):
    """A type of value: ``parse`` raises ``ValueError``; completed with ``files`` and with ``words``.

    ``words``: themselves, or a function of the arguments before it. ``several`` of them may stand with commas between.
    """

    name = "text"

    def __init__(
        self,
        parse: Callable[[str], Any],
        *,
        words: Iterable[str] | Callable[[dict[str, Any]], Iterable[str]] = (),
        files: bool = False,
        several: bool = False,
    ) -> None:
        self._parse, self._words, self._files, self._several = parse, words, files, several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed ``value``; a default that is no text is a value already."""
        if not isinstance(value, str):
            return value
        known = [] if ctx is None else [name for other in ctx.command.params for name in other.opts]
        if value.startswith("-") and value in known:
            self.fail(f"expected a value, got the option {value}", param, ctx)
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete a word or the name of a file."""
        found = [CompletionItem(incomplete, type="file")] if self._files else []
        words = self._words(ctx.params) if callable(self._words) else self._words
        before, comma, last = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        return found + [CompletionItem(f"{before}{comma}{word}") for word in words if word.startswith(last)]


def number(kind: type[int] | type[float], named: str = "", **bounds: Any) -> Value:
    """Type of the numbers of a :class:`Number`."""
    allowed = Number(kind, named, **bounds)
    return Value(allowed.parse, words=allowed.words)


def parse_path(text: str) -> Path:
    """Parse a path; an empty one (of an unset variable, for example) would mean the current folder."""
    if not text or "\0" in text:
        raise ValueError(f"expected a path, got {reprlib.repr(text)}")
    return Path(text)


def path_or(*words: str) -> Value:
    """Type of a path, or of one of ``words``; a file of that name is written ``./word``."""
    return Value(lambda text: text if text in words else parse_path(text), words=words, files=True)


def _parse_lora(text: str) -> tuple[Path, float]:
    """Parse ``FILE`` or ``FILE:STRENGTH``; if a file has the whole text as its name, it is that file."""
    file, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return parse_path(text), 1.0
    expected = "FILE or FILE:STRENGTH with a finite STRENGTH"
    return parse_path(file), Number(float, expected, least=-math.inf).parse(strength)


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,8})[xX\u00d7]([1-9]\d{0,8})", text.strip())
    if match is None:
        raise ValueError(f"expected WIDTHxHEIGHT in pixels such as 832x480, got {reprlib.repr(text)}")
    return int(match[1]), int(match[2])


def _parse_override(text: str) -> tuple[str, Any]:
    """Name and value of one ``--set``; the model checks whether they fit."""
    name, equals, value = text.partition("=")
    if name not in OVERRIDES or not equals:
        hint = "" if name in OVERRIDES else did_you_mean(name, OVERRIDES)
        raise ValueError(f"expected NAME=VALUE with a NAME of {', '.join(OVERRIDES)}; got {reprlib.repr(text)}{hint}")
    if name in _WORDS:
        return name, value
    try:
        parsed = json.loads(f"[{value}]" if "," in value else value)
    except (ValueError, RecursionError):
        raise ValueError(f"expected a number, a list of numbers, true or false; got {reprlib.repr(text)}") from None
    # One step is a list of one.
    return name, [parsed] if name in _LISTS and not isinstance(parsed, list) else parsed


def _by_name(ctx: click.Context, param: click.Parameter, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    collected: dict[str, Any] = {}
    for name, value in pairs:
        if name in collected:
            raise click.BadParameter(f"expected each NAME once, got {name} again with {value!r}", ctx, param)
        collected[name] = value
    return collected


def _dtype(names: Sequence[str]) -> Value:
    """Type of the dtypes called ``names``, which go by their short names too."""
    known = {name: name for name in names} | {short: name for short, name in DTYPE_ALIASES.items() if name in names}

    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {text!r}{did_you_mean(text, known)}")
        return known[text]

    return Value(parse, words=names)


TEXT = Value(str)
PATH = Value(parse_path, files=True)
# What a value is, by what stands for it in --help.
_TYPES = {"N": number(int, least=1), **dict.fromkeys(("S", "SECONDS", "ALPHA"), number(float, positive=True))}


def table(text: str, **keywords: dict[str, Any]) -> tuple[click.Option, ...]:
    """Declare options in rows: names, what stands for the value in capitals, and after two blanks the help text.

    The last name is that of the argument if it has no dashes. A row without a value is a flag, with an opposite if it
    is ``--yes/--no``. If ``keywords`` have no other type, a value with FILE or DIR in it is a path, N an integer of 1
    or more, S a number above 0; a help text that ends in ``(default X)`` gives it. ``keywords``: those of
    ``click.Option``, by the name of the argument.
    """
    options = []
    for row in re.split(r"\n(?=-)", text.strip()):
        declared, _, help_text = row.partition("  ")
        names = declared.split()
        metavar = names.pop() if any(map(str.isupper, names[-1])) else None
        path = metavar is not None and re.search("FILE|DIR|OUT", metavar)
        kind: dict[str, Any] = {"is_flag": True}
        if metavar is not None:
            kind = {"type": PATH if path else _TYPES.get(metavar, TEXT)}
        if match := re.search(r"\(default ([^)]+)\)$", help_text):
            kind["default"] = match[1]
        kind |= keywords.get(names[-1].partition("/")[0].lstrip("-").replace("-", "_"), {})
        shown = None if isinstance(kind.get("type"), click.Choice) else metavar
        options.append(click.Option(names, help=" ".join(help_text.split()), metavar=shown, **kind))
    return tuple(options)


# An option's argument has the name of the field that it sets in RuntimeOptions or in a command's own request.
_SHARED = table(
    f"""
--model DIR|FILE         Wan2.1 model folder (original, diffusers or with ComfyUI's files), transformer file, or id of a
                         model in the Hugging Face cache; default: {DEMO}, the small model in the package, which
                         knows a world of its own (a folder of that name is ./{DEMO})
--checkpoint FILE        generator weights, with or without a memory encoder
--lora FILE[:STRENGTH]   LoRA to merge into the generator, in any key naming, or a PEFT folder; may be repeated
--lora-alpha ALPHA       alpha of LoRA files that state none; default: their rank
--recipe NAME            how the checkpoint is sampled (see echo-rt recipes); default: what the folder names or the
                         files imply
--ema/--no-ema           use the averaged (EMA) weights of the checkpoint, or not; default: as in the recipe
--memory MODE            memory mode; default: evolve if the weights have a memory encoder
--vae wan|tiny|FILE      decoder that turns latents into frames: the model's own VAE, or for previews the tiny decoder
                         in the model folder or in FILE (default {WAN_VAE})
--vae-file FILE          VAE to use instead of the model's own
--text-encoder FILE      umT5 to use instead of the model's own
--tokenizer DIR          tokenizer to use instead of the model's own
--dtype DTYPE            the model's dtype; default: bfloat16 on a GPU, else float32
--vae-dtype DTYPE        the VAE's dtype; default: as --dtype
--float8-except PATTERN  with --dtype float8: layers that stay in bfloat16, such as 'blocks.0.*' or '*.ffn.2', or
                         '*.attention@0' at denoising step 0; may be repeated
--device DEVICE          cpu, cuda or cuda:N; default: cuda if there is a GPU
--backend NAME           implementation of the operations (see echo-rt doctor); default: cuda on a GPU that has the
                         kernels, else torch
--attention NAME         implementation of attention (see echo-rt doctor); default: the fastest
--linear NAME            implementation of the transformer's linear layers (see echo-rt doctor); default: the fastest
--convolution NAME[,NAME]  implementations of the VAE's convolutions (see echo-rt doctor); default: the fastest
--no-graphs graphs       run without CUDA graphs: the same video, slower (a CPU never uses graphs)
--lookahead N            number of blocks begun ahead; default: 1 on a GPU, 0 on a CPU
--vae-tiles N            number of horizontal tiles that the VAE decodes, for GPUs with little memory; default: 1
--size frame_size WIDTHxHEIGHT  frame size in pixels, such as 832x480
--set overrides NAME=VALUE  another setting of the rollout: {", ".join(OVERRIDES)}; a list is written as 1000,500
--seed N                 the same seed makes the same video (default 0)
--roll-back              return to an earlier state when a block contains NaN, instead of ending
""",
    model={"default": DEMO, "type": path_or(DEMO)},
    lora={"type": Value(_parse_lora, files=True), "multiple": True},
    recipe={"type": Value(str, words=RECIPES)},
    ema={"default": None},
    memory={"type": click.Choice([mode.value for mode in MemoryMode])},
    vae={"type": path_or(WAN_VAE, TINY_VAE)},
    dtype={"type": _dtype(DTYPE_NAMES)},
    vae_dtype={"type": _dtype(VAE_DTYPE_NAMES)},
    float8_except={"multiple": True},
    device={"type": Value(str, words=("cpu", "cuda"))},
    backend={"type": Value(str, words=("torch", "cuda", "emulated"))},
    attention={"type": Value(str, words=_ATTENTIONS)},
    linear={"type": Value(str, words=_LINEARS)},
    convolution={"type": Value(str, words=_CONVOLUTIONS, several=True)},
    graphs={"flag_value": False, "default": None},
    lookahead={"type": number(int, f"an integer in 0..{_MOST_AHEAD}", most=_MOST_AHEAD)},
    frame_size={"type": Value(_parse_size)},
    overrides={
        "type": Value(_parse_override, words=_SETTINGS),
        "multiple": True,
        "callback": _by_name,
    },
    seed={"type": number(int, "an integer in 0..2^64-1", most=2**64 - 1)},
)
OPTIONS = {one.opts[0]: one for one in _SHARED}
# What generate and soak load a model with.
MODEL = tuple(name for name in OPTIONS if name not in ("--size", "--set", "--seed", "--roll-back"))


def shared(names: Iterable[str], **changes: dict[str, Any]) -> list[click.Option]:
    """Shared options; ``changes``: attributes that differ for this command, by the name of the option's argument."""
    options = [copy.copy(OPTIONS[name]) for name in names]
    for one in options:
        vars(one).update(changes.get(str(one.name), {}))
    return options


def require(option: str, given: object, needed: str, other: object, why: str = "") -> None:
    """Raise ``ConfigError`` if ``option`` is given without ``needed``; what is not given is None or empty."""
    if given not in (None, ()) and other in (None, ()):
        raise ConfigError(f"{option}: expected {needed} with it{why}, got none")


def options_of(kind: type[_Chosen], arguments: Arguments, **more: Any) -> _Chosen:
    """Return the given options as ``kind``, field by field, and ``more``; raises ``ConfigError``."""
    require("--ema", arguments.ema, "--checkpoint FILE", arguments.checkpoint, ", among whose weights it chooses")
    require("--lora-alpha", arguments.lora_alpha, "--lora FILE", arguments.lora)
    width, height = getattr(arguments, "frame_size", None) or (None, None)
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value not in (None, ())}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return kind(**{**plain, "width": width, "height": height, **more})


def model_files(arguments: Arguments) -> list[Named]:
    """List the files and folders that the model is read from, for ``check_outputs`` and ``check_folder``."""
    options = ("--model", "--checkpoint", "--text-encoder", "--tokenizer", "--vae-file", "--vae")
    named = [(option, getattr(arguments, option[2:].replace("-", "_"), None)) for option in options]
    named += [("--lora", path) for path, _ in arguments.lora]
    return [Named(option, Path(path)) for option, path in named if path not in (None, DEMO, WAN_VAE, TINY_VAE)]
