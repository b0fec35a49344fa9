"""Float8 rows, their product, and which layers of a transformer are multiplied so."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import relative_error
from streaming import DEVICES, require
from torch import Tensor
from torch.nn.functional import gelu, linear

from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.linear import Float8Linear, Linear, Product, feed_forward, float8_attention, kept_from_float8
from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.ops.float8 import FLOAT8_MAX, on_tensor_cores, product, quantize_rows
from echo_rt.utils.device import FLOAT8, dtype_name, parse_dtype, working_dtype

BACKENDS = [name for name, status in available_backends().items() if status == "available"]
CPU = torch.device("cpu")
# Two rows of rounding to three bits of mantissa, at random: 2^-4 / sqrt(3) each for the worst mantissa.
FLOAT8_PRODUCT = 5e-2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- rows


def test_every_value_is_the_nearest_one() -> None:
    rows = torch.cat((normal(50, 64), 1e-3 * normal(50, 64, seed=1) ** 5, 1e20 * normal(2, 64, seed=2)))
    values, scales = quantize_rows(rows)
    assert values.dtype == FLOAT8 and scales.shape == (102,)
    torch.testing.assert_close(scales, rows.abs().amax(1) / FLOAT8_MAX, rtol=1e-6, atol=0)
    finite = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
    finite = finite[finite.isfinite()]
    wanted = rows.double() / scales.double()[:, None]
    least = (finite - wanted[..., None]).abs().amin(-1)
    assert ((values.double() - wanted).abs() <= least * (1 + 1e-5) + 1e-5 * wanted.abs()).all()
    assert (values.float().abs().amax(1) == FLOAT8_MAX).all(), "the range is not used"


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    rows = normal(5, 32)
    rows[0], rows[1, 3], rows[2, 4], rows[3] = 0, math.nan, math.inf, 1e-42
    values, scales = quantize_rows(rows)
    for row in (0, 3):
        assert not values[row].float().any() and scales[row] > 0 and scales[row].reciprocal().isfinite()
    out = product(values, scales, *quantize_rows(normal(16, 32, seed=1)), torch.zeros(16, dtype=torch.bfloat16))
    assert out[1].isnan().all() and out[2].isnan().all(), "a product hides what is not finite"
    assert out[[0, 3, 4]].isfinite().all() and not out[0].any()


# ---- products


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("no GPU that multiplies float8")
    return torch.device(request.param)


@pytest.mark.parametrize(("into", "out"), [(64, 48), (24, 7)], ids=["whole", "odd"])
def test_a_product_is_that_of_the_numbers(device: torch.device, into: int, out: int) -> None:
    x, weight = (quantize_rows(normal(rows, into, seed=rows).to(device)) for rows in (5, out))
    bias = normal(out, seed=2).to(device, torch.bfloat16)
    numbers = [values.double() * scales.double()[:, None] for values, scales in (x, weight)]
    expected = numbers[0] @ numbers[1].T + bias.double()
    actual = product(*x, *weight, bias)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 3e-3  # one rounding


def test_the_call_of_the_library_is_one_that_it_takes() -> None:
    """Its arguments are the same on a GPU, but for what a CPU's version may not have."""
    x, weight = quantize_rows(normal(5, 64)), quantize_rows(normal(48, 64, seed=1))
    bias = normal(48, seed=2).bfloat16()
    try:
        actual = on_tensor_cores(*x, *weight, bias)
    except RuntimeError as error:
        pytest.skip(f"this torch has no scales of rows on a CPU: {error}")
    assert relative_error(actual, product(*x, *weight, bias).double()) < 3e-3


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_both_kinds_of_product_do_the_same_with_what_comes_before(backend: str) -> None:
    ops = load_ops(backend)
    weight, bias = normal(48, 64) / 8, normal(48, seed=1).bfloat16()
    kinds: tuple[Product, ...] = (Linear(weight.bfloat16(), bias), Float8Linear.quantize(weight, bias))
    x, y, gate = normal(7, 64, seed=2).bfloat16(), normal(7, 64, seed=3).bfloat16(), normal(64, seed=4)
    shift, scale = normal(64, seed=5), 1 + normal(64, seed=6)
    sums = [x.clone(), x.clone()]
    results = [
        [
            kind.after_norm(ops, x, shift, scale, 1e-6),
            kind.after_residual_norm(ops, sums[index], y, gate, shift, scale, 1e-6),
            kind.after_residual_norm(ops, x.clone(), y, None, shift, scale, 1e-6),
            kind.after_gelu(ops, x),
        ]
        for index, kind in enumerate(kinds)
    ]
    assert torch.equal(*sums) and not torch.equal(sums[0], x)
    for plain, quantized in zip(*results, strict=True):
        assert quantized.dtype == torch.bfloat16
        assert 1e-3 < relative_error(quantized, plain.double()) < FLOAT8_PRODUCT


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_that_is_part_of_a_product(device: str) -> None:
    """By the tanh formula on every device: that with erf is off by some 3e-4 of these numbers."""
    require(device)
    x, weight, bias = normal(40, 64), normal(48, 64, seed=1) / 8, normal(48, seed=2)
    exact = gelu(linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    made = Linear(weight.to(device), bias.to(device)).then_gelu(x.to(device))
    assert relative_error(made.cpu(), exact) < 1e-5
    x, weight, bias = (tensor.to(device, torch.bfloat16) for tensor in (x, weight, bias))
    assert relative_error(Linear(weight, bias).then_gelu(x).cpu(), exact) < 1e-2


@pytest.mark.parametrize("kept", [(True, True), (True, False), (False, True), (False, False)])
def test_a_feed_forward_of_either_kind(kept: tuple[bool, bool]) -> None:
    ops = load_ops("torch")
    weights = [normal(96, 64) / 8, normal(64, 96, seed=1) / 8]
    biases = [normal(96, seed=2).bfloat16(), normal(64, seed=3).bfloat16()]
    into, out = (
        Linear(weight.bfloat16(), bias) if plain else Float8Linear.quantize(weight, bias)
        for weight, bias, plain in zip(weights, biases, kept, strict=True)
    )
    x, y = normal(7, 64, seed=4).bfloat16(), normal(7, 64, seed=5).bfloat16()
    shift, scale = normal(64, seed=6), 1 + normal(64, seed=7)
    summed = x.clone()
    made = feed_forward(ops, into, out, summed, y, shift, scale, 1e-6)
    normed = ops.gated_residual_norm(x, y, None, shift, scale, 1e-6)
    assert torch.equal(summed, x)
    hidden = gelu(linear(normed.double(), weights[0].double(), biases[0].double()), approximate="tanh")
    exact = linear(hidden, weights[1].double(), biases[1].double())
    assert relative_error(made, exact) < (1e-2 if all(kept) else FLOAT8_PRODUCT)


# ---- which layers


def test_layers_are_kept_by_name() -> None:
    assert kept_from_float8(2, 3, FLOAT8, ()) == frozenset()
    assert kept_from_float8(2, 3, FLOAT8, ("*.ffn.2",)) == {"blocks.0.ffn.2", "blocks.1.ffn.2"}
    own = {f"blocks.1.self_attn.{name}" for name in "qkv"}
    assert kept_from_float8(2, 3, FLOAT8, ["blocks.1.self_attn.k"]) == own  # one product
    others = {f"blocks.1.{name}" for name in ("cross_attn.q", "ffn.0", "ffn.2", "self_attn.attention")}
    assert kept_from_float8(2, 3, FLOAT8, ("blocks.1.*",)) == own | others
    assert len(kept_from_float8(2, 3, FLOAT8, ("*",))) == len(kept_from_float8(2, 3, torch.bfloat16, ())) == 14


def test_steps_are_kept_by_name() -> None:
    first = {f"blocks.{layer}.self_attn.attention@0" for layer in range(2)}
    assert kept_from_float8(2, 3, FLOAT8, ("*.attention@0",)) == first
    some = kept_from_float8(2, 3, FLOAT8, ("blocks.0.*@[02]", "blocks.1.self_attn.attention@1"))
    assert some == {f"blocks.{name}" for name in ("0.self_attn.attention@0", "0.self_attn.attention@2")} | {
        "blocks.1.self_attn.attention@1"
    }
    whole = kept_from_float8(2, 3, FLOAT8, ("*.attention", "*.attention@0"))
    assert whole == kept_from_float8(2, 3, FLOAT8, ("*.attention",)), "a layer that is kept is so at every step"


def test_layers_that_attend_in_float8() -> None:
    def layers(dtype: torch.dtype, *patterns: str) -> dict[int, set[int]]:
        kept = kept_from_float8(4, 2, dtype, patterns)
        return {layer: set(steps) for layer, steps in float8_attention(4, kept).items()}

    every = {0: set(), 1: set(), 2: set()}
    assert layers(FLOAT8) == every, "the memory reads the last layer's cache in 16 bits"
    assert layers(FLOAT8, "*.ffn.2", "blocks.1.self_attn.attention") == {0: set(), 2: set()}
    assert layers(FLOAT8, "*.attention@1", "blocks.2.*@0", "blocks.0.self_attn.attention") == {1: {1}, 2: {0, 1}}
    assert layers(FLOAT8, "*") == layers(torch.bfloat16) == {}


@pytest.mark.parametrize(
    ("dtype", "patterns", "words"),
    [
        (
            FLOAT8,
            ("*.ffn.0", "blocks.2.*"),
            r"'blocks\.2\.\*' matches no layer .*\.attention, .*\.attention@S at .*; N in 0\.\.1, S in 0\.\.2$",
        ),
        (FLOAT8, ("*.attention@3",), r"'\*\.attention@3' matches no layer .* S in 0\.\.2$"),
        (FLOAT8, ("*.ffn.2@0",), r"'\*\.ffn\.2@0' matches no layer"),  # a product's weights are in one dtype
        (FLOAT8, ("*.self_attn.o",), r"'\*\.self_attn\.o' matches no layer"),  # it is in bfloat16 anyway
        (FLOAT8, ("",), "'' matches no layer"),
        (FLOAT8, "*.ffn.2", r"a sequence of patterns like '\*\.ffn\.2', got '\*\.ffn\.2'"),
        (FLOAT8, (3,), r"a sequence of patterns .* got \(3,\)"),
        (torch.bfloat16, ("*.ffn.2",), "for dtype 'float8', and the dtype is 'bfloat16'"),
    ],
)
def test_patterns_that_keep_nothing_are_refused(dtype: torch.dtype, patterns: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kept_from_float8(2, 3, dtype, patterns)


# ---- the dtype


def test_float8_is_a_dtype_that_works_in_bfloat16() -> None:
    assert parse_dtype("float8", CPU) == parse_dtype(FLOAT8, CPU) == FLOAT8
    assert working_dtype(FLOAT8) == torch.bfloat16 and working_dtype(torch.float16) == torch.float16
    assert [dtype_name(parse_dtype(name, CPU)) for name in ("float8", "float32")] == ["float8", "float32"]


@pytest.mark.parametrize(("capability", "able"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_float8_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], able: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda:1")
    assert parse_dtype("bfloat16", gpu) == torch.bfloat16
    if able:
        assert parse_dtype("float8", gpu) == FLOAT8
        return
    own = "sm_{}{}".format(*capability)
    with pytest.raises(BackendError, match=rf"needs a GPU .* sm_89 or newer .* cuda:1 is {own}; choose"):
        parse_dtype("float8", gpu)
