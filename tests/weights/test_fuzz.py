"""Whatever a file says: it loads, or it is refused in one line, in time and memory that its size allows."""

from __future__ import annotations

import json
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import ANYTHING, as_json, changed, damaged, one_line
from hypothesis import given
from hypothesis import strategies as st
from random_weights import transformer, write_diffusers, write_original, write_shards
from safetensors.torch import save_file

from echo_rt.errors import EchoError, WeightsError
from echo_rt.weights.files import open_tensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.lora import ALPHA_FIELDS, merge_lora, parse_lora_key

VALUES = ANYTHING | st.sampled_from([2, 10**9, [1, 2, 2], "t2v", "gaussian", "LORA"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return write_original(base / "original"), write_diffusers(base / "diffusers")


CONFIGS = (
    (0, "config.json", "transformer"),
    (1, "transformer/config.json", "transformer"),
    (1, "vae/config.json", "vae"),
    (1, "text_encoder/config.json", "text_encoder"),
)


@given(data=st.data())
def test_configs(folders: tuple[Path, Path], data: st.DataObject) -> None:
    layout, name, part = data.draw(st.sampled_from(CONFIGS))
    path = folders[layout] / name
    whole = path.read_bytes()
    fields = json.loads(whole)
    changed = data.draw(st.dictionaries(st.sampled_from([*fields, "echo_rt", "decoder_base_dim"]), VALUES))
    content = as_json(data.draw(st.one_of(st.just(fields | changed), VALUES)))
    if data.draw(st.integers(0, 3)) == 0 and content:
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + 1 :]
    try:
        path.write_bytes(content)
        for read in (f"{part}.config", f"{part}.tensors", "rollout_defaults"):
            try:
                attrgetter(read)(ModelFolder.open(folders[layout]))()
            except EchoError as error:
                one_line(error)
    finally:
        path.write_bytes(whole)


@given(data=st.data())
def test_indexes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("index")
    tensors = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}
    index = write_shards(folder, "model", tensors)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    names = st.sampled_from([*shards, "../x", "", ".", "x" * 300]) | st.text(max_size=5)
    weight_map = st.dictionaries(st.sampled_from([*tensors, "d"]) | st.text(max_size=5), names | VALUES, max_size=5)
    index.write_bytes(as_json(data.draw(VALUES | st.fixed_dictionaries({"weight_map": weight_map | VALUES}))))
    try:
        assert set(open_tensors(index)) <= set(tensors), "an index may leave shards out"
    except EchoError as error:
        one_line(error)


def test_a_shard_may_have_any_name(tmp_path: Path) -> None:
    (index := tmp_path / "model.safetensors.index.json").write_bytes(as_json({"weight_map": {"a": "\n"}}))
    with pytest.raises(WeightsError) as caught:
        open_tensors(index)
    one_line(caught.value)


PIECES = (
    *(
        "base_model.model.",
        "diffusion_model.",
        "lora_unet_",
        "_fsdp_wrapped_module.",
        "generator_lora.",
        "transformer.",
    ),
    *("blocks.0.", "blocks_0_", "blocks.99.", "self_attn.q", "self_attn_q", "attn1.to_q", "patch_embedding", "norm3"),
    *(".lora_A", ".lora_B", ".lora_down", ".lora.up", ".default", ".weight", ".bias", ".diff", ".diff_b", ".diff_m"),
    *(".alpha", ".dora_scale", ".lokr_w1", "query_memory_encoder.", ".", "_", *ALPHA_FIELDS),
)
LORA_NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join) | st.text(max_size=20)


@given(name=LORA_NAMES | st.text(max_size=256))
def test_names_of_lora_tensors(name: str) -> None:
    key = parse_lora_key(name)
    assert parse_lora_key(f"diffusion_model.{name}") == key, "what stands before a name says nothing"


SHAPES = st.sampled_from([(2, 24), (24, 2), (24, 24), (24,), (1,), (), (0, 24), (4, 40), (24, 16, 1, 2, 2)])


@given(data=st.data())
def test_loras(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("lora")
    path = folder / data.draw(st.sampled_from(["adapter_model.safetensors", "lora.pt"]))
    shapes = data.draw(st.dictionaries(LORA_NAMES, SHAPES, min_size=1, max_size=4))
    if data.draw(st.booleans()):
        module = "blocks.0.self_attn.q"
        shapes |= {f"{module}.lora_A.weight": (2, 24), f"{module}.lora_B.weight": (24, 2)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    facts = data.draw(st.dictionaries(st.sampled_from([*ALPHA_FIELDS, "lora_adapter_metadata"]), VALUES, max_size=2))
    if path.suffix == ".pt":
        torch.save(tensors | facts, path)
    else:
        save_file(tensors, path, {name: json.dumps(fact) for name, fact in facts.items()})
    fields = ("peft_type", "use_dora", "use_rslora", "init_lora_weights", "lora_alpha", "r", "alpha_pattern")
    patterns = st.dictionaries(st.text("a.*+?()[]|q\\d{}1,", max_size=12), st.integers(1, 4) | VALUES, max_size=3)
    config = st.dictionaries(st.sampled_from(fields), VALUES | st.integers(1, 16) | patterns, max_size=4)
    if data.draw(st.booleans()):
        (folder / "adapter_config.json").write_bytes(as_json(data.draw(config | VALUES)))
    try:
        merged = merge_lora(transformer(), path).transformer
        assert all(merged[name].shape == tensor.shape for name, tensor in transformer().items())
    except EchoError as error:
        one_line(error)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any strides over a few values, which torch writes as it is."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.complex64]))
    values = torch.zeros(draw(st.integers(1, 40)), dtype=dtype)
    dims = draw(st.integers(0, 3))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 10**6]), min_size=dims, max_size=dims))
    stride = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7]), min_size=dims, max_size=dims))
    offset = draw(st.integers(0, 3))
    reach = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and reach > len(values):
        shape = [min(size, 2) if step else size for size, step in zip(shape, stride, strict=True)]
        reach = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        values = torch.zeros(max(reach, 1), dtype=dtype)
    return values.as_strided(shape, stride, min(offset, len(values) - 1) if 0 in shape else offset)


CONTENT: st.SearchStrategy[Any] = st.dictionaries(
    st.text(max_size=8)
    | st.sampled_from(["m.weight", "m.comfy_quant", "m.scale_weight", "scaled_fp8"])
    | st.integers(),
    st.recursive(
        views() | st.integers(-(2**600), 2**600) | st.text(max_size=5) | st.none() | st.floats(),
        lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=4) | st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=6,
)


def read_all(path: Path) -> None:
    """Open a file and read what is in it, or see it refused."""
    try:
        opened = open_tensors(path)
        assert sum(opened[name].numel() for name in opened) <= 8 * path.stat().st_size
    except EchoError as error:
        one_line(error)


@given(content=CONTENT, zipped=st.booleans())
def test_tensors_of_pickles(tmp_path_factory: pytest.TempPathFactory, content: Any, zipped: bool) -> None:
    path = tmp_path_factory.mktemp("pickle") / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read_all(path)


# ---- files of each format, byte by byte


@pytest.fixture(scope="module")
def of_each_format(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("formats")
    tensors = {"a.weight": torch.ones(4, 32), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", {"x": "y"})
    torch.save(tensors, folder / "zip.pt")
    torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    writer = gguf.GGUFWriter(folder / "model.gguf", "wan")
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("a.weight", tensors["a.weight"].numpy())
    quantized = gguf.quants.quantize(tensors["a.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in folder.iterdir():
        assert open_tensors(file), file
    return {file.name: file.read_bytes() for file in folder.iterdir()}


FORMATS = ("model.safetensors", "zip.pt", "legacy.pt", "model.gguf")


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_bytes(
    tmp_path_factory: pytest.TempPathFactory, of_each_format: dict[str, bytes], name: str, data: Any
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data.draw(damaged(of_each_format[name]) | st.binary(max_size=100)))
    read_all(path)


FLOAT8 = {"a.weight": torch.ones(4, 6, dtype=torch.float8_e4m3fn), "b.weight": torch.ones(3, dtype=torch.float8_e5m2)}
NAMES = st.builds(
    str.__add__,
    st.sampled_from(["a", "b", "c", "a.b", ""]),
    st.sampled_from([".weight", ".scale_weight", ".weight_scale", ".comfy_quant", ".input_scale", "scaled_fp8", "."]),
)
MARKS = (
    changed({"format": "float8_e4m3fn"}).map(as_json) | st.just(b'{"format": "float8_e4m3fn"}') | st.binary(max_size=9)
)
SCALES = (views().map(lambda view: view.contiguous() if view.numel() < 1000 else torch.ones(4))) | MARKS.map(
    lambda text: torch.tensor(list(text), dtype=torch.uint8)
)


@given(beside=st.dictionaries(NAMES, SCALES, max_size=4))
def test_float8_scales(tmp_path_factory: pytest.TempPathFactory, beside: dict[str, torch.Tensor]) -> None:
    path = tmp_path_factory.mktemp("float8") / "model.safetensors"
    save_file(FLOAT8 | {name: tensor.clone() for name, tensor in beside.items()}, path)
    read_all(path)
