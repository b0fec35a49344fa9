"""What float8 convolutions would do to the picture: ``python bench/vae_float8.py FOLDER...``, models or vae bundles.

The decoder's convolutions at the highest resolutions are given what a float8 kernel would be given, rounded to e4m3fn
with a scale for each pixel and for each output channel; sums are float32. It says how far the video is then from that
in float32, beside what bfloat16 does, so that nobody has to write such a kernel to know. On the CPU; it is no measure
of speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import _checkout  # noqa: F401
import torch
from safetensors.torch import load_file
from torch import Tensor

from echo_rt.bench.tables import Column, markdown
from echo_rt.config import VaeConfig
from echo_rt.convolution import ConvolutionCandidate
from echo_rt.convolution.shapes import Prepared
from echo_rt.convolution.torch_conv import accumulated_products, upsample_convolution
from echo_rt.errors import EchoError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.ops.float8 import quantize_rows
from echo_rt.verify.bundles import relative_error
from echo_rt.verify.decoder import Decoding, folder_decoding
from echo_rt.verify.metrics import compare_videos

_COLUMNS = (
    Column("weights", "weights", text=True),
    Column("decoded", "decoded in", text=True),
    Column("error", "error", ".2e"),
    Column("psnr", "PSNR dB", ".1f"),
    Column("ssim", "SSIM", ".5f"),
)
_CPU = torch.device("cpu")


def rounded(rows: Tensor) -> Tensor:
    """``rows [..., any]`` as float8 with a scale for each, back in float32."""
    values, scales = quantize_rows(rows.float().flatten(0, -2))
    return (values.float() * scales.unsqueeze(-1)).view(rows.shape)


def in_float8(prepare: Callable[[Tensor], Prepared]) -> Callable[[Tensor], Prepared]:
    """The same way to compute a convolution, of rounded weights and frames."""

    def prepared(weight: Tensor) -> Prepared:
        convolved = prepare(rounded(weight.flatten(1)).view(weight.shape))

        def call(frames: Tensor, /) -> Tensor:
            return convolved(rounded(frames))

        return call

    return prepared


def decode(decoding: Decoding, dtype: torch.dtype, resolutions: int) -> Tensor:
    """The video, its ``resolutions`` highest resolutions in float8, in float32."""
    decoder = VaeDecoder(decoding.config, decoding.tensors, decoding.ops, device=_CPU, dtype=dtype)
    latents, _, height, width = decoding.latents.shape
    shapes = decoder.convolution_shapes(height, width, latents)
    heights = {name: shape.height * (2 if shape.enlarge else 1) for name, shape in shapes.items()}
    levels = sorted(set(heights.values()))
    highest = levels[len(levels) - resolutions :]
    kinds = {}
    for name, shape in shapes.items():
        prepare: Callable[[Tensor], Prepared] = upsample_convolution if shape.enlarge else accumulated_products
        # Time is doubled before pictures are enlarged: its convolution is one of the resolution below.
        if heights[name] in highest and shape.kernel[1] > 1:
            prepare = in_float8(prepare)
        kinds[name] = ConvolutionCandidate("", prepare, enlarges=shape.enlarge)
    decoder.use(kinds)
    return decoder.decode(decoding.latents, decoder.new_state(height, width, latents)).float()


def _read(folder: Path) -> Decoding:
    ops, config = load_ops("torch"), folder / "config.json"
    flat = json.loads(config.read_bytes()) if config.exists() else {}
    if flat.get("kind") != "vae":
        return folder_decoding(folder, ops, _CPU)
    tensors, inputs = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs"))
    return Decoding(VaeConfig.from_flat(flat), tensors, ops, _CPU, inputs["latents"])


def rows_of(folder: Path) -> list[dict[str, object]]:
    """A row for bfloat16, and one for each number of resolutions in float8."""
    decoding = _read(folder)
    reference = decode(decoding, torch.float32, 0)
    ways = {"bfloat16": (torch.bfloat16, 0)}
    for count in range(1, len(decoding.config.dim_mult) + 1):
        ways[f"float32, {count} highest in float8"] = (torch.float32, count)
    rows: list[dict[str, object]] = []
    for name, (dtype, count) in ways.items():
        video = decode(decoding, dtype, count)
        quality = compare_videos(video, reference)
        error = relative_error(video, reference)
        rows.append(
            {"weights": folder.name, "decoded": name, "error": error, "psnr": quality.psnr, "ssim": quality.ssim}
        )
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a model, or a golden vae bundle")
    try:
        rows = [row for folder in parser.parse_args(argv).folders for row in rows_of(folder)]
    except (EchoError, OSError) as error:
        print(f"vae_float8.py: {error}", file=sys.stderr)
        return 2
    print(markdown(rows, _COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
