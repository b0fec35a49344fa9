"""``echo-rt tiny``: a small random model to try things with."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import parse_path
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import say
from echo_rt.errors import ConfigError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tiny",
        help="write a small random model folder",
        description="Write a complete, small, random model folder in the original layout. Its videos are coloured "
        "noise in motion: it shows that everything runs, not what a trained model makes.",
    )
    parser.add_argument("folder", type=parse_path, metavar="DIR", help="the folder to make")
    parser.add_argument("--seed", default="0", metavar="N", help="of the random weights (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Write the model and say what to run next."""
    try:
        seed = int(arguments.seed)
    except ValueError:
        raise ConfigError(f"--seed: expected an integer, got {arguments.seed!r}") from None
    folder: Path = arguments.folder
    with stop.interruptible():
        from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model

        write_tiny_model(folder, seed=seed, overwrite=arguments.overwrite)
    checkpoint = folder / CHECKPOINT_FILE
    report.update(folder=str(folder), checkpoint=str(checkpoint), seed=seed)
    if not arguments.json:
        command = ["echo-rt", "generate", "--model", str(folder), "--checkpoint", str(checkpoint)]
        command += ["--prompt", "a red fox in the snow", "--seconds", "5", "-o", "tiny.mp4"]
        say(f"wrote a small random model to {folder}; to see it run:\n  {shlex.join(command)}")
    return 0
