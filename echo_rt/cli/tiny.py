"""``echo-rt tiny``: a small random model to try things with."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import click

from echo_rt.cli.arguments import PATH, Arguments, number, table
from echo_rt.cli.stdio import say
from echo_rt.utils.signals import StopRequest

DESCRIPTION = """
Write a complete, small, random model into the folder DIR, in the original layout. Its videos are coloured noise in
motion: they show that everything runs, not what a trained model makes.
"""
_SEED = {"type": number(int, "an integer", least=-math.inf)}
_MODEL = """
--seed N     seed of the random weights (default 0)
--overwrite  replace what an earlier run wrote there
"""
OPTIONS = {"model": (click.Argument(["folder"], type=PATH, metavar="DIR"), *table(_MODEL, seed=_SEED))}


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Write the model and say what to run next."""
    folder: Path = arguments.folder
    with stop.importing():
        from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model
    with stop.interruptible():
        write_tiny_model(folder, seed=arguments.seed, overwrite=arguments.overwrite)
    checkpoint = folder / CHECKPOINT_FILE
    report.update(folder=str(folder), checkpoint=str(checkpoint), seed=arguments.seed)
    if not arguments.json:
        command = ["echo-rt", "generate", "--model", str(folder), "--checkpoint", str(checkpoint)]
        command += ["--prompt", "a red fox in the snow", "--seconds", "5", "-o", "tiny.mp4"]
        say(f"wrote a small random model to {folder}; to see it run:", f"  {shlex.join(command)}")
    return 0
