"""The program that block.sh profiles: a stream that runs until its window is full, then some blocks of it.

The profiler listens to those last blocks alone. Without --model a tiny one is made, which shows how a block is made up,
not how fast the released model is.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import _bench  # noqa: F401
import torch

import echo_rt
from echo_rt.errors import ConfigError, EchoError
from echo_rt.ops.backends import BACKENDS
from echo_rt.options import DTYPE_NAMES
from echo_rt.utils.wording import counted
from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model


@contextlib.contextmanager
def model_files(model: str | None, checkpoint: str | None) -> Iterator[tuple[str, str | None]]:
    """The folder and the checkpoint that were named, or those of a tiny model that is gone afterwards."""
    if model is not None:
        yield model, checkpoint
        return
    if checkpoint is not None:
        raise ConfigError("--checkpoint needs --model, the folder that it belongs to")
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        write_tiny_model(tiny)
        yield str(tiny), str(tiny / CHECKPOINT_FILE)


def run(runtime: echo_rt.Runtime, prompt: str, warm: int, blocks: int, profiled: bool) -> int:
    """``warm`` blocks once the ids have saturated, then ``blocks`` for the profiler; the number of the last one."""
    with runtime.stream(prompt) as stream:
        while next(stream).stats.shift == 0:
            pass
        for _ in range(warm):
            next(stream)
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for _ in range(blocks):
            last = next(stream).index
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return last


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="a model folder; without it a tiny model is made")
    parser.add_argument("--checkpoint", metavar="FILE", help="the checkpoint that goes with it")
    parser.add_argument("--prompt", default="a red fox in the snow", help="default: %(default)s")
    parser.add_argument("--memory", choices=["evolve", "prior", "off"], help="default: what the weights allow")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda", help="default: cuda")
    parser.add_argument("--device", default="cuda", help="default: cuda; on a CPU nothing is profiled")
    parser.add_argument("--warm", type=int, default=4, metavar="N", help="steady blocks before; default: 4")
    parser.add_argument("--blocks", type=int, default=3, metavar="N", help="blocks that are profiled; default: 3")
    arguments = parser.parse_args(argv)
    try:
        if arguments.warm < 0 or arguments.blocks < 1:
            raise ConfigError(
                f"expected --warm of at least 0 and --blocks of at least 1, got {arguments.warm} and {arguments.blocks}"
            )
        facts = {name: getattr(arguments, name) for name in ("memory", "dtype", "backend", "device")}
        with (
            model_files(arguments.model, arguments.checkpoint) as (model, checkpoint),
            echo_rt.Runtime.from_pretrained(model, checkpoint=checkpoint, **facts) as runtime,
        ):
            profiled = str(arguments.device).startswith("cuda")
            last = run(runtime, arguments.prompt, arguments.warm, arguments.blocks, profiled)
    except EchoError as error:
        print(f"run_block.py: {error}", file=sys.stderr)
        return 2
    print(f"{counted(arguments.blocks, 'block')}, the last of them block {last}, on {arguments.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
