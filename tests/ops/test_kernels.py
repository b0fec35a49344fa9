"""The kernels as operations of torch: whole rollouts, what torch.compile sees of them, and what they refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import EPS, OPS, Sizes, make_case
from torch import Tensor

import echo_rt
from echo_rt.errors import BackendError
from echo_rt.ops.backends import available_backends, check_device, load_ops
from echo_rt.ops.schema import Ops
from echo_rt.utils.build_info import __version__
from echo_rt.utils.device import FLOAT8
from echo_rt.verify.bundles import verify_bundle

BACKENDS = [name for name, status in available_backends().items() if name != "torch" and status == "available"]
DEVICES = {"emulated": "cpu", "cuda": "cuda"}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# All that torch.library.opcheck does unless told otherwise.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES_ALONE = "test_aot_dispatch_dynamic"  # takes longest, and is the same for both dtypes
# Of every operation at once: the memory's have tiles for this head size.
SIZES = Sizes(tokens=5, heads=2, head_dim=64)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def test_the_emulated_kernels_are_there_where_the_gpus_are_not() -> None:
    status = available_backends()
    assert "available" in (status["emulated"], status["cuda"]), status


# ---- whole rollouts


@HALF
def test_a_golden_rollout(ops: Ops, golden_dir: Path, dtype: torch.dtype) -> None:
    report = verify_bundle(golden_dir / "rollout_small", device=DEVICES[ops.name], dtype=dtype, backend=ops.name)
    assert report.passed, [f"{row.name} {row.error:.1e}" for row in report.rows if not row.ok]


def test_a_rollout_with_a_memory_is_refused_in_float32(ops: Ops, golden_dir: Path) -> None:
    with pytest.raises(BackendError, match=r"in bfloat16 or float16 .* got float32"):
        verify_bundle(golden_dir / "rollout_small", device=DEVICES[ops.name], dtype="float32", backend=ops.name)


# ---- what torch sees


@HALF
@pytest.mark.parametrize("op", OPS)
def test_opcheck(ops: Ops, op: str, dtype: torch.dtype) -> None:
    """Schema, fake kernel and behaviour agree: nothing is written that is not marked, nothing returned is an input."""
    args = make_case(op, SIZES, dtype, DEVICES[ops.name])
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.dtype == FLOAT8:
            tensor.zero_()
        elif isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.nan_to_num_()  # what is yet to be written
    overload = getattr(torch.ops.echo_rt, op).default
    checks = [check for check in OPCHECKS if dtype == torch.bfloat16 or check != SHAPES_ALONE]
    if any(isinstance(tensor, Tensor) and tensor.dtype == FLOAT8 for tensor in args):
        checks.remove("test_schema")  # it does arithmetic that torch has not for float8; what it looks for is this
        given = [tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in args]
        overload(*args)
        for before, after, argument in zip(given, args, overload._schema.arguments, strict=True):
            if isinstance(before, Tensor):
                same = torch.equal(before.view(torch.uint8), after.view(torch.uint8))
                assert same != (argument.alias_info is not None and argument.alias_info.is_write)
    torch.library.opcheck(overload, tuple(args), test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_goes_through_the_operations(ops: Ops, backend: str) -> None:
    device = DEVICES[ops.name]
    qkv_args = make_case("qkv_norm_rope_store", SIZES, torch.bfloat16, device)
    norm_args = make_case("gated_residual_norm", SIZES, torch.bfloat16, device)

    def layer(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, x: Tensor) -> Tensor:
        q = ops.qkv_norm_rope_store(qkv, *qkv_args[1:5], k_cache, v_cache, *qkv_args[7:])
        y = q.flatten(1) + k_cache.flatten(1)[: q.shape[0]]
        y = ops.gated_residual_norm(x, y, *norm_args[2:])
        return ops.modulated_layer_norm(y, *norm_args[3:]) + x

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        given = [t.clone() for t in (qkv_args[0], qkv_args[5], qkv_args[6], norm_args[0])]
        results.append([function(*given), *given])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_an_exported_program_holds_the_operations(ops: Ops) -> None:
    norm_args = make_case("gated_residual_norm", SIZES, torch.bfloat16, DEVICES[ops.name])
    noise_args = make_case("counter_noise", SIZES, torch.bfloat16, DEVICES[ops.name])

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            noise = torch.zeros_like(noise_args[0])
            ops.counter_noise(noise, positions, *noise_args[2:])
            return ops.gated_residual_norm(x, y, *norm_args[2:]), noise

    given = (norm_args[0], norm_args[1], noise_args[1])
    program = torch.export.export(Layer(), tuple(t.clone() for t in given))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"echo_rt.gated_residual_norm.default", "echo_rt.counter_noise.default"} <= names
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    for expected, actual in zip(Layer()(*ours), program.module()(*theirs), strict=True):
        assert torch.equal(expected, actual)
    assert torch.equal(ours[0], theirs[0])  # the sum that is written in place


# ---- what is refused

Change = Callable[[list[Any]], object]


def _set(index: int, change: Callable[[Any], Any]) -> Change:
    return lambda args: args.__setitem__(index, change(args[index]))


def _misaligned(tensor: Tensor) -> Tensor:
    """The same, off the boundary of 16 bytes that allocators keep: by one element, or by two that make a pair."""
    off = 2 if tensor.dtype == torch.float32 else 1
    room = tensor.new_empty(tensor.numel() + off)
    room[off:] = tensor.flatten()
    return room[off:].view(tensor.shape)


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


def _a_frame_apart(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of its shape, of which the second begins with the second frame of the first."""
    room = torch.cat((tensor, tensor[:1]))
    return room[:-1], room[1:]


# Operation, what is wrong, and the words: name, expected, got.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "noise-dtype": ("counter_noise", _set(0, Tensor.double), "out: expected dtype float32; got float64"),
    "noise-stride": ("counter_noise", _set(0, _strided), r"out: expected contiguous memory; got strides \["),
    "noise-alignment": ("counter_noise", _set(0, _misaligned), "out: expected an address that is a multiple of 16"),
    "noise-positions": ("counter_noise", _set(1, lambda t: t[:4]), r"positions: expected shape \[5\]; got \[4\]"),
    "noise-seed": ("counter_noise", _set(2, Tensor.int), "seed: expected dtype int64; got int32"),
    "noise-step": ("counter_noise", _set(3, lambda _: -1), r"step: expected 0\.\.4294967295; got -1"),
    "flow-dtype": ("flow_step", _set(0, Tensor.double), "x: expected dtype float32; got float64"),
    "flow-integers": ("flow_step", _set(1, Tensor.int), "flow: expected dtype float32, bfloat16 or float16; got int32"),
    "flow-shape": ("flow_step", _set(1, lambda t: t[:1]), r"flow: expected shape \[3, 4, 2, 10\]; got \[1, 4, 2, 10\]"),
    "flow-sigmas": ("flow_step", _set(2, lambda t: t[:1]), r"sigmas: expected shape \[2\]; got \[1\]"),
    "flow-noise-stride": ("flow_step", _set(3, _strided), r"noise: expected contiguous memory; got strides \["),
    "flow-alignment": ("flow_step", _set(0, _misaligned), "x: expected an address that is a multiple of 16; got 8"),
    "dtype-before-shape": (
        "flow_step",
        lambda args: (_set(1, lambda t: t[:1])(args), _set(3, Tensor.double)(args)),
        "noise: expected dtype float32; got float64",
    ),
    "bytes": ("frames_to_uint8", _set(1, Tensor.float), "out: expected dtype uint8; got float32"),
    "window": ("rms_silu_window", _set(4, lambda t: t[:2]), "window: expected at least the 3 frames of x; got 2"),
    "window-of-residual": (
        "rms_silu_window",
        lambda args: args.__setitem__(2, args[4][:3]),
        "window: expected memory apart from that of residual; got memory that they share",
    ),
    "history": (
        "rms_silu_window",
        _set(5, lambda t: t[:1]),
        r"history: expected shape \[2, 5, 4, 6\]; got \[1, 5, 4, 6\]",
    ),
    "bias": ("rms_silu_window", _set(1, Tensor.half), "bias: expected dtype float32; got float16"),
    "window-rank": ("rms_silu_window", _set(0, lambda t: t[0]), r"x: expected 4 dimensions; got shape \["),
    "angles": ("rope_table", _set(0, Tensor.float), "frames: expected dtype int64; got float32"),
    "positions": ("advance", _set(0, lambda t: t[:4]), r"positions: expected shape \[5\]; got \[4\]"),
    "block": ("advance", _set(9, lambda t: t[:-1]), "write_index: expected a multiple of frames_per_block 3 entries"),
    "qkv-width": (
        "qkv_norm_rope_store",
        _set(0, lambda t: t[:, 1:]),
        r"qkv: expected shape \[15, 384\]; got \[15, 383\]",
    ),
    "qkv-rows": ("qkv_norm_rope_store", _set(0, _strided), "qkv: expected dense rows; got strides"),
    "qkv-frames": ("qkv_norm_rope_store", _set(0, lambda t: t[1:]), "qkv: expected 3 frames of 5 tokens; got 14"),
    "cache-dtype": ("qkv_norm_rope_store", _set(6, Tensor.float), "v_cache: expected dtype bfloat16; got float32"),
    "anchors": (
        "reanchor",
        _set(1, lambda t: t[:, :1]),
        r"temporal_anchor: expected shape \[6, 12, 2\]; got \[6, 1, 2\]",
    ),
    "angle-alignment": (
        "reanchor",
        _set(2, lambda t: torch.cat((t.flatten(), t[0, 0]))[1 : 1 + t.numel()].view(t.shape)),
        "spatial: expected an address that is a multiple of 8; got 4 bytes more",
    ),
    "sink": ("reanchor", _set(3, lambda t: t[:, 1:]), r"sink_k: expected shape \[2, 15, 2, 64\]; got \[2, 14, 2, 64\]"),
    "gate": ("gated_residual_norm", _set(2, Tensor.half), "gate: expected dtype float32; got float16"),
    "norm": ("modulated_layer_norm", _set(1, lambda t: t[1:]), r"shift: expected shape \[128\]; got \[127\]"),
    "memory-keys": ("memory_attention", _set(2, lambda t: t[:0]), "k: expected at least one key; got 0"),
    "memory-values": (
        "memory_attention",
        _set(3, lambda t: t[1:]),
        r"v: expected shape \[15, 2, 64\]; got \[14, 2, 64\]",
    ),
    "memory-rows": ("memory_attention", _set(0, _misaligned), "q: expected an address that is a multiple of 16; got 2"),
    "update-weight": (
        "gated_update",
        _set(3, lambda t: t[:, :128]),
        r"gate_weight: expected shape \[128, 256\]; got \[128, 128\]",
    ),
    "update-in-place": (
        "gated_update",
        lambda args: args.__setitem__(5, args[0]),
        "out: expected memory apart from that of old; got memory that they share",
    ),
    "conv-weight-layout": (
        "causal_conv",
        _set(1, lambda t: t.contiguous()),
        r"weight: expected channels-last memory; got strides \[162, 27, 9, 3, 1\]",
    ),
    "conv-weight": (
        "causal_conv",
        _set(1, lambda t: t[:, 1:]),
        r"weight: expected shape \[7, 6, 3, 3, 3\]; got \[7, 5,",
    ),
    "conv-kernel": (
        "causal_conv",
        _set(1, lambda t: t[..., :2, :2]),
        "weight: expected a kernel of 1 or 3 rows; got 2",
    ),
    "conv-square": ("causal_conv", _set(1, lambda t: t[..., :1]), "weight: expected as many columns as rows, 3; got 1"),
    "conv-past": ("causal_conv", _set(0, lambda t: t[:1]), "window: expected at least 2 past frames; got 1"),
    "conv-frames": (
        "causal_conv",
        _set(0, lambda t: t[:-1]),
        r"residual: expected shape \[2, 5, 4, 7\]; got \[3, 5, 4, 7\]",
    ),
    "conv-dtype": ("causal_conv", _set(2, Tensor.half), "bias: expected dtype float32; got float16"),
    "conv-residual": (
        "causal_conv",
        lambda args: args.__setitem__(slice(3, None), _a_frame_apart(args[3])),
        "out: expected memory apart from that of residual; got memory that they share",
    ),
    "hopper-channels": (
        "causal_conv_hopper",
        _set(0, lambda t: t[..., :24].contiguous()),
        "window: expected a multiple of 32 channels; got 24",
    ),
    "hopper-weight": (
        "causal_conv_hopper",
        _set(1, lambda t: t[:, :, :, :8]),
        r"weight: expected shape \[2, 3, 1, 9, 4, 96, 8\]; got \[2, 3, 1, 8,",
    ),
    "hopper-past": ("causal_conv_hopper", _set(0, lambda t: t[:1]), "window: expected at least 2 past frames; got 1"),
    "hopper-out": (
        "causal_conv_hopper",
        _set(2, lambda t: t[1:]),
        r"out: expected shape \[3, 5, 4, 192\]; got \[2, 5, 4, 192\]",
    ),
    "upsample-size": (
        "upsample_conv",
        _set(3, lambda t: t[:, 1:]),
        r"out: expected shape \[3, 10, 8, 7\]; got \[3, 9,",
    ),
    "upsample-weight": (
        "upsample_conv",
        _set(1, lambda t: t[:3]),
        r"weight: expected shape \[4, 7, 2, 2, 6\]; got \[3, 7,",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(ops: Ops, case: str) -> None:
    op, spoil, words = REFUSED[case]
    args = make_case(op, SIZES, torch.bfloat16, DEVICES[ops.name])
    getattr(ops, op)(*args)
    spoil(args)
    with pytest.raises(ValueError, match=rf"^echo_rt\.{op}: {words}"):
        getattr(ops, op)(*args)


def test_head_sizes_without_tiles_are_refused(ops: Ops) -> None:
    args = make_case("memory_attention", Sizes(), torch.bfloat16, DEVICES[ops.name])
    with pytest.raises(ValueError, match="k: expected head size 64 or 128; got 12"):
        ops.memory_attention(*args)
    with pytest.raises(ValueError, match="old: expected a width that is a multiple of 16; got 24"):
        ops.gated_update(*make_case("gated_update", Sizes(), torch.bfloat16, DEVICES[ops.name]))


@HALF
@pytest.mark.parametrize(
    "op", ["qkv_norm_rope_store", "reanchor", "modulated_layer_norm", "gated_residual_norm", "rms_silu_window"]
)
def test_memory_bound_operations_take_tensors_that_start_anywhere(ops: Ops, op: str, dtype: torch.dtype) -> None:
    args = make_case(op, SIZES, dtype, DEVICES[ops.name])
    moved = [_misaligned(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    results = [[getattr(ops, op)(*given), *given] for given in (args, moved)]
    for expected, actual in zip(*results, strict=True):
        if isinstance(expected, Tensor):
            # Rows are summed in another order, which rounds some elements to their other neighbour.
            torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("op", ["qkv_norm_rope_store", "modulated_layer_norm", "gated_residual_norm"])
def test_rows_that_no_block_of_threads_can_hold_are_refused(ops: Ops, op: str) -> None:
    """Of whole 16-byte pieces up to 8192 channels, else up to 4096."""
    name = "k_cache" if op == "qkv_norm_rope_store" else "x"
    for heads, head_dim, fits in ((64, 128, True), (65, 128, False), (32, 126, True), (33, 126, False)):
        sizes = Sizes(frames=1, tokens=1, heads=heads, head_dim=head_dim, local_frames=1, sink_frames=1)
        args = make_case(op, sizes, torch.bfloat16, DEVICES[ops.name])
        if not fits:
            words = "expected at most 8192 channels, or 4096 where not everything .* 16-byte pieces"
            with pytest.raises(ValueError, match=rf"^echo_rt\.{op}: {name}: {words}; got {sizes.dim}$"):
                getattr(ops, op)(*args)
        else:
            assert getattr(ops, op)(*args).isfinite().all()


def test_feed_forward_rows_that_no_block_of_threads_can_hold_are_refused(ops: Ops) -> None:
    for width, fits in ((12288, True), (12296, False), (4095, True), (4097, False)):
        args = make_case("gelu_quantize", Sizes(frames=1, tokens=1, ffn_dim=width), torch.bfloat16, DEVICES[ops.name])
        if fits:
            ops.gelu_quantize(*args)
            assert args[1].float().isfinite().all()
            continue
        words = "x: expected at most 12288 channels, or 4096 where not everything .* 16-byte pieces"
        with pytest.raises(ValueError, match=rf"^echo_rt\.gelu_quantize: {words}; got {width}$"):
            ops.gelu_quantize(*args)


def test_no_rows_are_no_work(ops: Ops) -> None:
    x, shift, scale, _ = make_case("modulated_layer_norm", SIZES, torch.bfloat16, DEVICES[ops.name])
    assert ops.modulated_layer_norm(x[:0], shift, scale, EPS).shape == (0, SIZES.dim)
    window, weight, bias, residual, out = make_case("causal_conv", SIZES, torch.bfloat16, DEVICES[ops.name])
    ops.causal_conv(window[: weight.shape[2] - 1], weight, bias, residual[:0], out[:0])


def test_a_device_that_the_backend_is_not_for(ops: Ops) -> None:
    own, other = torch.device(DEVICES[ops.name]), torch.device("cpu" if ops.name == "cuda" else "cuda")
    check_device(ops, own)
    check_device(load_ops("torch"), other)
    with pytest.raises(BackendError, match=f"backend '{ops.name}' runs on device '{own}', got '{other}'"):
        check_device(ops, other)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80 86 89", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (9, 1), False),
        ("80 90a 100 120", (12, 1), True),
        ("80 90a 100", (12, 0), False),
        ("120", (10, 0), False),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for(
    monkeypatch: pytest.MonkeyPatch, built: str, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.delattr(echo_rt, "_ops", raising=False)
    monkeypatch.setitem(sys.modules, "echo_rt._ops", _built(BACKEND="cuda", CUDA_ARCHS=built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda, device = SimpleNamespace(name="cuda"), torch.device("cuda:1")
    if runs:
        check_device(cuda, device)
        return
    listed = ", ".join(f"sm_{architecture}" for architecture in built.split())
    own = "sm_{}{}".format(*capability)
    with pytest.raises(BackendError, match=f"kernels for {listed}, and cuda:1 is {own}; .* pip install") as error:
        check_device(cuda, device)
    assert "\n" not in str(error.value)


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the kernels built for an NVIDIA GPU")
def test_tensors_of_two_devices_are_refused() -> None:
    args = make_case("flow_step", SIZES, torch.bfloat16, "cuda")
    args[2] = args[2].cpu()
    with pytest.raises(ValueError, match="sigmas: expected device cuda:0, that of x; got cpu"):
        load_ops("cuda").flow_step(*args)


# ---- why a backend is not there


def _built(**changes: str) -> SimpleNamespace:
    facts = {"BACKEND": "emulated", "VERSION": __version__, "TORCH": torch.__version__, "CUDA_ARCHS": ""}
    return SimpleNamespace(**(facts | changes))


@pytest.mark.parametrize(
    ("library", "backend", "words"),
    [
        (None, "emulated", "torch was not there when it was compiled"),
        (_built(VERSION="0.0.1"), "emulated", f"of version 0.0.1, and this is {__version__}"),
        (_built(TORCH="2.3.1+cpu"), "emulated", "compiled with torch 2.3.1"),
        (_built(BACKEND="cuda"), "emulated", "ECHO_RT_BUILD=emulated"),
        (_built(), "cuda", "CUDA"),
    ],
    ids=["absent", "old", "other-torch", "for-gpus", "for-hosts"],
)
def test_an_absent_backend_says_why(
    monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace | None, backend: str, words: str
) -> None:
    monkeypatch.delattr(echo_rt, "_ops", raising=False)
    monkeypatch.setitem(sys.modules, "echo_rt._ops", library)  # None: an import of it finds nothing
    with pytest.raises(BackendError, match=words) as error:
        load_ops(backend)
    assert "\n" not in str(error.value)
