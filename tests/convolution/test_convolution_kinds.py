"""The kinds of convolution: their numbers against float64 at odd sizes, in every dtype, laid out in any way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from closeness import relative_error
from naive_convolution import inputs, naive

from echo_rt.convolution import ConvolutionCandidate, ConvolutionShape, implementations
from echo_rt.convolution.backends import tiled
from echo_rt.ops import reference
from echo_rt.ops.backends import available_backends, load_ops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


EMULATED = available_backends()["emulated"] == "available"  # where there is a build for the GPU, it is not
OPS = load_ops("emulated") if EMULATED else None
KINDS = implementations(OPS)
BY_NAME = {(kind.name, kind.enlarges): kind for kind in KINDS}


def is_kernel(kind: ConvolutionCandidate) -> bool:
    """One of our own."""
    return kind.name.startswith("kernel")


# A few roundings of the sums; in float32 those of another order of them.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

# (frames, height, width, channels, out_channels, kernel)
CAUSAL = [
    (5, 7, 9, 6, 10, (3, 3, 3)),
    (3, 1, 1, 1, 1, (3, 3, 3)),
    (3, 2, 13, 5, 3, (3, 3, 3)),
    (6, 5, 4, 8, 16, (3, 1, 1)),
    (2, 6, 5, 4, 7, (1, 3, 3)),
    (4, 3, 3, 3, 5, (2, 3, 1)),
    (3, 4, 5, 32, 96, (3, 3, 3)),
]
ENLARGING = [(3, 5, 7, 6, 4), (1, 1, 1, 1, 1), (2, 1, 6, 8, 3), (1, 4, 1, 2, 5)]
SHAPES = [ConvolutionShape(*case) for case in CAUSAL]
SHAPES += [ConvolutionShape(*case, (1, 3, 3), enlarge=True) for case in ENLARGING]

CASES = [
    pytest.param(kind, shape, id=f"{kind.name} {shape}")
    for kind in KINDS
    for shape in SHAPES
    if kind.enlarges == shape.enlarge and not kind.obstacle(CPU, torch.bfloat16, shape)
]


def test_what_is_tested():
    tested = [(case.values[0].name, case.values[1].enlarge) for case in CASES]
    not_here = set() if EMULATED else {k for k in BY_NAME if is_kernel(BY_NAME[k])}
    assert set(tested) == set(BY_NAME) - not_here


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_numbers(kind: ConvolutionCandidate, shape: ConvolutionShape):
    for dtype in kind.dtypes:
        frames, weight = tensors = inputs(shape, dtype)
        before = [t.clone() for t in tensors]
        out = kind.prepare(weight)(frames)
        assert out.shape == shape.out_size and out.dtype == dtype and out.is_contiguous()
        assert relative_error(out, naive(*tensors, shape)) < BOUNDS[dtype]
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "inputs stay as they are"


@pytest.mark.parametrize(("kind", "shape"), [case for case in CASES if not is_kernel(case.values[0])])
def test_exact_in_float64(kind: ConvolutionCandidate, shape: ConvolutionShape):
    """The algebra without its roundings."""
    tensors = tuple(t.double() for t in inputs(shape, torch.float32))
    assert relative_error(kind.prepare(*tensors[1:])(tensors[0]), naive(*tensors, shape)) < 1e-14


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_any_layout_of_the_weight_and_a_part_of_a_buffer(kind: ConvolutionCandidate, shape: ConvolutionShape):
    frames, weight = inputs(shape, kind.dtypes[-1])
    expected = kind.prepare(weight)(frames)
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        assert torch.equal(kind.prepare(weight.contiguous(memory_format=layout))(frames), expected)
    turned = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert torch.equal(kind.prepare(turned)(frames), expected)
    buffer = torch.full((shape.frames + 4, *frames.shape[1:]), float("nan"), dtype=frames.dtype)
    part = buffer[3 : 3 + shape.frames]
    part.copy_(frames)
    assert torch.equal(kind.prepare(weight)(part), expected)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_one_preparation_serves_any_number_of_frames(kind: ConvolutionCandidate, shape: ConvolutionShape):
    frames, weight = inputs(shape, kind.dtypes[-1])
    prepared = kind.prepare(weight)
    begun = prepared(frames)
    more = prepared(torch.cat([frames, frames.flip(0)]))
    assert relative_error(more[: len(begun)], begun) < BOUNDS[frames.dtype]
    assert len(more) == len(begun) + shape.frames


def test_the_sums_of_phases_are_rounded_once():
    """With weights whose sums bfloat16 cannot tell from one another if each were rounded."""
    shape = ConvolutionShape(1, 1, 1, 1, 1, (1, 3, 3), enlarge=True)
    weight = torch.tensor([0, 0, 0, 0, 1.0, 2**-9, 0, 2**-9, 2**-9]).view(1, 1, 1, 3, 3).bfloat16()
    out = BY_NAME["phases", True].prepare(weight)(torch.ones(1, 1, 1, 1).bfloat16())
    exact = naive(torch.ones(1, 1, 1, 1), weight, shape)
    assert exact.flatten()[0] == 1 + 3 * 2**-9
    assert out.flatten()[0] == 1 + 2**-7, "and not 1, which is what is left if 2^-9 is added to 1 three times"


# -- what is known before anything is tried ----------------------------------------------------------------------

SHAPE, GROWING = SHAPES[0], SHAPES[-1]


@pytest.mark.skipif(not EMULATED, reason="this build has the kernels for the GPU instead")
def test_kernels_are_of_16_bits():
    assert BY_NAME["kernel", False].obstacle(CPU, torch.float32, SHAPE) == (
        "it computes in bfloat16 or float16, the model's dtype is float32; choose conv3d or three-products"
    )


@pytest.mark.parametrize("ops", [None, reference], ids=["none", "torch"])
def test_a_backend_without_kernels(ops):
    for kind in implementations(ops):
        if is_kernel(kind):
            obstacle = kind.obstacle(CPU, torch.bfloat16, GROWING if kind.enlarges else SHAPE)
            others = "enlarged or phases" if kind.enlarges else "conv3d or three-products"
            assert obstacle == (
                "it is an operation of the backends cuda and emulated, and this model's backend has none; "
                f"choose {others}"
            )
            assert kind.version() is None


@pytest.mark.skipif(not EMULATED, reason="this build has the kernels for the GPU instead")
def test_kernels_of_the_host_are_none_of_a_gpu():
    kernel = BY_NAME["kernel", False]
    assert kernel.version() == "emulated"
    assert kernel.obstacle(GPU, torch.bfloat16, SHAPE) == (
        "it runs on cpu, the device is cuda:0; choose conv3d or three-products"
    )


@pytest.mark.skipif(not EMULATED, reason="this build has the kernels for the GPU instead")
def test_kernels_look_at_one_pixel_or_nine():
    assert BY_NAME["kernel", False].obstacle(CPU, torch.bfloat16, SHAPES[5]) == (
        f"it takes kernels of 1x1 and 3x3 pixels, and this is {SHAPES[5]}; choose conv3d or three-products"
    )


@pytest.mark.skipif(not EMULATED, reason="this build has the kernels for the GPU instead")
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (SHAPES[3], "it takes kernels of 3x3 pixels"),
        (SHAPE, "it takes multiples of 32 channels and makes multiples of 96"),
    ],
)
def test_hoppers_kernel_is_cut_for_the_decoders_widths(shape, said):
    obstacle = BY_NAME["kernel-hopper", False].obstacle(CPU, torch.bfloat16, shape)
    assert obstacle == f"{said}, and this is {shape}; choose conv3d or three-products"


def test_hoppers_kernel_is_for_hopper(monkeypatch):
    (kind,) = (kind for kind in implementations(SimpleNamespace(name="cuda")) if kind.name == "kernel-hopper")
    there = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there)
    assert not kind.obstacle(GPU, torch.bfloat16, SHAPES[6])
    there = (10, 0)
    said = "it needs compute capability 9.0, this GPU has 10.0; choose conv3d or three-products"
    assert kind.obstacle(GPU, torch.bfloat16, SHAPES[6]) == said


def test_a_tiled_weight_is_the_weight():
    weight = torch.randn(192, 64, 2, 3, 3)
    tiles = tiled(weight)
    assert tiles.shape == (2, 2, 2, 9, 4, 96, 8) and tiles.is_contiguous()
    back = tiles.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    assert torch.equal(back, weight)


def test_phases_are_for_three_by_three():
    other = ConvolutionShape(1, 4, 4, 2, 2, (1, 5, 5), enlarge=True)
    phases = BY_NAME["phases", True]
    assert not phases.obstacle(CPU, torch.float32, GROWING)
    said = f"it takes kernels of 1x3x3, and this is {other}; choose enlarged"
    assert phases.obstacle(CPU, torch.float32, other) == said


def test_names():
    names = [kind.name for kind in KINDS]
    assert names[:2] == ["conv3d", "three-products"] and len(KINDS) == len(BY_NAME)


def test_a_shape_says_what_it_is():
    assert str(ConvolutionShape(14, 480, 832, 96, 3, (3, 3, 3))) == (
        "14 frames of 832x480, 96 to 3 channels, kernel 3x3x3"
    )
    assert str(GROWING).endswith("kernel 1x3x3 after enlarging")


# -- what is asked of torch --------------------------------------------------------------------------------------


class AskedOfTorch:
    """Stands in for torch's convolution, records how it was asked."""

    def __init__(self, real) -> None:
        self.real = real
        self.calls: list[dict[str, object]] = []

    def default(self, *arguments):
        names = ("benchmark", "deterministic", "cudnn_enabled", "allow_tf32")
        self.calls.append(dict(zip(names, arguments[-4:], strict=True)))
        return self.real.default(*arguments)


@pytest.fixture
def asked(monkeypatch) -> AskedOfTorch:
    stand_in = AskedOfTorch(torch.ops.aten._convolution)
    monkeypatch.setattr(torch.ops.aten, "_convolution", stand_in)
    return stand_in


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_kernel(kind)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_switches_of_the_process_do_not_count(asked, kind, dtype, enabled, monkeypatch):
    settings = {"benchmark": True, "deterministic": False, "allow_tf32": True, "enabled": enabled}
    for name, value in settings.items():
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    shape = GROWING if kind.enlarges else SHAPE
    frames, weight = inputs(shape, dtype)
    kind.prepare(weight)(frames)
    for call in asked.calls:
        assert call["deterministic"] is True and call["benchmark"] is False
        assert call["cudnn_enabled"] is enabled, "which alone remains its user's"
        if dtype is torch.float32:
            assert call["allow_tf32"] is False, "or float32 is not float32"
    assert asked.calls


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_kernel(kind)], ids=lambda kind: kind.name)
def test_no_layout_changes_hands(kind):
    """On tensors without data, as a GPU's would be laid out: what comes out is the library's own output."""
    shape = ConvolutionShape(4, 6, 8, 16, 32, (1, 3, 3) if kind.enlarges else (3, 3, 3), enlarge=kind.enlarges)
    frames, weight = (t.to("meta") for t in inputs(shape, torch.bfloat16))
    out = kind.prepare(weight)(frames)
    assert (out.shape, out.dtype, out.is_contiguous()) == (shape.out_size, torch.bfloat16, True)
