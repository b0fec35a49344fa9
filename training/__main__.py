"""``python -m training``: train the demo model on the CPU, step by step, going on where an earlier run ended."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.export import describe, write_model
from training.latents import open_world
from training.train_model import CONFIG, train
from training.train_vae import train_decoder, train_encoder
from training.world import HEIGHT, MORE_COLOURS, OBJECT_COLOURS, WIDTH


def main() -> None:
    """Train the decoder, the encoder and the transformer with its memory; write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m training", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training"), help="checkpoints (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/demo_model"), help="the model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = open_world(arguments.folder / "world.pt", [*OBJECT_COLOURS, *MORE_COLOURS])
    decoder = train_decoder(world, arguments.folder)
    encoder = train_encoder(world, arguments.folder)
    weights = train(world, arguments.folder)
    write_model(arguments.output, CONFIG, weights, decoder, encoder, (WIDTH, HEIGHT))
    for name, size in describe(arguments.output).items():
        print(f"{name}  {size} bytes")


if __name__ == "__main__":
    main()
