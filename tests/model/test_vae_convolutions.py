"""The decoder with each kind of convolution: the same video, and the shapes that it says are those that it computes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import FunctionType, ModuleType

import pytest
import torch
from closeness import relative_error
from naive_vae import random_weights, tiny_config
from torch import Tensor

from echo_rt.convolution import ConvolutionCandidate, implementations
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

CONFIG = tiny_config(dim_mult=(1, 1, 2), temporal_downsample=(True, False), num_res_blocks=1)
WEIGHTS = random_weights(vae_decoder_shapes(CONFIG))
BY_NAME = {(kind.name, kind.enlarges): kind for kind in implementations()}
LATENTS = 3
SIZE = (14, 5)  # of latents


def decoder(tiles: int = 1, dtype: torch.dtype = torch.float32) -> VaeDecoder:
    return VaeDecoder(CONFIG, WEIGHTS, load_ops("torch"), device="cpu", dtype=dtype, tiles=tiles)


def latents() -> Tensor:
    return torch.randn(2 * LATENTS, CONFIG.z_dim, *SIZE, generator=torch.Generator().manual_seed(6))


def decode(model: VaeDecoder, groups: tuple[int, ...] = (LATENTS, LATENTS)) -> Tensor:
    state = model.new_state(*SIZE, LATENTS)
    return torch.cat([model.decode(part, state) for part in latents().split(list(groups))])


def use(model: VaeDecoder, causal: ConvolutionCandidate, upsample: ConvolutionCandidate) -> VaeDecoder:
    shapes = model.convolution_shapes(*SIZE, LATENTS)
    model.use({name: upsample if shape.enlarge else causal for name, shape in shapes.items()})
    return model


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("causal", "upsample"), [("conv3d", "enlarged"), ("three-products", "enlarged"), ("conv3d", "phases")]
)
def test_the_video_is_the_same(causal: str, upsample: str, tiles: int) -> None:
    expected = decode(decoder())
    video = decode(use(decoder(tiles), BY_NAME[causal, False], BY_NAME[upsample, True]))
    assert relative_error(video, expected) < 1e-5
    if (causal, upsample) != ("conv3d", "enlarged"):
        assert not torch.equal(video, expected), "sums in another order are rounded otherwise"
    elif tiles == 1:
        assert torch.equal(video, expected), "this is the way that nobody chose"


@pytest.mark.parametrize(("causal", "upsample"), [("three-products", "phases"), ("kernel", "kernel")])
def test_in_bfloat16(causal: str, upsample: str) -> None:
    if causal == "kernel" and available_backends()["emulated"] != "available":
        pytest.skip("this build has the kernels for the GPU instead")
    by_name = {
        (kind.name, kind.enlarges): kind
        for kind in implementations(load_ops("emulated" if causal == "kernel" else "torch"))
    }
    expected = decode(decoder())
    video = decode(use(decoder(dtype=torch.bfloat16), by_name[causal, False], by_name[upsample, True]))
    assert relative_error(video, expected) < 1.5e-2


def held(something: object, seen: set[int] | None = None) -> dict[int, int]:
    """Bytes of the storages of all tensors that it leads to, by address: its attributes, what functions enclose."""
    seen = set() if seen is None else seen
    if id(something) in seen:
        return {}
    seen.add(id(something))
    if isinstance(something, Tensor):
        storage = something.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    inside: list[object] = []
    if isinstance(something, dict):
        inside += something.values()
    elif isinstance(something, (list, tuple)):
        inside += something
    elif isinstance(something, FunctionType):
        inside += [cell.cell_contents for cell in something.__closure__ or ()]
    elif hasattr(something, "__dict__") and not isinstance(something, (type, ModuleType)):
        inside += vars(something).values()
    found: dict[int, int] = {}
    for part in inside:
        found |= held(part, seen)
    return found


@pytest.mark.parametrize("causal", ["conv3d", "three-products", "kernel"])
@pytest.mark.parametrize("upsample", ["enlarged", "phases", "kernel"])
def test_only_what_is_computed_with_is_kept(causal: str, upsample: str) -> None:
    by_name = BY_NAME
    if "kernel" in (causal, upsample):
        if available_backends()["emulated"] != "available":
            pytest.skip("this build has the kernels for the GPU instead")
        by_name = {(kind.name, kind.enlarges): kind for kind in implementations(load_ops("emulated"))}
    model = decoder()
    before = sum(held(model).values())
    use(model, by_name[causal, False], by_name[upsample, True])
    tap = sum(
        WEIGHTS[f"{name}.weight"][..., 0, 0].numel() * model.dtype.itemsize
        for name, shape in model.convolution_shapes(*SIZE, LATENTS).items()
        if shape.enlarge
    )
    more = 0 if upsample == "enlarged" else 4 * 4 - 9  # four phases of 2x2 taps in place of 3x3
    assert tap > 0 and sum(held(model).values()) == before + more * tap


class Recorded:
    """A kind that computes as another one and keeps the sizes of the frames that it is given, by its weight."""

    def __init__(self, kind: ConvolutionCandidate) -> None:
        self.seen: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        self.kind = dataclasses.replace(kind, prepare=self._prepare)
        self._real = kind

    def _prepare(self, weight: Tensor):
        prepared = self._real.prepare(weight)

        def call(frames: Tensor) -> Tensor:
            self.seen[weight.data_ptr()].append((*frames.shape, len(weight), *weight.shape[2:]))
            return prepared(frames)

        return call


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_the_shapes_are_those_of_the_steady_state(tiles: int) -> None:
    model = decoder(tiles)
    shapes = model.convolution_shapes(*SIZE, LATENTS)
    recorded = {
        name: Recorded(BY_NAME["enlarged" if shape.enlarge else "conv3d", shape.enlarge])
        for name, shape in shapes.items()
    }
    model.use({name: each.kind for name, each in recorded.items()})
    state = model.new_state(*SIZE, LATENTS)
    first, second = latents().split(LATENTS)
    model.decode(first, state)
    for each in recorded.values():
        each.seen.clear()
    model.decode(second, state)
    assert {name for name in vae_decoder_shapes(CONFIG) if name.endswith("weight")} >= {f"{n}.weight" for n in shapes}
    for name, shape in shapes.items():
        (calls,) = recorded[name].seen.values()
        sizes = (shape.frames, shape.height, shape.width, shape.channels, shape.out_channels, *shape.kernel)
        assert sizes in calls, name
        assert all(call[0] <= shape.frames and call[1] <= shape.height for call in calls), name
        if tiles == 1:
            assert set(calls) == {sizes}, name


def test_every_convolution_over_pictures_has_a_shape() -> None:
    shapes = decoder().convolution_shapes(*SIZE, LATENTS)
    over_pictures = {
        name.removesuffix(".weight")
        for name, size in vae_decoder_shapes(CONFIG).items()
        if name.endswith("weight") and len(size) >= 4 and max(size[2:]) > 1
    }
    assert set(shapes) == over_pictures
    assert sum(shape.enlarge for shape in shapes.values()) == 2
