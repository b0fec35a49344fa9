"""What a block takes, by count: ``python bench/speed.py`` prints the tables of docs/speed.md, ``--write`` puts them in.

Bytes and operations come from the calls that the model makes (op_inputs.py, roofline.py), waves from tiles on the
multiprocessors of an H200, milliseconds from these and the share of a ceiling that each kind of kernel is taken to
reach. On a machine with a GPU there is an empty column more, for what is measured there (kernel_times.py).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import _checkout
import torch
from op_inputs import decoder_order, passes, variants
from roofline import memory_update_work, work_of

from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import Table, columns, markdown
from echo_rt.convolution import ConvolutionShape
from echo_rt.convolution.backends import hopper_limit
from echo_rt.utils.atomic_file import write_whole

PAGE = _checkout.ROOT / "docs" / "speed.md"
SMS, TFLOPS, COPY = 132, 790e12, 4.3e12  # multiprocessors; bf16 products; bytes a second, read and written
RATE = TFLOPS / SMS
# Share of the ceiling that a kernel reaches inside its waves, before and now. Attention: what others measured of cuDNN.
# causal_conv_hopper: read in its machine code; now a producer copies. Other convolutions: mma.sync. Memory: the goal.
REACHED = {
    "product": (0.86, 0.86), "attention": (0.9, 0.9), "causal_conv_hopper": (0.59, 0.81), "convolution": (0.5, 0.5),
    "memory": (0.85, 0.85),
}  # fmt: skip
PRODUCT8, ATTENTION8 = 1 / 1.5, 1 / 1.6  # of the time in 16 bits, as libraries report; at the ceiling it is a half
TILES = ((128, 256), (256, 128))  # of the output of a library's largest products
SEARCHED = tuple((rows, wide) for rows in (128, 192, 256) for wide in (128, 160, 192, 224, 256) if rows * wide <= 2**15)
INTO8 = "into float8"  # at the end of the name of a call that has a counterpart in 16 bits
GAP = 1e-6  # seconds from the end of a kernel in a graph to the start of the next one

CONFIG = RELEASED.config
TOKENS, KEYS, TEXT = CONFIG.tokens_per_block, CONFIG.cached_tokens, CONFIG.transformer.text_len
LAYERS, PASSES, HEADS = CONFIG.transformer.num_layers, passes(RELEASED), CONFIG.transformer.num_heads
DIM, FFN = CONFIG.transformer.dim, CONFIG.transformer.ffn_dim
CALLS = LAYERS * PASSES - 1  # the context pass ends where its last layer has stored its keys
R = 2 * TOKENS * DIM  # bytes
QUERY_TILES = HEADS * math.ceil(TOKENS / 128)

_LINES = columns(
    "line|line", "calls|calls|", "gb|GB|.2f", "tflop|TFLOP|.2f", "waves|waves|.2f", "best|at the ceiling, ms|.2f",
    "full|whole waves|.2f", "before|before|.1f", "now|now|.1f", "float8|float8|.1f",
)  # fmt: skip
_PRODUCTS = columns(
    "name|product", "shape|outputs, inputs", "waves|waves|.2f", "taken|taken|", "full|ms|.2f", "ideal|none lost|.2f",
    "stream|stream-K|.2f", "split|split-K|.2f", "tile|best tile", "searched|with it|.2f",
)  # fmt: skip
_SCHEDULES = columns(
    "first|first", "blocks|a convolution's blocks of threads", "whole|block, ms|.1f", "frames|frames after|.1f",
    "saved|saved|.1%",
)  # fmt: skip


def waves(tiles: int) -> int:
    """How many times the multiprocessors take a tile each."""
    return math.ceil(tiles / SMS)


class Line(NamedTuple):
    """``calls`` a block that are alike; ``moved`` bytes and ``flops`` of one, of which a tile has ``tile``.

    ``tiles`` 0: their number is no limit. ``float8``: what remains of the time where the dtype is float8. ``only``: the
    dtype that has it, 16 or 8 bits; 0 for both.
    """

    name: str
    kind: str
    calls: int
    moved: float
    flops: float = 0
    tiles: int = 0
    tile: float = 0
    float8: float = 1
    only: int = 0

    @property
    def best(self) -> float:
        """Milliseconds of a block at the ceilings."""
        return 1e3 * self.calls * max(self.moved / COPY, self.flops / TFLOPS)

    @property
    def full(self) -> float:
        """The same, where a partial tile or wave takes as long as a full one."""
        return max(self.best, 1e3 * self.calls * waves(self.tiles) * self.tile / RATE)

    def row(self) -> dict[str, Any]:
        before, now = (self.full / share for share in REACHED[self.kind])
        return {
            "line": self.name, "calls": self.calls, "gb": self.calls * self.moved / 1e9,
            "tflop": self.calls * self.flops / 1e12, "waves": self.tiles / SMS or None, "best": self.best,
            "full": self.full, "before": None if self.only == 8 else before, "now": None if self.only == 8 else now,
            "float8": None if self.only == 16 else now * self.float8,
        }  # fmt: skip


def summed(lines: Sequence[Line], name: str) -> dict[str, Any]:
    """A row of sums; those of counts are of what 16 bits have."""
    rows = [(line.row(), line.only != 8) for line in lines]
    total: dict[str, Any] = {"line": name, "waves": None}
    total |= {key: sum(row[key] * has for row, has in rows) for key in ("calls", "gb", "tflop", "best", "full")}
    return total | {key: sum(row[key] or 0 for row, _ in rows) for key in ("before", "now", "float8")}


class Product(NamedTuple):
    """A linear layer of the transformer."""

    name: str
    wide: int
    deep: int
    float8: float = PRODUCT8
    calls: int = CALLS

    def line(self, tile: tuple[int, int] | None = None, splits: int = 1) -> Line:
        """In tiles of that size, None for those that a library takes; a tile's inputs in ``splits`` parts."""
        tile = tile or min(TILES, key=lambda each: self.line(each).full)
        tiles = math.ceil(TOKENS / tile[0]) * math.ceil(self.wide / tile[1]) * splits
        moved, flops = TOKENS * (self.wide + self.deep) + self.wide * self.deep, TOKENS * self.wide * self.deep
        of_tile = 2 * math.prod(tile) * self.deep / splits
        return Line(f"product {self.name}", "product", self.calls, 2 * moved, 2 * flops, tiles, of_tile, self.float8)


PRODUCTS = (
    Product("q, k, v", 3 * DIM, DIM, calls=CALLS + 1),
    Product("self_out", DIM, DIM, float8=1),
    Product("cross_q", DIM, DIM),
    Product("cross_out", DIM, DIM, float8=1),
    Product("ffn_in", FFN, DIM),
    Product("ffn_out", DIM, FFN),
)


def kernel(op: str, only: int = 0) -> Line:
    """All calls of an operation that memory limits, as calls of the mean size."""
    found = {
        each.name: each.calls * work_of(op, each.arguments(torch.bfloat16, torch.device("meta"))).bytes
        for each in variants(op, RELEASED)
    }
    calls = sum(each.calls for each in variants(op, RELEASED) if INTO8 not in each.name)
    moved = {name: size for name, size in found.items() if INTO8 not in name}
    moved8 = sum(found.get(f"{name}, {INTO8}".removeprefix(", "), size) for name, size in moved.items())
    moved16 = sum(moved.values())
    return Line(op, "memory", calls, moved16 / calls, float8=moved8 / moved16, only=only)


def attention(name: str, keys: int, *, float8: float = 1, pieces: int = 1) -> Line:
    flops, tile = 4 * TOKENS * keys * DIM, 4 * 128 * keys * DIM / HEADS / pieces
    return Line(name, "attention", CALLS, 2 * R + 4 * keys * DIM, flops, pieces * QUERY_TILES, tile, float8)


def transformer_lines() -> list[Line]:
    """Everything but the decoder."""
    memory = memory_update_work(CONFIG, TOKENS, 2)
    return [
        *(product.line() for product in PRODUCTS),
        attention("self-attention", KEYS, float8=ATTENTION8),
        attention("text attention", TEXT),
        Line("rms_norm of the queries to the text", "memory", CALLS, 2 * R),
        kernel("gated_residual_norm", 16),
        kernel("gated_residual_norm_quantize", 8),
        kernel("gelu_quantize", 8),
        *map(kernel, ("qkv_norm_rope_store", "reanchor")),
        kernel("modulated_layer_norm", 16),
        kernel("modulated_layer_norm_quantize", 8),
        *map(kernel, ("flow_step", "counter_noise")),
        Line("memory update", "product", 1, memory.bytes, memory.flops),
    ]


def convolution(shape: ConvolutionShape) -> Line:
    """One call, in tiles of 96 channels, or of 16 for the few of a picture, and of 16 rows of pixels."""
    op = "upsample_conv" if shape.enlarge else "causal_conv" if hopper_limit(shape) else "causal_conv_hopper"
    wide, channels = (32, 96) if op == "causal_conv_hopper" else (16, 96 if shape.out_channels >= 96 else 16)
    phases = 4 if shape.enlarge else 1  # each pixel of the small frame, with 2x2 taps of sums
    seen = shape.channels * (4 if shape.enlarge else math.prod(shape.kernel))
    pixels = math.ceil(shape.height / 16) * math.ceil(shape.width / wide)
    tiles = phases * shape.out_size[0] * pixels * math.ceil(shape.out_channels / channels)
    read, written = shape.frames * shape.height * shape.width * shape.channels, math.prod(shape.out_size)
    moved, tile = 2 * (read + phases * shape.out_channels * seen + written), 2 * 16 * wide * channels * seen
    kind = op if op in REACHED else "convolution"
    return Line(op, kind, 1, moved, 2 * written * seen, tiles, tile)


def decoder_lines() -> list[Line]:
    """The norms and convolutions of a decode, call by call in their order."""
    return [
        convolution(each)
        if isinstance(each, ConvolutionShape)
        else Line("rms_silu_window", "memory", 1, work_of("rms_silu_window", each).bytes)
        for each in decoder_order(RELEASED)
    ]


def block_table() -> list[dict[str, Any]]:
    """Line by line, with sums."""
    pixels, width = math.prod(CONFIG.latent_shape[1:]), RELEASED.vae.base_dim * RELEASED.vae.dim_mult[-1]
    middle = Line("attention of the middle", "attention", 3, 8 * pixels * width, 4 * pixels**2 * width)
    first, decoder = transformer_lines(), [*decoder_lines(), middle, kernel("frames_to_uint8")]
    rows = [*(line.row() for line in first), summed(first, "**transformer and memory**")]
    names = dict.fromkeys(line.name for line in decoder)
    rows += [summed([line for line in decoder if line.name == name], name) for name in names]
    rows += [summed(decoder, "**decoder**"), summed([*first, *decoder], "**block, all in turn**")]
    return [row | {"tflop": row["tflop"] or None, "measured": None} for row in rows]


def product_table() -> list[dict[str, Any]]:
    """What waves cost each product, in milliseconds of a block at the ceiling, and what would save it."""
    rows: list[dict[str, Any]] = []
    for product in PRODUCTS:
        line, ms = product.line(), 1e3 * product.calls / COPY  # the latter for a byte of each call
        # Stream-K: each multiprocessor hands one partial tile on. Split-K: as many partial outputs as splits.
        handed_on, output = 2 * 4 * SMS * math.prod(TILES[0]), 2 * 4 * TOKENS * product.wide
        tile = min(SEARCHED, key=lambda each: (product.line(each).full, -math.prod(each)))
        rows.append({
            "name": product.name, "shape": f"{product.wide}, {product.deep}", "waves": line.tiles / SMS,
            "taken": waves(line.tiles), "full": line.full, "ideal": line.best, "stream": line.best + ms * handed_on,
            "split": min(product.line(TILES[0], n).full + ms * n * output for n in range(2, 6)),
            "tile": "x".join(map(str, tile)), "searched": product.line(tile).full,
        })  # fmt: skip
    total: dict[str, Any] = dict(rows[0], name="**sum**", shape="", waves=None, taken=None, tile="")
    total |= {key: sum(row[key] for row in rows) for key in ("full", "ideal", "stream", "split", "searched")}
    line = attention("", KEYS)
    # Keys in two, three or four: copies of the queries, as many outputs, and one of these merged.
    split = min(attention("", KEYS, pieces=n).full + ms * (2 * n + 2) * R for n in range(2, 5))
    whole = {"name": "self-attention", "shape": f"{KEYS} keys", "waves": line.tiles / SMS, "taken": waves(line.tiles)}
    whole |= {"full": line.full, "ideal": line.best, "stream": None, "split": split, "tile": "", "searched": None}
    return [*rows, total, whole]


class Kernel(NamedTuple):
    """``blocks`` of threads, ``seconds`` each."""

    blocks: int
    seconds: float


def together(*lanes: tuple[int, Sequence[Kernel]]) -> list[float]:
    """When each lane, (priority, kernels one after the other), ends, in seconds.

    A multiprocessor holds one block of threads, as the largest kernels take all its shared memory, and is never
    interrupted. A free one goes to the lane with the highest priority, of equal ones to the kernel that came first.
    """
    ends = [0.0] * len(lanes)
    place, waiting, running, came = [-1] * len(lanes), *([0] * len(lanes) for _ in range(3))
    events = [(0.0, lane, 0) for lane in range(len(lanes))]  # when blocks of a lane end; none: its next kernel begins
    free, begun = SMS, itertools.count(1)
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, lane, ended = heapq.heappop(events)
            free, running[lane] = free + ended, running[lane] - ended
            if not ended:
                place[lane], came[lane] = place[lane] + 1, next(begun)
                waiting[lane] = lanes[lane][1][place[lane]].blocks
            elif not running[lane] and not waiting[lane]:
                ends[lane] = now
                if place[lane] + 1 < len(lanes[lane][1]):
                    heapq.heappush(events, (now + GAP, lane, 0))
        for lane in sorted(range(len(lanes)), key=lambda each: (-lanes[each][0], came[each])):
            if given := min(free, waiting[lane]):
                free, waiting[lane], running[lane] = free - given, waiting[lane] - given, running[lane] + given
                heapq.heappush(events, (now + lanes[lane][1][place[lane]].seconds, lane, given))
    return ends


def as_kernel(line: Line, tiles_a_block: int = 1) -> Kernel:
    """As it is now; ``tiles_a_block`` 0: a block for each multiprocessor."""
    tiles = line.tiles or SMS
    each, ms = tiles_a_block or waves(tiles), line.full / REACHED[line.kind][1]
    return Kernel(math.ceil(tiles / each), each * ms / 1e3 / line.calls / waves(tiles))


@cache
def schedule_table() -> list[dict[str, Any]]:
    """A block's transformer beside the decoder of the block before."""
    lines = {line.name.removeprefix("product "): as_kernel(line) for line in transformer_lines()}
    layer = (
        "q, k, v", "qkv_norm_rope_store", "self-attention", "self_out", "gated_residual_norm", "cross_q",
        "rms_norm of the queries to the text", "text attention", "cross_out", "gated_residual_norm", "ffn_in",
        "ffn_out", "gated_residual_norm",
    )  # fmt: skip
    transformer, rows = [lines[name] for name in layer] * LAYERS * PASSES, list[dict[str, Any]]()

    def add(first: str, blocks: str, whole: float, frames: float) -> None:
        row = {"first": first, "blocks": blocks, "whole": 1e3 * whole, "frames": 1e3 * frames}
        rows.append(row | {"saved": 1 - row["whole"] / (rows[0] if rows else row)["whole"]})

    for blocks, tiles in (("one a multiprocessor", 0), ("one for 4 tiles", 4), ("one a tile", 1)):
        decoder = [as_kernel(each, tiles if each.name == "causal_conv_hopper" else 1) for each in decoder_lines()]
        if not rows:
            add("one after the other", blocks, *[sum(together((0, each))[0] for each in (transformer, decoder))] * 2)
        for first, priority in (("the decoder", 1), ("the transformer", -1)):
            ends = together((0, transformer), (priority, decoder))
            add(first, blocks, max(ends), ends[1])
    return rows


def tables(*, gpu: bool = False) -> dict[str, Table]:
    """The tables of the page by name."""
    return {
        "block": (block_table(), _LINES + columns(*["measured|measured|.1f"][:gpu])),
        "products": (product_table(), _PRODUCTS),
        "schedules": (schedule_table(), _SCHEDULES),
    }


def put(page: str, name: str, table: str) -> str:
    """The page with ``table`` between the comments that name it."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", page, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    arguments, page = parser.parse_args(argv), PAGE.read_text(encoding="utf-8")
    for name, table in tables(gpu=torch.cuda.is_available()).items():
        page = put(page, name, markdown(*table))
        print(f"{name}\n\n{markdown(*table)}")
    if arguments.write:
        write_whole(PAGE, page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
