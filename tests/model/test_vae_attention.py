"""The decoder's attention among the pixels of a frame: by any kind the same video, and only by the kind it is given."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from naive_vae import random_weights, tiny_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from echo_rt.attention import Attention, AttentionShapes, untried_attention
from echo_rt.attention.backends import IMPLEMENTATIONS, Matmul
from echo_rt.engine.build import fit_decoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.ops.backends import load_ops
from echo_rt.snapshot.fit import VAE_ATTENTION
from echo_rt.weights.shapes import vae_decoder_shapes, vae_encoder_shapes

CONFIG = tiny_config(dim_mult=(1, 1, 3), temporal_downsample=(True, False), num_res_blocks=1)
WEIGHTS = random_weights(vae_decoder_shapes(CONFIG))
# Scores far from one another: where all are alike, the average of all pixels would do.
WEIGHTS["decoder.middle.1.to_qkv.weight"] = 3 * WEIGHTS["decoder.middle.1.to_qkv.weight"]
LATENTS, SIZE = 3, (7, 5)
ON_CPU = {kind.name: kind for kind in IMPLEMENTATIONS if "cpu" in kind.devices}


def decoder(dtype: torch.dtype = torch.float32, attention: Attention | None = None) -> VaeDecoder:
    made = VaeDecoder(CONFIG, WEIGHTS, load_ops("torch"), device="cpu", dtype=dtype)
    if attention is not None:
        made.attention.compute = attention
    return made


def decode(model: VaeDecoder, *groups: int) -> Tensor:
    state = model.new_state(*SIZE, LATENTS)
    latents = torch.randn(2 * LATENTS, CONFIG.z_dim, *SIZE, generator=torch.Generator().manual_seed(6))
    return torch.cat([model.decode(part, state) for part in latents.split(list(groups or (LATENTS, LATENTS)))])


class Recorded:
    """Products; notes the shapes of what it is given."""

    name = "recorded"

    def __init__(self) -> None:
        self.calls: list[AttentionShapes] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert k.shape == v.shape
        self.calls.append(AttentionShapes(q.shape[0], k.shape[0], q.shape[1], q.shape[2]))
        return Matmul()(q, k, v)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_video_is_the_same(name: str) -> None:
    expected = decode(decoder())
    attention = ON_CPU[name].load()
    assert relative_error(decode(decoder(attention=attention)), expected) < 1e-5
    assert relative_error(decode(decoder(torch.bfloat16, attention)), expected) < 2e-2
    averaged = decode(decoder(attention=Averaged()))
    assert relative_error(averaged, expected) > 1e-2, "these weights would not show another attention"


class Averaged:
    """Every pixel is given the average of all."""

    name = "averaged"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.mean(0).expand(len(q), -1, -1).flatten(-2)


def test_the_shapes_are_those_of_its_calls() -> None:
    attention = Recorded()
    model = decoder(attention=attention)
    decode(model, 1, 2, 3)
    shapes = model.attention.shapes(*SIZE)
    assert attention.calls == [shapes] * 2 * LATENTS, "a frame at a time, however many are decoded"
    channels = WEIGHTS["decoder.middle.1.proj.weight"].shape[0]
    assert shapes == AttentionShapes(queries=35, keys=35, heads=1, head_dim=channels)


def test_torchs_switches_change_nothing() -> None:
    """They are of the whole process: another runtime, or the program around it, may turn them."""
    model = decoder(attention=Matmul())
    encoder = VaeEncoder(CONFIG, random_weights(vae_encoder_shapes(CONFIG)), device="cpu")
    encoder._middle.attention.compute = Matmul()
    frames = torch.rand(5, 3, 56, 40, generator=torch.Generator().manual_seed(2))
    expected, latents = decode(model), encoder.encode(frames)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(decode(model), expected) and torch.equal(encoder.encode(frames), latents)
        assert not torch.equal(decode(decoder()), expected), "torch's own would show it"


def test_where_nobody_has_chosen() -> None:
    assert untried_attention(torch.device("cpu")).name == "sdpa"
    assert untried_attention(torch.device("cuda", 0)).name == "products"
    assert decoder().attention.compute.name == "sdpa"


@pytest.mark.parametrize(
    ("asked", "prescribed", "name", "reason"),
    [
        (None, {}, "sdpa", "torch's own on a CPU"),
        ("products", {}, "products", "asked for by name"),
        (None, {VAE_ATTENTION: "products"}, "products", "as in the snapshot"),
        ("sdpa-math", {VAE_ATTENTION: "products"}, "sdpa-math", "asked for by name"),
        ("sdpa-flash", {}, "sdpa", "torch's own on a CPU; not sdpa-flash: it runs on cuda, the device is cpu"),
        ("sdpa-flash", {VAE_ATTENTION: "products"}, "products", "as in the snapshot; not sdpa-flash: it runs on cuda"),
    ],
)
def test_what_a_decoder_is_given(asked: str | None, prescribed: dict[str, str], name: str, reason: str) -> None:
    model = decoder()
    choice, _ = fit_decoder(model, (LATENTS, *SIZE), load_ops("torch"), attention_name=asked, prescribed=prescribed)
    assert choice.name == name and choice.reason.startswith(reason)
    assert choice.by_name == (asked == name) and model.attention.compute is choice.implementation


@pytest.mark.cuda
def test_a_gpu_is_tried_on_the_frames_of_the_decoder() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    expected = decode(decoder())
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        model = VaeDecoder(CONFIG, WEIGHTS, load_ops("torch"), device=device, dtype=dtype)
        choice, _ = fit_decoder(model, (LATENTS, *SIZE), load_ops("torch"))
        assert "products" in choice.timings and "sdpa-math" in choice.rejected
        for attention in (choice.implementation, Matmul()):
            model.attention.compute = attention
            assert relative_error(decode(model).cpu(), expected) < bound
