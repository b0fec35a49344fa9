"""How a stream's pictures are made is the user's choice: in bands of rows, by other ways to compute convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from streaming import load, require, video

import echo_rt
from echo_rt.cli.main import main
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.vae_layers import CausalConv, FrameAttention, UpsampleConv

FEW_STEPS = {"denoising_steps": (1000, 500)}


def frames(folder: Path, **options: object) -> torch.Tensor:
    with load(folder, width=32, height=96, memory="off", overrides=FEW_STEPS, **options) as runtime:
        chunks = video(runtime, 3, seed=3)
    return torch.cat([chunk.frames for chunk in chunks])


def test_tiles_do_not_show(small_model: Path) -> None:
    whole, tiled = frames(small_model), frames(small_model, vae_tiles=4)
    # Sums in another order: a value that lies between two bytes may fall to either.
    difference = (whole.int() - tiled.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-3


def test_tiles_take_less_memory(small_model: Path) -> None:
    def scratch(tiles: int) -> int:
        with load(small_model, width=32, height=96, memory="off", vae_tiles=tiles) as runtime:
            return sum(tensor.nbytes for tensor in runtime._engine.pipeline.decoder_state.buffers().values())

    assert scratch(4) < scratch(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vae_tiles": 0}, "vae_tiles must be an integer of 1 or more, got 0"),
        ({"vae_tiles": True}, "vae_tiles must be an integer of 1 or more, got True"),
        ({"vae_tiles": 3}, "vae_tiles: expected 1 for latents 4 rows high, got 3"),
        ({"vae_tiles": 2, "vae": "tiny"}, "vae_tiles must be 1 for a tiny decoder"),
    ],
    ids=str,
)
def test_tiles_that_cannot_be(small_model: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(small_model, **options)


def test_convolutions_can_be_chosen(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = frames(small_model)
    used: set[str] = set()
    for layer in (CausalConv, UpsampleConv):
        original = layer.use
        monkeypatch.setattr(layer, "use", lambda conv, kind, use=original: (used.add(kind.name), use(conv, kind)))
    with load(small_model, convolution="three-products,phases") as runtime:
        chosen = {(choice.name, shape.enlarge, choice.reason) for shape, choice in runtime.convolutions.items()}
    assert chosen == {("three-products", False, "asked for by name"), ("phases", True, "asked for by name")}
    assert used == {"three-products", "phases"}, "and not only said"
    with load(small_model) as runtime:
        chosen = {(choice.name, shape.enlarge, choice.reason) for shape, choice in runtime.convolutions.items()}
    assert chosen == {("three-products", False, "torch's own on a CPU"), ("enlarged", True, "torch's own on a CPU")}
    with load(small_model, vae_dtype="bfloat16") as runtime:
        kinds = {choice.name for choice in runtime.convolutions.values()}
    assert kinds == {"conv3d", "enlarged"}, "what is quick is so in the dtype that is decoded in"
    difference = (frames(small_model, convolution="conv3d,phases").int() - expected.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-3


def test_an_attention_that_is_asked_for_is_the_decoders_too(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(small_model) as runtime:
        assert runtime.vae_attention is not None
        assert (runtime.vae_attention.name, runtime.vae_attention.by_name) == ("sdpa", False)
    used: list[str] = []
    original = FrameAttention.__call__
    monkeypatch.setattr(
        FrameAttention, "__call__", lambda layer, terms: (used.append(layer.compute.name), original(layer, terms))[1]
    )
    difference = (frames(small_model, attention="products").int() - frames(small_model).int()).abs()
    assert list(dict.fromkeys(used)) == ["products", "sdpa"], "and not only said"
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-3


@pytest.mark.cuda
def test_a_library_that_the_decoder_cannot_have_is_the_transformers(small_model: Path) -> None:
    options = {"device": require("cuda"), "dtype": "bfloat16", "vae_dtype": "float32"}
    with load(small_model, attention="sdpa-flash", **options) as runtime:
        assert runtime.attention.name == "sdpa-flash"
        assert runtime.vae_attention is not None and not runtime.vae_attention.by_name
        assert "; not sdpa-flash: it computes in bfloat16 or float16" in runtime.vae_attention.reason
        assert len(video(runtime, 2, seed=3)) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"convolution": "magic"}, BackendError, "convolution must be one of conv3d, .*; got 'magic'"),
        ({"convolution": ("phases",)}, ConfigError, r"convolution must be text, .* got \('phases',\)"),
        ({"convolution": "kernel"}, BackendError, "this model's backend has none; choose"),
        ({"convolution": "phases", "vae": "tiny"}, ConfigError, "convolution must be left out for a tiny decoder"),
    ],
    ids=str,
)
def test_convolutions_that_cannot_be(
    small_model: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(small_model, **options)


def test_tiles_on_the_command_line(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    original = echo_rt.Runtime.from_pretrained

    def watched(*args: object, **options: object) -> echo_rt.Runtime:
        asked.append(options["vae_tiles"])
        return original(*args, **options)

    monkeypatch.setattr(echo_rt.Runtime, "from_pretrained", watched)
    command = ["generate", "--model", str(small_model), "--device", "cpu", "--prompt", "a fox", "--frames", "9"]
    command += [
        "-o",
        str(tmp_path / "video.mp4"),
        "--size",
        "32x96",
        "--memory",
        "off",
        "--set",
        "denoising_steps=1000",
        "--quiet",
    ]
    assert main([*command, "--vae-tiles", "2"]) == 0
    assert asked == [2]
    assert main([*command, "--vae-tiles", "no"]) == 2
    assert "--vae-tiles: expected an integer of 1 or more, got 'no'" in capsys.readouterr().err
