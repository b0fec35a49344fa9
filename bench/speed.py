"""What a block takes, by count: ``python bench/speed.py`` prints the tables of docs/speed.md, ``--write`` puts them in.

Bytes and operations come from the calls that the model makes (op_inputs.py, roofline.py), waves from tiles on the
multiprocessors of an H200, milliseconds from these and the share of a ceiling that each kind of kernel is taken to
reach. ``--measured FOLDER`` adds what bench/gpu.sh measured, whose archive is unpacked in FOLDER.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import _checkout
import torch
from goals import Results, found
from kernel_times import LIBRARY, MEMORY_UPDATE, QUERY_NORM
from op_inputs import IN8, LinearLayer, decoder_order, linear_layers, passes, variants
from roofline import work_of

from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import Column, Table, columns, markdown, summary_line
from echo_rt.convolution import ConvolutionShape
from echo_rt.convolution.backends import hopper_limit
from echo_rt.utils.atomic_file import write_whole
from echo_rt.weights.shapes import memory_shapes

PAGE = _checkout.ROOT / "docs" / "speed.md"
SMS, TFLOPS, COPY = 132, 790e12, 4.3e12  # multiprocessors; bf16 products; bytes a second, read and written
RATE = TFLOPS / SMS
# Share of the ceiling that a kernel reaches inside its waves, before and now. Attention: what others measured of cuDNN.
# causal_conv_hopper before: of a review (85 ms); now by the clocks of a tile in docs/kernels.md, 63,200 in place of
# 80,300. mma.sync: our other products. Memory: the goal.
REACHED = {
    "product": (0.86, 0.86), "attention": (0.9, 0.9), "causal_conv_hopper": (0.59, 0.75), "mma.sync": (0.5, 0.5),
    "memory": (0.85, 0.85),
}  # fmt: skip
PRODUCT8, ATTENTION8 = 1 / 1.5, 1 / 1.6  # of the time in 16 bits, as libraries report; at the ceiling it is a half
TILES = ((128, 256), (256, 128))  # of the output of a library's largest products
SEARCHED = tuple((rows, wide) for rows in (128, 192, 256) for wide in (128, 160, 192, 224, 256) if rows * wide <= 2**15)
GAP = 1e-6  # seconds from the end of a kernel in a graph to the start of the next one
LATE = 0.2  # seconds that a decoder waits, to see what that costs
# Sums of the table, and how the part of a whole block begins that is each of them.
_PARTS = {
    "**transformer and memory**": "transformer, all passes", "**decoder**": "VAE decode",
    "**block, all in turn**": "whole block, one at a time",
}  # fmt: skip

CONFIG = RELEASED.config
TOKENS, KEYS, TEXT = CONFIG.tokens_per_block, CONFIG.cached_tokens, CONFIG.transformer.text_len
LAYERS, PASSES, HEADS = CONFIG.transformer.num_layers, passes(RELEASED), CONFIG.transformer.num_heads
PRODUCTS = linear_layers(RELEASED)
DIM = CONFIG.transformer.dim
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
    "transformer|transformer", "first|first", "blocks|a convolution's blocks of threads", "whole|block, ms|.1f",
    "frames|frames after|.1f", "saved|saved|.1%",
)  # fmt: skip
_UPDATE = columns(
    "beside|beside", "priority|priority", "ended|the update ends after, ms|.1f", "longer|the pass is longer by|.1f",
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


def by_name(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each name."""
    alike = [[line for line in lines if line.name == name] for name in dict.fromkeys(line.name for line in lines)]
    return [summed(each, each[0].name) if len(each) > 1 else each[0].row() for each in alike]


def product(layer: LinearLayer, tile: tuple[int, int] | None = None, splits: int = 1) -> Line:
    """In tiles of that size, None for those that a library takes; a tile's inputs in ``splits`` parts."""
    tile = tile or min(TILES, key=lambda each: product(layer, each).full)
    wide, deep = layer.outputs, layer.inputs
    tiles = math.ceil(TOKENS / tile[0]) * math.ceil(wide / tile[1]) * splits
    moved, flops, of_tile = TOKENS * (wide + deep) + wide * deep, TOKENS * wide * deep, math.prod(tile) * deep / splits
    name, float8 = f"product {layer.name}", PRODUCT8 if layer.float8 else 1
    return Line(name, "product", layer.calls, 2 * moved, 2 * flops, tiles, 2 * of_tile, float8)


def best_tile(layer: LinearLayer) -> tuple[int, int]:
    """The one with the fewest wasted waves, of equal ones the largest."""
    return min(SEARCHED, key=lambda each: (product(layer, each).full, -math.prod(each)))


def kernel(op: str, only: int = 0) -> Line:
    """All calls of an operation that memory limits, as calls of the mean size."""
    found = {
        each.name: each.calls * work_of(op, each.arguments(torch.bfloat16, torch.device("meta"))).bytes
        for each in variants(op, RELEASED)
    }
    calls = sum(each.calls for each in variants(op, RELEASED) if IN8 not in each.name)
    moved16, moved8 = in_both(found)
    return Line(op, "memory", calls, moved16 / calls, float8=moved8 / moved16, only=only)


def in_both(found: Mapping[str, float]) -> tuple[float, float]:
    """Sums of what calls have, by their names: in 16 bits, and in float8, with those that take another's place."""
    plain = {name: value for name, value in found.items() if IN8 not in name}
    return sum(plain.values()), sum(found.get(f"{name}, {IN8}".removeprefix(", "), plain[name]) for name in plain)


def attention(name: str, keys: int, *, float8: float = 1, pieces: int = 1) -> Line:
    flops, tile = 4 * TOKENS * keys * DIM, 4 * 128 * keys * DIM / HEADS / pieces
    return Line(name, "attention", CALLS, 2 * R + 4 * keys * DIM, flops, pieces * QUERY_TILES, tile, float8)


def memory_lines() -> list[Line]:
    """The update of the memory: its layers, the connector, the gate, the new keys and values."""
    assert CONFIG.memory is not None
    name, lines = "memory update", list[Line]()
    attends = attention(name, TOKENS)._replace(kind="mma.sync", calls=1)
    for weight, shape in memory_shapes(CONFIG).items():
        if len(shape) == 2:
            kind = "mma.sync" if weight.startswith("gate_linear") else "product"
            lines.append(product(LinearLayer("", *shape, calls=1, float8=False))._replace(name=name, kind=kind))
            lines += [attends] * weight.endswith(".q.weight")
    return lines


def transformer_lines() -> list[Line]:
    """Everything but the decoder."""
    return [
        *map(product, PRODUCTS),
        attention("self-attention", KEYS, float8=ATTENTION8),
        attention("text attention", TEXT),
        Line(QUERY_NORM, "memory", CALLS, 2 * R),
        kernel("gated_residual_norm", 16),
        kernel("gated_residual_norm_quantize", 8),
        kernel("gelu_quantize", 8),
        *map(kernel, ("qkv_norm_rope_store", "reanchor")),
        kernel("modulated_layer_norm", 16),
        kernel("modulated_layer_norm_quantize", 8),
        *map(kernel, ("flow_step", "counter_noise")),
        *memory_lines(),
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
    return Line(op, op if op in REACHED else "mma.sync", 1, moved, 2 * written * seen, tiles, tile)


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
    rows = [*by_name(first), summed(first, "**transformer and memory**")]
    rows += [*by_name(decoder), summed(decoder, "**decoder**"), summed([*first, *decoder], "**block, all in turn**")]
    return [row | {"tflop": row["tflop"] or None} for row in rows]


def measured(check: Results) -> dict[str, tuple[float | None, float | None]]:
    """Line of the table -> milliseconds of a block that a GPU check measured, in 16 bits and in float8.

    Lines are calls one at a time, with nothing cached before them; sums are of whole blocks. What the check lacks is
    None or not there.
    """
    rows = check.rows("kernels", "kernel_times", "Kernels")
    hopper = {row["variant"] for row in rows if row["op"] == "causal_conv_hopper"}
    times, failed = defaultdict[str, dict[str, float]](dict), set[str]()
    for row in rows:
        op, variant, us = row["op"], row["variant"], row["median_us"]
        line, call = (variant.removesuffix(f", {IN8}"), IN8 * variant.endswith(IN8)) if op == LIBRARY else (op, variant)
        if us is None:
            failed.add(line)
        elif not (op == "causal_conv" and variant in hopper):
            times[line.replace(MEMORY_UPDATE, "memory update")][call] = row["calls"] * us / 1e3
    per_key = 4e-9 * TOKENS * DIM * CALLS  # 10^9 operations a block; over TFLOP/s they are milliseconds
    finds: dict[str, Callable[[str], float]] = {
        "self-attention": lambda step: per_key * KEYS / check.attention(float8=step == "float8"),
        "text attention": lambda _: per_key * TEXT / check.attention("Attention over the text", float8=False),
    } | {line: partial(check.part, variant="evolve", part=part) for line, part in _PARTS.items()}
    whole = {line: (found(find, "block"), found(find, "float8")) for line, find in finds.items()}
    return {line: in_both(calls) for line, calls in times.items() if line not in failed} | whole


def _waves(name: str, shape: str, line: Line) -> dict[str, Any]:
    row = {"name": name, "shape": shape, "waves": line.tiles / SMS, "taken": waves(line.tiles)}
    return row | {"full": line.full, "ideal": line.best}


def product_table() -> list[dict[str, Any]]:
    """What waves cost each product, in milliseconds of a block at the ceiling, and what would save it."""
    rows: list[dict[str, Any]] = []
    for layer in PRODUCTS:
        line, ms, tile = product(layer), 1e3 * layer.calls / COPY, best_tile(layer)  # ms for a byte of each call
        # Stream-K: each multiprocessor hands one partial tile on. Split-K: as many partial outputs as splits.
        handed_on, output = 2 * 4 * SMS * math.prod(TILES[0]), 2 * 4 * TOKENS * layer.outputs
        rows.append(_waves(layer.name, f"{layer.outputs}, {layer.inputs}", line) | {
            "stream": line.best + ms * handed_on,
            "split": min(product(layer, TILES[0], n).full + ms * n * output for n in range(2, 6)),
            "tile": "x".join(map(str, tile)), "searched": product(layer, tile).full,
        })  # fmt: skip
    total: dict[str, Any] = dict(rows[0], name="**sum**", shape="", waves=None, taken=None, tile="")
    total |= {key: sum(row[key] for row in rows) for key in ("full", "ideal", "stream", "split", "searched")}
    line = attention("", KEYS)
    # Keys in two, three or four: copies of the queries, as many outputs, and one of these merged.
    split = min(attention("", KEYS, pieces=n).full + ms * (2 * n + 2) * R for n in range(2, 5))
    whole = {"stream": None, "split": split, "tile": "", "searched": None}
    return [*rows, total, _waves("self-attention", f"{KEYS} keys", line) | whole]


class Kernel(NamedTuple):
    """``blocks`` of threads, ``seconds`` each; without blocks a pause."""

    blocks: int
    seconds: float


def together(*lanes: tuple[int, Sequence[Kernel]]) -> list[float]:
    """When each lane, (priority, kernels one after the other, the last no pause), ends, in seconds.

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
                waiting[lane], seconds = lanes[lane][1][place[lane]]
                if not waiting[lane]:
                    heapq.heappush(events, (now + seconds, lane, 0))
            elif not running[lane] and not waiting[lane]:
                ends[lane] = now
                if place[lane] + 1 < len(lanes[lane][1]):
                    heapq.heappush(events, (now + GAP, lane, 0))
        for lane in sorted(range(len(lanes)), key=lambda each: (-lanes[each][0], came[each])):
            if given := min(free, waiting[lane]):
                free, waiting[lane], running[lane] = free - given, waiting[lane] - given, running[lane] + given
                heapq.heappush(events, (now + lanes[lane][1][place[lane]].seconds, lane, given))
    return ends


def as_kernel(line: Line, tiles_a_block: int = 1, *, float8: bool = False) -> Kernel:
    """As it is now; ``tiles_a_block`` 0: a block for each multiprocessor."""
    tiles = line.tiles or SMS
    each, ms = tiles_a_block or waves(tiles), line.full / REACHED[line.kind][1] * (line.float8 if float8 else 1)
    return Kernel(math.ceil(tiles / each), each * ms / 1e3 / line.calls / waves(tiles))


_NORM = ("gated_residual_norm", "gated_residual_norm_quantize")
_LAYER = (
    "q, k, v", "qkv_norm_rope_store", "self-attention", "self_out", *_NORM, "cross_q", QUERY_NORM, "text attention",
    "cross_out", *_NORM, "ffn_in", "gelu_quantize", "ffn_out", *_NORM,
)  # fmt: skip


def layer_kernels(*, float8: bool = False, fitting: bool = False) -> list[Kernel]:
    """A layer's kernels in their order; ``fitting``: attention in two pieces, and products in their best tiles."""
    lines = {line.name.removeprefix("product "): [line] for line in transformer_lines()}
    if fitting:
        lines |= {layer.name: [product(layer, best_tile(layer))] for layer in PRODUCTS}
        beside = Line("", "memory", CALLS, 3 * R)  # copies of the queries before it, and two outputs merged after it
        lines["self-attention"] = [beside, attention("", KEYS, pieces=2), beside]
    dtypes = (0, 8 if float8 else 16)
    return [as_kernel(line, float8=float8) for name in _LAYER for line in lines[name] if line.only in dtypes]


def decoder_kernels(tiles_a_block: int = 0) -> list[Kernel]:
    """The decoder's; ``tiles_a_block``: those of ``causal_conv_hopper``."""
    return [as_kernel(each, tiles_a_block if each.name == "causal_conv_hopper" else 1) for each in decoder_lines()]


@cache
def schedule_table() -> list[dict[str, Any]]:
    """A block's transformer beside the decoder of the block before."""
    rows, ways = list[dict[str, Any]](), {"one a multiprocessor": 0, "one for 4 tiles": 4, "one a tile": 1}
    now, late = next(iter(ways)), f"the transformer; the decoder begins after {1e3 * LATE:.0f} ms"
    for what, layer in (
        ("as now", layer_kernels()),
        ("pieces and tiles that fit", layer_kernels(fitting=True)),
        ("float8", layer_kernels(float8=True)),
    ):
        # The context pass ends where its last layer has stored its keys.
        kernels, decoder = (layer * LAYERS * PASSES)[: 2 - len(layer)], decoder_kernels()
        in_turn = sum(together((0, each))[0] for each in (kernels, decoder))
        found = [("one after the other", now, [in_turn, in_turn])]
        if not rows:
            found.append(("the decoder", now, together((0, kernels), (1, decoder))))
            found.append((late, now, together((0, kernels), (-1, [Kernel(0, LATE), *decoder]))))
        for blocks, tiles in ways.items():
            found.append(("the transformer", blocks, together((0, kernels), (-1, decoder_kernels(tiles)))))
        for first, blocks, ends in found:
            row = {"transformer": what, "first": first, "blocks": blocks, "whole": 1e3 * max(ends)}
            rows.append(row | {"frames": 1e3 * ends[1], "saved": 1 - max(ends) / in_turn})
    return rows


@cache
def update_table() -> list[dict[str, Any]]:
    """The memory update beside a block's first pass, and beside the decoder as well."""
    one_pass, update, rows = layer_kernels() * LAYERS, [*map(as_kernel, memory_lines())], list[dict[str, Any]]()
    for beside, others in (("the pass", []), ("the pass and the decoder", [(-1, decoder_kernels())])):
        alone = together((0, one_pass), *others)[0]
        for priority, value in (("the transformer's", 0), ("the decoder's", -1)):
            whole, ended, *_ = together((0, one_pass), (value, update), *others)
            longer = 1e3 * (whole - alone)
            rows.append({"beside": beside, "priority": priority, "ended": 1e3 * ended, "longer": longer})
    return rows


def tables(check: Results | None = None) -> dict[str, Table]:
    """The tables of the page by name; with what a GPU check has measured, if there was one."""
    block, more = block_table(), tuple[Column, ...]()
    if check is not None:
        more, found = columns("measured|measured|.1f", "measured8|in float8|.1f"), measured(check)
        for row in block:
            in16, in8 = found.get(row["line"], (None, None))
            row["measured"] = None if row["now"] is None else in16
            row["measured8"] = None if row["float8"] is None else in8
    return {
        "block": (block, _LINES + more),
        "products": (product_table(), _PRODUCTS),
        "schedules": (schedule_table(), _SCHEDULES),
        "update": (update_table(), _UPDATE),
    }


def put(page: str, name: str, table: str) -> str:
    """The page with ``table`` between the comments that name it."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", page, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--measured", type=Path, metavar="FOLDER", help="what bench/gpu.sh left: two columns more")
    arguments, page = parser.parse_args(argv), PAGE.read_text(encoding="utf-8")
    try:
        check = None if arguments.measured is None else Results(arguments.measured)
    except OSError:
        parser.error(f"--measured: expected a folder with a steps.tsv, found {arguments.measured}")
    if check is not None:
        if check.header.get("gpu") is None:
            parser.error(f"--measured: expected the check of a GPU, found none or a rehearsal in {arguments.measured}")
        print(f"{summary_line(check.header)}\n")
    for name, table in tables(check).items():
        page = put(page, name, markdown(*table))
        print(f"{name}\n\n{markdown(*table)}")
    if arguments.write:
        write_whole(PAGE, page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
