"""``echo-rt tiny``: a small random model to try things with."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import number, parse_path
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import say

HELP = "write a small random model folder"
DESCRIPTION = """
Write a complete, small, random model folder in the original layout. Its videos are coloured noise in motion: they show
that everything runs, not what a trained model makes.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=parse_path, metavar="DIR", help="folder to write")
    seed = number(int, "an integer", least=-math.inf)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the random weights (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Write the model and say what to run next."""
    folder: Path = arguments.folder
    with stop.interruptible():
        from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model

        write_tiny_model(folder, seed=arguments.seed, overwrite=arguments.overwrite)
    checkpoint = folder / CHECKPOINT_FILE
    report.update(folder=str(folder), checkpoint=str(checkpoint), seed=arguments.seed)
    if not arguments.json:
        command = ["echo-rt", "generate", "--model", str(folder), "--checkpoint", str(checkpoint)]
        command += ["--prompt", "a red fox in the snow", "--seconds", "5", "-o", "tiny.mp4"]
        say(f"wrote a small random model to {folder}; to see it run:\n  {shlex.join(command)}")
    return 0
