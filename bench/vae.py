"""The VAE's decoder alone, beside others: ``python bench/vae.py --out DIR`` writes vae.json and vae.md.

Ours, the torch backend and, where it is installed, diffusers' ``AutoencoderKLWan``, with the same random weights, each
one block of latents in mid-stream, over and over, in turns. All are held against the torch backend in float32 first.
Exit code 0 if ours was right and timed, 1 if not, 2 for arguments that cannot be had."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import _checkout
import torch
from baselines import ROUNDINGS, WanAutoencoder, first_noise
from timing import timer_for
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from echo_rt.bench.runner import median_p99
from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import columns, environment
from echo_rt.config import VaeConfig
from echo_rt.engine.build import convolutions_in_words, fit_decoder
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import BACKENDS, choose_backend, load_ops
from echo_rt.ops.schema import Ops
from echo_rt.options import VAE_DTYPE_NAMES, latent_size
from echo_rt.utils.device import DTYPES, model_context, parse_device, warn_of_faulty_convolutions
from echo_rt.utils.wording import counted, first_line, plain
from echo_rt.verify.bundles import bound_between, relative_error
from echo_rt.weights.shapes import vae_decoder_shapes, vae_shapes
from echo_rt.weights.tiny_model import RandomTensors

Row = dict[str, Any]
OURS, TORCH, DIFFUSERS = "echo-rt", "torch backend", "diffusers AutoencoderKLWan"
COLUMNS = columns(
    "decoder|decoder", "ms|ms a block|.2f", "p99_ms|p99|.2f", "tflops|TFLOP/s|.4g", "ours_ratio|x ours|.2f",
    "error|error|.1e", "bound|bound|.1e", "state_mb|state (MB)|.2f", "peak_mb|peak (MB)|.1f", "what|",
)  # fmt: skip
# Timed blocks, and those before them in each turn: quick or not, by device.
_COUNTS = {("cuda", False): (30, 1), ("cuda", True): (10, 1), ("cpu", False): (5, 0), ("cpu", True): (2, 0)}
_TURNS = 5


def flops(config: VaeConfig, height: int, width: int, latents: int) -> int:
    """Twice the multiply-adds of a block in mid-stream, as torch counts them: the same for all decoders."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in vae_decoder_shapes(config).items()}
    decoder = VaeDecoder(config, weights, load_ops("torch"), device="meta", dtype=torch.float32)
    block = torch.empty(latents, config.z_dim, height, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoder.decode_next(block, decoder.new_state(height, width, latents), is_start=False)
    return int(counter.get_total_flops())


class Decoder(NamedTuple):
    """``block``: the video ``[F, H, W, 3]`` of the latents, in mid-stream but for the first call."""

    block: Callable[[], Tensor]
    state_bytes: Callable[[], int]
    what: str


@dataclass(frozen=True)
class Setting:
    """What is decoded: normalized ``latents [T, z, h, w]`` float32 on the device, by weights in ``dtype``."""

    config: VaeConfig
    tensors: RandomTensors
    latents: Tensor
    dtype: torch.dtype

    def ours(self, ops: Ops, convolution: str | None = None, *, fit: bool = True) -> Decoder:
        """:class:`VaeDecoder` on the backend ``ops``; without ``fit`` by torch's convolutions, nothing autotuned."""
        latents = self.latents
        decoder = VaeDecoder(self.config, self.tensors, ops, device=latents.device, dtype=self.dtype)
        count, _, height, width = latents.shape
        what = f"{count} latents in one call"
        if fit:
            attention, found = fit_decoder(decoder, (count, height, width), ops, convolution)
            what += f"; attention: {attention.name}; convolutions: {convolutions_in_words(found)}"
        state = decoder.new_state(height, width, count)
        return Decoder(lambda: decoder.decode(latents, state), lambda: state.nbytes, what)

    def diffusers(self) -> Decoder:
        """``AutoencoderKLWan``; :class:`BackendError` where diffusers is not installed."""
        theirs = WanAutoencoder(self.config, self.tensors, self.latents, self.dtype)
        what = "one latent at a time, its own cache kept from call to call"
        return Decoder(theirs.block, lambda: theirs.state_bytes, what)

    def expected(self) -> Tensor:
        """The block in mid-stream by the torch backend in float32, on the host."""
        with model_context(self.latents.device, torch.float32):
            decoder = replace(self, dtype=torch.float32).ours(load_ops("torch"), fit=False)
            decoder.block()
            return decoder.block().cpu()

    def ready(self, name: str, make: Callable[[], Decoder], expected: Tensor) -> tuple[Row, Decoder | None]:
        """One decoder in mid-stream and its row; None for the decoder where it computes something else."""
        device, on_gpu = self.latents.device, self.latents.is_cuda
        gc.collect()
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        decoder = make()
        decoder.block()  # begins the stream
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        error = relative_error(decoder.block().float().cpu(), expected)
        # Random weights are less kind than those that the golden bundles' bounds are for; others round more often.
        bound = bound_between(self.dtype) * (1 if name == OURS else ROUNDINGS)
        row = dict.fromkeys(column.key for column in COLUMNS) | {"decoder": name, "error": error, "bound": bound}
        row["state_mb"] = decoder.state_bytes() / 1e6
        row["peak_mb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if on_gpu else None
        if not error <= bound:  # NaN is not
            return row | {"what": f"not timed: it computes something else; {decoder.what}"}, None
        return row | {"what": decoder.what}, decoder


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Measure and write; whether ours was right and timed, and the page."""
    device, dtype = parse_device(arguments.device), DTYPES[arguments.dtype]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # events are recorded on the current one
    backend, model = choose_backend(arguments.backend, device), _checkout.model_of(arguments)
    if model is RELEASED and not on_gpu and not (arguments.width and arguments.height):
        took = f"the {model.name} sizes need a GPU, as a block would take minutes on {str(device)!r}"
        raise ConfigError(f"{took}; name a small video with --width and --height")
    vae, size = model.vae, [edge * model.vae.spatial_stride for edge in model.config.latent_shape[:0:-1]]
    width, height = arguments.width or size[0], arguments.height or size[1]
    latent = latent_size(width, height, vae, model.config.transformer)
    latents = first_noise(replace(model.config, latent_height=latent[0], latent_width=latent[1]), device)
    setting = Setting(vae, RandomTensors(vae_shapes(vae), device), latents, dtype)
    work, timer = flops(vae, *latent, len(latents)), timer_for(device)
    blocks, warmup = _COUNTS[device.type, arguments.quick]
    blocks = blocks if arguments.blocks is None else arguments.blocks
    warn_of_faulty_convolutions(device, dtype)
    notes = [
        f"Random weights at the {model.name} sizes; {width}x{height}; a block of {len(latents)} latents in mid-stream; "
        f"{plain(dtype)}; {work / 1e12:.4g} TFLOP a block, counted; backend {backend.name} ({backend.reason}).",
        f"{counted(blocks, 'call')} of each, in turns; clock: {timer.clock}. Launches are not in a time, no graph is "
        "replayed.",
        "Error: relative, of the block's video, against the torch backend in float32. What differs is not timed.",
        "State: bytes that a decoder keeps of a stream between two blocks, with room that it works in. Peak: the "
        "allocator's while a block is decoded, weights and the video that is handed out in it.",
    ]
    makers: dict[str, Callable[[], Decoder]] = {OURS: partial(setting.ours, backend.ops, arguments.convolution)}
    makers[TORCH] = partial(setting.ours, load_ops("torch"), fit=False)
    makers |= {DIFFUSERS: setting.diffusers} if arguments.peers else {}
    rows: list[Row] = []
    live: list[tuple[Row, Decoder, list[float]]] = []

    def save(complete: bool) -> tuple[bool, str]:
        for row, _, times in live:
            if times:
                row["ms"], row["p99_ms"] = (each / 1e3 for each in median_p99(times))
                row["tflops"] = work / 1e9 / row["ms"] if on_gpu else None
                row["ours_ratio"] = None if rows[0]["ms"] is None else row["ms"] / rows[0]["ms"]
        passed = complete and rows[0]["ms"] is not None
        facts = {"passed": passed, "complete": complete, "clock": timer.clock, "backend": backend.name}
        tables = {"Decoders": (rows, COLUMNS)}
        page = _checkout.save(arguments.out, "vae", "VAE decoder", environment(str(device)), tables, notes, **facts)
        return passed, page

    try:
        expected = setting.expected()
        for name, make in makers.items():
            _checkout.say(name)
            try:
                with model_context(device, dtype):
                    row, decoder = setting.ready(name, make, expected)
            except Exception as error:
                if name != DIFFUSERS or isinstance(error, torch.OutOfMemoryError):
                    raise
                notes.append(f"Not measured: {name}: {first_line(error)}.")  # what another's code raises is found
                continue
            rows.append(row)
            live += [] if decoder is None else [(row, decoder, [])]
        for begun in range(0, max(1, blocks), turn := max(1, blocks // _TURNS)):
            for _, decoder, times in live:
                with model_context(device, dtype):
                    times += timer.measure(decoder.block, min(turn, blocks - begun), warmup)
            save(complete=False)  # the time may run out
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"{device} has too little memory for a video of {width}x{height}: {first_line(error)}; "
            "name a smaller one with --width and --height"
        ) from error
    return save(complete=True)


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, dtypes=VAE_DTYPE_NAMES)
    parser.add_argument("--width", type=int, help="of the video, in pixels; default: that of the size")
    parser.add_argument("--height", type=int, help="the same")
    parser.add_argument("--backend", choices=BACKENDS, help="of ours; default: what a runtime would have")
    parser.add_argument("--convolution", metavar="NAME[,NAME]", help="of ours; default: autotuned")
    parser.add_argument("--blocks", type=int, help="timed blocks of each")
    parser.add_argument("--quick", action="store_true", help="fewer blocks")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="others' code too")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
