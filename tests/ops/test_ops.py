"""Every operation, on every backend that is there, against its formula in float64.

A result must be as close to the formula as torch's own in the same precision, twice that error at most, and within
``BOUNDS`` in any case. What is only moved must be the same byte for byte.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from cases import OPS, SIZES, Sizes
from closeness import relative_error
from naive_noise import naive_noise
from op_checks import (
    ALL_SIZES,
    BACKENDS,
    BOUNDS,
    DTYPES,
    as_float64,
    assert_close,
    assert_same,
    case,
    copies,
    float32_is_refused,
    layer_norm,
    rms,
    rotate,
    spread,
)

from echo_rt.engine.state import RingLayout
from echo_rt.ops import reference
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import OPERATIONS, POSITION_FIELDS, Ops

# The memory's kernels have tiles for two head sizes, and no float32.
MEMORY_SIZES = {
    "head-128": Sizes(tokens=5, heads=1, head_dim=128),
    "head-64": Sizes(tokens=23, heads=3, head_dim=64, memory_frames=3),
    "one": SIZES["one"],
}
NO_SINK = Sizes(frames=2, tokens=3, sink_frames=0, local_frames=6, memory_frames=0)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def test_cases_cover_the_schema() -> None:
    methods = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")}
    assert methods == set(OPS) == set(OPERATIONS)


def signature(operation: Callable[..., object]) -> tuple[list[tuple[str, str]], str]:
    """Names and types of the arguments, and the type of the result, of a function or of an operation of torch."""
    if isinstance(operation, torch._ops.OpOverload):
        types = {"Optional[Tensor]": "Tensor | None"}
        arguments = [(each.name, str(each.type)) for each in operation._schema.arguments]
        returns = [str(each.type) for each in operation._schema.returns]
        return [(name, types.get(kind, kind)) for name, kind in arguments], ", ".join(returns) or "None"
    python = inspect.signature(operation)
    return [(name, each.annotation) for name, each in python.parameters.items()], python.return_annotation


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_those_of_the_schema(ops: Ops, op: str) -> None:
    assert signature(getattr(ops, op)) == signature(getattr(Ops, op))


def test_rope_table_is_exact_to_float32_for_any_frame(ops: Ops) -> None:
    frames, rates, out = case(ops, "rope_table", Sizes(head_dim=128), torch.float32)
    ops.rope_table(frames, rates, out)
    for row, frame in zip(out.tolist(), frames.tolist(), strict=True):
        for (cos, sin), rate in zip(row, rates.tolist(), strict=True):
            angle = math.fmod(frame * rate, 2 * math.pi)
            # float64 holds the product to half an ulp: 2.4e-7 at frame 2^31, half of float32's own step at 1.
            slack = 6e-8 + frame * rate * 2**-53
            assert abs(cos - math.cos(angle)) <= slack and abs(sin - math.sin(angle)) <= slack


@pytest.mark.parametrize("s", [*SIZES.values(), NO_SINK], ids=[*SIZES, "no-sink"])
def test_advance_agrees_with_the_ring_arithmetic(ops: Ops, s: Sizes) -> None:
    args = case(ops, "advance", s, torch.float32)
    positions, rates, block_table, anchor_table, write_index = args[0], args[6].cpu(), *args[7:]
    layout = RingLayout(
        frames_per_block=s.frames,
        sink_frames=s.sink_frames,
        local_frames=s.local_frames,
        memory_frames=s.memory_frames,
        max_temporal_id=args[5],
    )
    for start in (0, 10_000_000):
        positions[0] = start - 1
        for block in range(start, start + 30):
            ops.advance(*args)
            first, shift = layout.first_frame(block), layout.shift(block)
            assert positions.tolist() == [block, first, shift, layout.memory_frame(block), layout.slot(first)]
            rows = layout.slot(first) * s.tokens
            assert write_index.tolist() == list(range(rows, rows + s.frames * s.tokens))
            frames = torch.arange(first, first + s.frames).double()
            anchors = [layout.memory_frame(block) + i for i in range(s.memory_frames)]
            anchors += [shift + i for i in range(s.sink_frames)]
            for table, at in ((block_table, frames), (anchor_table, torch.tensor(anchors).double())):
                angles = at[:, None] * rates
                assert torch.equal(table.cpu(), torch.stack((angles.cos(), angles.sin()), -1).float())


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "no-raw"])
@pytest.mark.parametrize("kept_frames", [None, 1], ids=["all", "last-frame"])
def test_qkv_norm_rope_store(ops: Ops, dtype: torch.dtype, size: str, raw: bool, kept_frames: int | None) -> None:
    s = SIZES[size]
    args = case(ops, "qkv_norm_rope_store", s, dtype)
    args[0] = spread(args[0])
    if kept_frames:
        args[7] = args[7][: kept_frames * s.tokens]
    if not raw:
        args[8] = None
    theirs = copies(args)
    theirs_q = reference.qkv_norm_rope_store(*theirs)
    qkv, norm_q, norm_k, temporal, spatial = as_float64(args)[:5]
    k_cache, v_cache, index, raw_k, offset = args[5:10]
    before = k_cache.clone(), v_cache.clone()
    q_out = ops.qkv_norm_rope_store(*args)
    normed = rms(qkv[:, : s.dim], norm_q), rms(qkv[:, s.dim : 2 * s.dim], norm_k)
    split = [part.reshape(-1, s.heads, s.head_dim) for part in normed]
    stored = slice(qkv.shape[0] - index.shape[0], None)
    assert q_out.dtype == dtype and q_out.shape == (qkv.shape[0], s.heads, s.head_dim)
    assert_close(q_out, theirs_q, rotate(split[0], temporal, spatial), BOUNDS[dtype])
    assert_close(k_cache[index], theirs[5][index], rotate(split[1], temporal, spatial)[stored], BOUNDS[dtype])
    assert_same(v_cache[index].flatten(1), args[0][stored, 2 * s.dim :])
    if raw:
        assert_close(raw_k[index - offset], theirs[8][index - offset], split[1][stored], BOUNDS[dtype])
    untouched = torch.ones(s.rows, dtype=torch.bool, device=index.device)
    untouched[index] = False
    assert_same(k_cache[untouched], before[0][untouched])
    assert_same(v_cache[untouched], before[1][untouched])


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("given", ["all", "sink", "memory-keys", "nothing"])
def test_reanchor(ops: Ops, dtype: torch.dtype, size: str, given: str) -> None:
    s = SIZES[size]
    args = case(ops, "reanchor", s, dtype)
    if given != "all":
        args[3] = args[3] if given == "sink" else None
        args[4] = args[4] if given == "memory-keys" else None
        args[5] = None
    kv, _, _, sink_k, memory_k, memory_v, memory_tokens = args
    _, anchor, spatial, sink64, memory64, _, _ = as_float64(args)
    expected, theirs = kv.clone(), kv.clone()
    ops.reanchor(*args)
    reference.reanchor(theirs, *args[1:])
    sink_end = memory_tokens + s.sink_frames * s.tokens
    for layer in range(s.layers):
        if sink_k is not None:
            turned = rotate(sink64[layer], anchor[s.memory_frames :], spatial)
            rows = (layer, 0, slice(memory_tokens, sink_end))
            assert_close(kv[rows], theirs[rows], turned, BOUNDS[dtype])
            expected[rows] = kv[rows]
        if memory_k is not None:
            turned = rotate(memory64, anchor[: s.memory_frames], spatial)
            rows = (layer, 0, slice(0, memory_tokens))
            assert_close(kv[rows], theirs[rows], turned, BOUNDS[dtype])
            expected[rows] = kv[rows]
        if memory_v is not None:
            expected[layer, 1, :memory_tokens] = memory_v
    assert_same(kv, expected)


@DTYPES
@ALL_SIZES
def test_reanchor_of_one_layer_without_a_memory(ops: Ops, dtype: torch.dtype, size: str) -> None:
    """How the keys are turned that a memory with rotated reads is shown."""
    args = case(ops, "reanchor", SIZES[size], dtype)
    turns, spatial, keys = args[1][SIZES[size].memory_frames :], args[2], args[3][:1]
    kv, theirs = (torch.zeros(1, 2, *keys.shape[1:], dtype=dtype, device=keys.device) for _ in range(2))
    ops.reanchor(kv, turns, spatial, keys, None, None, 0)
    reference.reanchor(theirs, turns, spatial, keys, None, None, 0)
    assert_close(kv[0, 0], theirs[0, 0], rotate(*as_float64([keys[0], turns, spatial])), BOUNDS[dtype])
    assert not kv[0, 1].any()


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_merge_attention(ops: Ops, dtype: torch.dtype, size: str, pieces: int) -> None:
    """Of pieces of other lengths, one of which has nearly all the weight."""
    s = SIZES[size]
    outputs, _ = case(ops, "merge_attention", s, dtype)
    n, generator = outputs.shape[1], torch.Generator().manual_seed(pieces)
    parts = torch.randn(2, pieces, 9, s.heads, s.head_dim, generator=generator)
    lengths = [9, 4, 1, 7][:pieces]
    q = torch.randn(n, s.heads, s.head_dim, generator=generator)
    scores = [torch.einsum("nhd,mhd->hnm", q, k[:m]) for k, m in zip(parts[0], lengths, strict=True)]
    logsumexps = torch.stack([piece.logsumexp(-1) for piece in scores]).to(outputs.device)
    attended = [
        torch.einsum("hnm,mhd->nhd", piece.softmax(-1), v[:m])
        for piece, v, m in zip(scores, parts[1], lengths, strict=True)
    ]
    outputs = torch.stack(attended).to(outputs)
    weights = logsumexps.double().softmax(0).transpose(1, 2)[..., None]
    expected = (weights * outputs.double()).sum(0).flatten(1)
    actual = ops.merge_attention(outputs, logsumexps)
    assert actual.dtype == dtype
    assert_close(actual, reference.merge_attention(outputs, logsumexps), expected, BOUNDS[dtype])
    values = torch.cat([v[:m] for v, m in zip(parts[1], lengths, strict=True)])
    whole = torch.einsum("hnm,mhd->nhd", torch.cat(scores, -1).softmax(-1), values).flatten(1)
    assert relative_error(actual.cpu(), whole) < 2 * BOUNDS[dtype]  # what all of this is for


@pytest.mark.parametrize("size", ["small", "wide"])  # one way through the kernel each
def test_merge_attention_of_pieces_far_apart(ops: Ops, size: str) -> None:
    """A piece without weight counts for nothing, and sums that no exponential holds are no infinity; NaN is seen."""
    outputs, logsumexps = case(ops, "merge_attention", SIZES[size], torch.bfloat16)
    logsumexps[0], logsumexps[1] = -300.0, 300.0
    assert_same(ops.merge_attention(outputs, logsumexps), outputs[1].flatten(1))
    logsumexps[1, -1, -1] = math.nan
    sick = ops.merge_attention(outputs, logsumexps).isnan().unflatten(1, outputs.shape[2:])
    assert sick[-1, -1].all() and int(sick.sum()) == outputs.shape[-1]


@DTYPES
@pytest.mark.parametrize("size", MEMORY_SIZES)
@pytest.mark.parametrize("keys", [None, 1, 7, 64, 113], ids=lambda keys: f"{keys or 'block'}-keys")
def test_memory_attention(ops: Ops, dtype: torch.dtype, size: str, keys: int | None) -> None:
    s = MEMORY_SIZES[size]
    args = case(ops, "memory_attention", s, dtype)
    if keys is not None:
        # Keys and values one after the other in a buffer, as in the ring: rows with a stride of their own.
        pool = torch.randn(keys, 2, s.heads, s.head_dim, generator=torch.Generator().manual_seed(keys))
        pool = pool.to(args[0])
        args[2:4] = pool[:, 0], pool[:, 1]
    if float32_is_refused(ops, "memory_attention", args):
        return
    q, norm_q, k, v, _ = as_float64(args)
    normed = rms(q, norm_q).reshape(q.shape[0], *k.shape[1:])
    scores = torch.einsum("nhd,mhd->hnm", normed, k) / math.sqrt(k.shape[-1])
    expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)
    actual = ops.memory_attention(*args)
    assert actual.dtype == dtype
    # The reference rounds nothing on the way; torch's attention in this dtype rounds the queries, as tensor cores must.
    parts = (t.transpose(0, 1)[None] for t in (normed.to(dtype), *args[2:4]))
    torchs = torch.nn.functional.scaled_dot_product_attention(*parts)[0].transpose(0, 1).flatten(1)
    assert_close(actual, torchs, expected, BOUNDS[dtype])


@DTYPES
@pytest.mark.parametrize("size", MEMORY_SIZES)
def test_gated_update(ops: Ops, dtype: torch.dtype, size: str) -> None:
    args = case(ops, "gated_update", MEMORY_SIZES[size], dtype)
    args[5].fill_(math.nan)
    if float32_is_refused(ops, "gated_update", args):
        return
    old, candidate, norm, weight, bias, _, _ = as_float64(args)
    new = rms(candidate, norm)
    gate = torch.sigmoid(torch.cat((old, new), -1) @ weight.T + bias)
    theirs = copies(args)
    reference.gated_update(*theirs)
    ops.gated_update(*args)
    assert_close(args[5], theirs[5], gate * old + (1 - gate) * new, BOUNDS[dtype])


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "spread"])
def test_modulated_layer_norm(ops: Ops, dtype: torch.dtype, size: str, dense: bool) -> None:
    args = case(ops, "modulated_layer_norm", SIZES[size], dtype)
    if not dense:
        args[0] = spread(args[0])
    x, shift, scale, _ = as_float64(args)
    actual = ops.modulated_layer_norm(*args)
    assert actual.dtype == dtype
    assert_close(actual, reference.modulated_layer_norm(*args), layer_norm(x, shift, scale), BOUNDS[dtype])


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "spread"])
def test_gated_residual_norm(ops: Ops, dtype: torch.dtype, size: str, gated: bool, dense: bool) -> None:
    args = case(ops, "gated_residual_norm", SIZES[size], dtype)
    if not dense:
        args[:2] = spread(args[0]), spread(args[1])
    if not gated:
        args[2] = None
    x, y, gate, shift, scale, _ = as_float64(args)
    added = x + (y if gate is None else gate * y)
    theirs = copies(args)
    torchs = reference.gated_residual_norm(*theirs)
    actual = ops.gated_residual_norm(*args)
    assert_close(args[0], theirs[0], added, BOUNDS[dtype])
    assert_close(actual, torchs, layer_norm(added, shift, scale), 2 * BOUNDS[dtype])  # of a rounded sum


@pytest.mark.parametrize("count", [288, 1, 7, 2051])
@pytest.mark.parametrize(
    ("seed", "block", "step"),
    [(0, 0, 0), (2**64 - 1, 2**32 - 1, 3), (2**32, 2**32, 1), (2**63 + 5, 5 * 2**32 + 9, 2**32 - 1), (7, 2**62, 4)],
)
def test_counter_noise(ops: Ops, seed: int, block: int, step: int, count: int) -> None:
    out, positions, words, _ = case(ops, "counter_noise", SIZES["small"], torch.float32)
    positions[:] = -1
    positions[POSITION_FIELDS.index("block")] = block
    words[:] = torch.tensor([seed % 2**32, seed // 2**32])
    room = out.new_full((count + 5,), math.nan)
    ops.counter_noise(room[:count], positions, words, step)
    expected = torch.tensor(naive_noise(seed, block, step, count), dtype=torch.float64)
    # A float32 of other words would be nowhere near; logarithms and cosines may be of another library: one ulp.
    torch.testing.assert_close(room[:count].cpu().double(), expected, rtol=2.0**-23, atol=1e-12)
    assert room[count:].isnan().all(), "written past the end"


def test_counter_noise_follows_the_positions_that_advance_writes(ops: Ops) -> None:
    args = case(ops, "advance", SIZES["small"], torch.float32)
    out, _, seed, step = case(ops, "counter_noise", SIZES["small"], torch.float32)
    args[0][0] = 2**32 - 2
    for block in (2**32 - 1, 2**32):
        ops.advance(*args)
        ops.counter_noise(out, args[0], seed, step)
        expected = naive_noise(7 + 3 * 2**32, block, step, out.numel())
        torch.testing.assert_close(out.flatten().cpu(), torch.tensor(expected), rtol=2.0**-23, atol=1e-12)


@DTYPES
@pytest.mark.parametrize("last", [False, True], ids=["renoised", "last"])
@pytest.mark.parametrize("count", [288, 1, 7, 2051])
def test_flow_step(ops: Ops, dtype: torch.dtype, last: bool, count: int) -> None:
    args = case(ops, "flow_step", Sizes(tokens=43), dtype)
    args[0], args[1], args[3] = (args[i].flatten()[:count].contiguous() for i in (0, 1, 3))
    if last:
        args[3] = None
    x, flow, (sigma, following), noise = as_float64(args)
    expected = x - sigma * flow
    if noise is not None:
        expected = (1 - following) * expected + following * noise
    ops.flow_step(*args)
    assert torch.equal(args[0], expected.float())


@DTYPES
@pytest.mark.parametrize("channels", [6, 96, 100, 384, 1024, 1030])
@pytest.mark.parametrize("zeros", [False, True], ids=["random", "zeros"])
def test_rms_silu_window(ops: Ops, dtype: torch.dtype, channels: int, zeros: bool) -> None:
    args = case(ops, "rms_silu_window", Sizes(vae=(3, 5, 4, channels)), dtype)
    if zeros:
        for tensor in args[:3]:
            tensor.zero_()
    x, bias, residual, gamma, _, history, _ = as_float64(args)
    past, theirs = len(history), copies(args)
    remembered = args[5].clone()
    reference.rms_silu_window(*theirs)
    total = x + bias + residual
    normed = total / total.norm(dim=-1, keepdim=True).clamp(min=1e-12) * math.sqrt(channels) * gamma
    ops.rms_silu_window(*args)
    window = args[4]
    expected = normed * torch.sigmoid(normed)
    if zeros:
        assert not window[past:].any()
    else:
        assert_close(args[0], theirs[0], total, BOUNDS[dtype])
        assert_close(window[past:], theirs[4][past:], expected, BOUNDS[dtype])
    assert_same(window[:past], remembered)
    assert_same(args[5], window[-past:])


@DTYPES
@pytest.mark.parametrize("given", ["nothing", "bias", "residual", "keep"])
def test_rms_silu_window_of_fewer_terms(ops: Ops, dtype: torch.dtype, given: str) -> None:
    args = case(ops, "rms_silu_window", Sizes(vae=(3, 5, 4, 96)), dtype)
    args[1], args[2] = (args[i] if given == name else None for i, name in ((1, "bias"), (2, "residual")))
    args[6] = given == "keep"
    before, theirs = copies(args), copies(args)
    reference.rms_silu_window(*theirs)
    total = as_float64(args)[0] + sum(term for term in as_float64(args)[1:3] if term is not None)
    ops.rms_silu_window(*args)
    assert_same(args[0], before[0])  # not kept, or nothing to add
    normed = total / total.norm(dim=-1, keepdim=True) * math.sqrt(96) * as_float64(args)[3]
    assert_close(args[4][2:], theirs[4][2:], normed * torch.sigmoid(normed), BOUNDS[dtype])


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("past", [0, 1, 2, 3])
def test_rms_silu_window_moves_any_past(ops: Ops, frames: int, past: int) -> None:
    args = case(ops, "rms_silu_window", Sizes(vae=(frames, 5, 4, 96)), torch.bfloat16)
    remembered = torch.randn(past, 5, 4, 96, device=args[0].device).to(torch.bfloat16)
    args[4], args[5] = args[4].new_empty(past + frames, 5, 4, 96), remembered.clone()
    alone = copies(args)
    alone[4][:past], alone[5] = remembered, None
    ops.rms_silu_window(*args)
    ops.rms_silu_window(*alone)
    assert_same(args[4][:past], remembered)
    assert_same(args[5], args[4][frames:])
    assert_same(args[4], alone[4])  # a window that has its past already


@DTYPES
@pytest.mark.parametrize("channels", [6, 96, 1500])  # one way through the kernel each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rms_silu_window_hides_no_nan(ops: Ops, dtype: torch.dtype, channels: int, value: float) -> None:
    args = case(ops, "rms_silu_window", Sizes(vae=(3, 5, 4, channels)), dtype)
    args[2][1, 2, 3, channels - 1] = value
    ops.rms_silu_window(*args)
    sick = args[4][2:].isnan().any(-1)
    assert sick[1, 2, 3] and int(sick.sum()) == 1


@DTYPES
@pytest.mark.parametrize("frame", [(3, 5, 4), (1, 1, 1), (2, 16, 16), (1, 37, 41)], ids=str)
def test_frames_to_uint8(ops: Ops, dtype: torch.dtype, frame: tuple[int, int, int]) -> None:
    video, out = case(ops, "frames_to_uint8", Sizes(vae=(*frame, 3)), dtype)
    video[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.0])
    theirs = torch.empty_like(out)
    reference.frames_to_uint8(video, theirs)
    ops.frames_to_uint8(video, out)
    assert_same(out, theirs)
    expected = ((video.double().clamp(-1, 1) + 1) * 127.5).round()
    assert int((out.double() - expected).abs().max()) <= (0 if dtype == torch.float32 else 1)
    assert out[0, 0, 0].tolist() == [0, 255, 128]
