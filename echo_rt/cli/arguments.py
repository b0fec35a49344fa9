"""Options that several commands share, declared once, and the types of their values.

A type raises ``argparse.ArgumentTypeError``; the parser adds the name of the option.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from echo_rt.cli.outputs import Named
from echo_rt.errors import ConfigError
from echo_rt.options import DTYPE_NAMES, OVERRIDES, TINY_VAE, VAE_DTYPE_NAMES, WAN_VAE, MemoryMode, RuntimeOptions

_Options = TypeVar("_Options", bound=RuntimeOptions)

_SHOWN = 40  # characters of a mistaken argument
_MOST_AHEAD = 100  # blocks: each holds frames in pinned memory, and a new prompt waits for all of them
_MOST_SEED = 2**64 - 1
# Overrides whose value is a list, and those whose value is a word.
_LISTS, _WORDS = ("denoising_steps", "first_block_steps"), ("memory_reads",)


def number(
    kind: type[int] | type[float],
    expected: str,
    *,
    positive: bool = False,
    least: float = 0,
    most: float = math.inf,
    words: Mapping[str, Any] | None = None,
) -> Callable[[str], Any]:
    """An argument type for finite numbers in ``least .. most``, not 0 if ``positive``; ``words`` stand for values."""

    def parse(text: str) -> Any:
        if words and text in words:
            return words[text]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf or (positive and value == 0):
            raise ArgumentTypeError(f"expected {expected}, got {shorten(text)!r}")
        return value

    return parse


def shorten(text: str) -> str:
    """Cut a mistaken argument to the length of a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_path(text: str) -> Path:
    """Parse a path; an empty one (of an unset variable, for example) would mean the current folder."""
    if not text:
        raise ArgumentTypeError("expected a path, got ''")
    return Path(text)


def _parse_lora(text: str) -> tuple[Path, float]:
    """Parse ``FILE`` or ``FILE:STRENGTH``; if a file has the whole text as its name, it is that file."""
    file, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return parse_path(text), 1.0
    return parse_path(file), number(float, "FILE or FILE:STRENGTH with a finite STRENGTH", least=-math.inf)(strength)


def _parse_vae(text: str) -> str:
    if not text:  # as a path it would be the current folder
        raise ArgumentTypeError(f"expected {WAN_VAE}, {TINY_VAE} or the path of a tiny decoder's file, got ''")
    return text


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,8})[xX\u00d7]([1-9]\d{0,8})", text.strip())
    if match is None:
        raise ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels such as 832x480, got {shorten(text)!r}")
    return int(match[1]), int(match[2])


def _parse_override(text: str) -> tuple[str, Any]:
    """Name and value of one ``--set``; the model checks whether they fit."""
    name, equals, value = text.partition("=")
    if name not in OVERRIDES or not equals:
        raise ArgumentTypeError(f"expected NAME=VALUE with a NAME of {', '.join(OVERRIDES)}; got {text!r}")
    if name in _WORDS:
        return name, value
    try:
        parsed = json.loads(f"[{value}]" if "," in value else value)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, a list of numbers, true or false; got {text!r}") from None
    # One step is a list of one.
    return name, [parsed] if name in _LISTS and not isinstance(parsed, list) else parsed


class _Override(argparse.Action):
    """Collects ``(name, value)`` pairs in a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, value = values
        collected = getattr(namespace, self.dest)
        if name in collected:
            raise argparse.ArgumentError(self, f"expected each NAME once, got {name} again with {value!r}")
        setattr(namespace, self.dest, {**collected, name: value})


def _option(help_text: str, metavar: str | None = None, **keywords: Any) -> dict[str, Any]:
    """Keywords of ``add_argument``."""
    return {"help": help_text, **({} if metavar is None else {"metavar": metavar}), **keywords}


# An option's destination is the name of the field that it sets in RuntimeOptions or in a
# command's own request.
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": _option(
        "Wan2.1 model folder (original, diffusers or with ComfyUI's files), transformer file, or id of a model in the "
        "Hugging Face cache",
        "DIR|FILE",
        type=parse_path,
        required=True,
    ),
    "--checkpoint": _option("generator weights, with or without a memory encoder", "FILE", type=parse_path),
    "--lora": _option(
        "LoRA to merge into the generator, in any key naming, or a PEFT folder; may be repeated",
        "FILE[:STRENGTH]",
        type=_parse_lora,
        action="append",
    ),
    "--lora-alpha": _option(
        "alpha of LoRA files that state none; default: their rank",
        "ALPHA",
        type=number(float, "a number above 0", positive=True),
    ),
    "--recipe": _option(
        "how the checkpoint is sampled (see echo-rt recipes); default: what the folder names or the files imply", "NAME"
    ),
    "--ema": _option(
        "use the averaged (EMA) weights of the checkpoint, or not; default: as in the recipe",
        action=argparse.BooleanOptionalAction,
    ),
    "--memory": _option(
        "memory mode; default: evolve if the weights have a memory encoder", choices=[mode.value for mode in MemoryMode]
    ),
    "--vae": _option(
        "decoder that turns latents into frames: the model's own VAE, or for previews the tiny decoder in the model "
        f"folder or in FILE (default {WAN_VAE})",
        f"{WAN_VAE}|{TINY_VAE}|FILE",
        type=_parse_vae,
        default=WAN_VAE,
    ),
    "--vae-file": _option("VAE to use instead of the model's own", "FILE", type=parse_path),
    "--text-encoder": _option("umT5 to use instead of the model's own", "FILE", type=parse_path),
    "--tokenizer": _option("tokenizer to use instead of the model's own", "DIR", type=parse_path),
    "--dtype": _option("the model's dtype; default: bfloat16 on a GPU, else float32", choices=DTYPE_NAMES),
    "--vae-dtype": _option("the VAE's dtype; default: as --dtype", choices=VAE_DTYPE_NAMES),
    "--float8-except": _option(
        "with --dtype float8: layers that stay in bfloat16, such as 'blocks.0.*' or '*.ffn.2'; may be repeated",
        "PATTERN",
        action="append",
    ),
    "--device": _option("cpu, cuda or cuda:N; default: cuda if there is a GPU"),
    "--backend": _option(
        "implementation of the operations (see echo-rt doctor); default: cuda on a GPU that has the kernels, else torch"
    ),
    "--attention": _option("implementation of attention (see echo-rt doctor); default: the fastest", "NAME"),
    "--convolution": _option(
        "implementations of the VAE's convolutions (see echo-rt doctor); default: the fastest", "NAME[,NAME]"
    ),
    "--no-graphs": _option(
        "run without CUDA graphs: the same video, slower (a CPU never uses graphs)",
        dest="graphs",
        action="store_const",
        const=False,
    ),
    "--lookahead": _option(
        "number of blocks begun ahead; default: 1 on a GPU, 0 on a CPU",
        "N",
        type=number(int, f"an integer in 0..{_MOST_AHEAD}", most=_MOST_AHEAD),
    ),
    "--vae-tiles": _option(
        "number of horizontal tiles that the VAE decodes, for GPUs with little memory; default: 1",
        "N",
        type=number(int, "a number of tiles of 1 or more", positive=True),
    ),
    "--size": _option("frame size in pixels, such as 832x480", "WIDTHxHEIGHT", dest="frame_size", type=_parse_size),
    "--set": _option(
        f"another setting of the rollout: {', '.join(OVERRIDES)}; a list is written as 1000,500",
        "NAME=VALUE",
        dest="overrides",
        type=_parse_override,
        action=_Override,
        default={},
    ),
    "--seed": _option(
        "the same seed makes the same video (default 0)",
        "N",
        type=number(int, "an integer in 0..2^64-1", most=_MOST_SEED),
        default=0,
    ),
    "--roll-back": _option(
        "return to an earlier state when a block contains NaN, instead of ending", action="store_true"
    ),
}
_AFTER_MODEL = ("--size", "--set", "--seed", "--roll-back")
MODEL = tuple(option for option in OPTIONS if option not in _AFTER_MODEL)  # what generate and soak load a model with


def add_options(parser: Any, options: Iterable[str], **changes: dict[str, Any]) -> None:
    """Declare shared options; ``changes``: keywords that differ for this command, by destination."""
    for option in options:
        parser.add_argument(option, **{**OPTIONS[option], **changes.get(_name_of(option), {})})


def _name_of(option: str) -> str:
    return option[2:].replace("-", "_")


def require(option: str, given: object, needed: str, other: object, why: str = "") -> None:
    """Raise ``ConfigError`` if ``option`` is given without ``needed``; what is not given is None."""
    if given is not None and other is None:
        raise ConfigError(f"{option}: expected {needed} with it{why}, got none")


def options_of(kind: type[_Options], arguments: argparse.Namespace, **more: Any) -> _Options:
    """Return the given options as ``kind``, field by field, and ``more``; raises ``ConfigError``."""
    require("--ema", arguments.ema, "--checkpoint FILE", arguments.checkpoint, ", among whose weights it chooses")
    require("--lora-alpha", arguments.lora_alpha, "--lora FILE", arguments.lora)
    width, height = getattr(arguments, "frame_size", None) or (None, None)
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: _plain(value) for name, value in vars(arguments).items() if name in names and value is not None}
    return kind(**{**given, "width": width, "height": height, **more})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value


def model_files(arguments: argparse.Namespace) -> list[Named]:
    """List the files and folders that the model is read from, for ``check_outputs`` and ``check_folder``."""
    options = ("--model", "--checkpoint", "--text-encoder", "--tokenizer", "--vae-file", "--vae")
    named = [(option, getattr(arguments, _name_of(option), None)) for option in options]
    named += [("--lora", path) for path, _ in arguments.lora or ()]
    return [Named(option, Path(path)) for option, path in named if path not in (None, WAN_VAE, TINY_VAE)]
