"""Options that say which model runs, where and by what: the same for every command that loads one."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import parse_number, parse_overrides, parse_positive, parse_size
from echo_rt.cli.outputs import Named
from echo_rt.cli.paths import parse_lora, parse_path
from echo_rt.errors import ConfigError
from echo_rt.options import DTYPE_NAMES, TINY_VAE, VAE_DTYPE_NAMES, WAN_VAE, MemoryMode, RuntimeOptions

BACKEND_HELP = "who does the operations; default: cuda on a GPU that has the kernels, else torch (see echo-rt doctor)"


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """Declare them in a group of their own, which is returned."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=parse_path, required=True, metavar="DIR", help="Wan2.1 folder, original or diffusers"
    )
    model.add_argument(
        "--checkpoint", type=parse_path, metavar="FILE", help="generator weights, with or without a memory"
    )
    add_lora(model)
    add_recipe(model)
    model.add_argument(
        "--memory",
        choices=[mode.value for mode in MemoryMode],
        help="the memory's mode; default: evolve where the weights have a memory",
    )
    model.add_argument(
        "--vae",
        default=WAN_VAE,
        metavar=f"{WAN_VAE}|{TINY_VAE}|FILE",
        help=f"who makes pictures of latents: the model's own VAE, or for previews the tiny decoder in its folder, or "
        f"in FILE (default {WAN_VAE})",
    )
    model.add_argument("--dtype", choices=DTYPE_NAMES, help="default: bfloat16 on a GPU, else float32")
    model.add_argument("--vae-dtype", choices=VAE_DTYPE_NAMES, help="what the VAE decodes in; default: as --dtype")
    add_float8_except(model)
    model.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    model.add_argument("--backend", help=BACKEND_HELP)
    model.add_argument("--attention", metavar="NAME", help="which library computes attention (see echo-rt doctor)")
    model.add_argument(
        "--convolution", metavar="NAME[,NAME]", help="how the VAE's convolutions are computed (see echo-rt doctor)"
    )
    add_no_graphs(model)
    model.add_argument("--lookahead", metavar="N", help="blocks begun ahead; default: 1 on a GPU, 0 on a CPU")
    model.add_argument(
        "--vae-tiles", metavar="N", help="decode in N bands of rows, for GPUs with little memory; default: 1"
    )
    return model


def parse_model_options(arguments: argparse.Namespace) -> RuntimeOptions:
    """What they say, ``--size`` and ``--set`` included; raises ``ConfigError``."""
    if not arguments.vae:  # as a path it would be the folder one is in
        raise ConfigError(f"--vae: expected {WAN_VAE}, {TINY_VAE} or the path of a tiny decoder's file, got ''")
    if arguments.ema is not None and arguments.checkpoint is None:
        raise ConfigError("--ema: expected --checkpoint FILE with it, among whose weights it chooses, got none")
    names = {field.name for field in dataclasses.fields(RuntimeOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    width, height = parse_size(arguments.size)
    given |= {
        "lora": tuple(arguments.lora) or None,
        "lookahead": parse_lookahead(arguments.lookahead),
        "lora_alpha": parse_lora_alpha(arguments),
        "vae_tiles": parse_tiles(arguments.vae_tiles),
        "float8_except": tuple(arguments.float8_except),
        "width": width,
        "height": height,
        "overrides": parse_overrides(arguments.set),
    }
    return RuntimeOptions(**given)


def model_files(arguments: argparse.Namespace) -> list[Named]:
    """What the model is read from, for ``check_outputs`` and ``check_folder``."""
    vae = None if arguments.vae in (WAN_VAE, TINY_VAE) else Path(arguments.vae)
    named = [(f"--{name}", getattr(arguments, name)) for name in ("model", "checkpoint")]
    named += [("--lora", path) for path, _ in arguments.lora]
    return [Named(option, path) for option, path in (*named, ("--vae", vae)) if path is not None]


def add_lora(parser: Any) -> None:
    """Declare ``--lora``, a list of paths and strengths, and ``--lora-alpha``."""
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to merge into the generator, in any naming, or PEFT's folder; may be repeated",
    )
    parser.add_argument("--lora-alpha", metavar="ALPHA", help="of LoRAs that state none; default: their rank")


def parse_lora_alpha(arguments: argparse.Namespace) -> float | None:
    """The number of ``--lora-alpha``, None where it is left out; raises ``ConfigError``."""
    if arguments.lora_alpha is not None and not arguments.lora:
        raise ConfigError("--lora-alpha: expected --lora FILE with it, got none")
    alpha: float | None = parse_positive("--lora-alpha", arguments.lora_alpha, float, "a number above 0")
    return alpha


def add_recipe(parser: Any) -> None:
    """Declare how the checkpoint is sampled, and which of its weights."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="how the checkpoint is sampled (see echo-rt recipes); default: what the folder names or the files tell",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use (or not) the averaged weights; default: as in the recipe",
    )


def add_float8_except(parser: Any) -> None:
    """Declare which layers stay out of ``--dtype float8``."""
    parser.add_argument(
        "--float8-except",
        action="append",
        default=[],
        metavar="PATTERN",
        help="with --dtype float8: layers that stay in bfloat16, such as 'blocks.0.*' or '*.ffn.2'; may be repeated",
    )


def add_no_graphs(parser: Any) -> None:
    """Declare ``--no-graphs``: ``graphs`` is False with it, else None."""
    parser.add_argument(
        "--no-graphs",
        dest="graphs",
        action="store_const",
        const=False,
        help="do not replay what repeats as CUDA graphs: the same video, slower; on a CPU there are none anyway",
    )


def parse_tiles(text: str | None) -> int:
    """The number of ``--vae-tiles``, 1 where it is left out; raises ``ConfigError``."""
    return parse_positive("--vae-tiles", text, int, "a number of bands of 1 or more") or 1


# Each holds frames in pinned memory, and a new prompt waits for all of them.
_MOST_AHEAD = 100


def parse_lookahead(text: str | None) -> int | None:
    """The number of ``--lookahead``, None where it is left out; raises ``ConfigError``."""
    return None if text is None else parse_ahead(text)


def parse_ahead(text: str) -> int:
    """The number of a ``--lookahead`` that is there."""
    expected = f"an integer in 0..{_MOST_AHEAD}"
    ahead = int(parse_number("--lookahead", text, int, expected))
    if ahead > _MOST_AHEAD:
        raise ConfigError(f"--lookahead: expected {expected}, got {ahead}")
    return ahead
