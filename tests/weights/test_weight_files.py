"""Opening weight files: what is read, that it is mapped, and that anything else is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from damage import refusals
from random_weights import assert_same, random_tensors, write_json, write_shards
from safetensors.torch import save_file

from echo_rt.errors import WeightsError
from echo_rt.weights.files import check_tensors, open_tensors

TENSORS = random_tensors({"a.weight": (3, 4), "a.bias": (4,), "b.0": (2, 1, 5), "c": ()}, dtype=torch.bfloat16)


def refusal(path: Path) -> str:
    """The message with which a file is refused; it is one line and names the file's folder at least."""
    with pytest.raises(WeightsError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert str(path.parent) in message
    return message


def test_single_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    for path in (tmp_path / "model.safetensors", tmp_path / "model", tmp_path, str(tmp_path)):
        opened = open_tensors(path)
        assert_same(opened, TENSORS)
        assert opened.path == tmp_path / "model.safetensors"
        assert len(opened) == len(TENSORS) and "nothing" not in opened
        assert opened.facts == {"format": "pt"}


def test_sharded_safetensors(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", TENSORS)
    for path in (index, tmp_path / "model", tmp_path):
        opened = open_tensors(path)
        assert_same(opened, TENSORS)
        assert opened.path == index


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    content = {"deep": {"er": TENSORS, "step": 7}, "w": torch.ones(2), "alpha": 0.5, "betas": [0.9, 0.99], 3: None}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    opened = open_tensors(path)
    assert_same(opened, {f"deep.er.{k}": v for k, v in TENSORS.items()} | {"w": torch.ones(2)})
    assert opened.facts == {"deep.step": 7, "alpha": 0.5}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_tensors_are_views_of_the_mapped_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tensors = {"x": torch.arange(5000.0), "y": torch.arange(3000.0)}
    save_file(tensors, path) if name.endswith(".safetensors") else torch.save(tensors, path)
    opened = open_tensors(path)
    for tensor in opened.values():
        address = tensor.data_ptr()
        (line,) = (
            line
            for line in Path("/proc/self/maps").read_text().splitlines()
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        )
        assert line.endswith(str(path))
    # A private mapping: what is written to a tensor never reaches the file.
    opened["x"].fill_(-1)
    assert torch.equal(open_tensors(path)["x"], tensors["x"])


def test_missing_file(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt", "model.safetensors.index.json"):
        assert "found none" in refusal(tmp_path / name)
    assert "model.safetensors or model.safetensors.index.json, found neither" in refusal(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.pth", "model.safetensors.index.json"])
def test_not_a_weight_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    assert "found a folder" in refusal(path)
    path.rmdir()
    os.mkfifo(path)
    assert "found a pipe or a device" in refusal(path)
    path.unlink()
    path.write_bytes(b"")
    assert "found an empty file" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "git-lfs pointer" in refusal(path)
    for content in (b"<!DOCTYPE html><html>", b"\0" * 4096, b"PK\x03\x04", b"{", random.Random(1).randbytes(3000)):
        path.write_bytes(content)
        assert "expected" in refusal(path)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert "Not a directory" in refusal(tmp_path / "file" / "model.pt")
    assert "File name too long" in refusal(tmp_path / ("x" * 300 + ".pt"))
    assert "found neither" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin", ".gguf", ".other", ""])
def test_content_decides_and_not_the_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(TENSORS, path)
    assert_same(open_tensors(path), TENSORS)
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert_same(open_tensors(path), TENSORS)
    # A header of 640 bytes begins as a pickle does; the name fills it up.
    save_file(TENSORS, path, {"note": "x" * 365})
    assert_same(open_tensors(path), TENSORS)


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "content")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.onnx", b"\x08\x07", "an ONNX graph"),
        ("model.engine", b"ftrt", "a TensorRT engine"),
        ("flax_model.msgpack", b"\xde\x00", "Flax weights: convert it"),
        ("model.h5", b"\x89HDF\r\n", "a Keras or HDF5 file: convert it"),
        ("x.npy", b"\x93NUMPY\1", "a NumPy array: save all tensors with"),
        ("x.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("x.pt", b"\n<html lang='en'>", "a web page"),
        ("x.json", b'{"a": 1}', "a JSON file"),
        ("x.tar.gz", b"\x1f\x8b\x08", "a gzip archive: unpack it"),
        ("x.tar", b"a" + bytes(256) + b"ustar\x00", "a tar archive: unpack it"),
        ("x.txt", b"weights", "another format"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert f"found {said}" in message and "damaged" not in message


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (("notes.txt",), "a zip archive of other files: unpack it"),
        (("a.npy",), "NumPy arrays"),
        (("m/constants.pkl", "m/data.pkl"), "a TorchScript program: save its state_dict()"),
    ],
)
def test_other_zip_archives_are_named(tmp_path: Path, entries: tuple[str, ...], said: str) -> None:
    archive(tmp_path / "model.pt", *entries)
    assert f"expected a torch file of tensors, found {said}" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (".metadata", "a distributed checkpoint: convert it with python -m torch.distributed.checkpoint.format_utils"),
        ("zero_to_fp32.py", "a DeepSpeed checkpoint"),
        ("model_index.json", "a diffusers folder"),
    ],
)
def test_other_folders_are_named(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_text("x")
    assert f"found {said}" in refusal(tmp_path)


def test_variants_of_a_stem(tmp_path: Path) -> None:
    """diffusers' names of copies in another precision, and transformers' old one; the plain file goes first."""
    for name in ("pytorch_model.bin", "model.bin"):
        torch.save(TENSORS, tmp_path / name)
        assert open_tensors(tmp_path / "model").path.name == name
    index = write_shards(tmp_path, "model", TENSORS)
    variant = index.rename(tmp_path / "model.safetensors.index.fp16.json")
    assert_same(open_tensors(tmp_path / "model"), TENSORS)
    assert open_tensors(tmp_path / "model").path == variant
    save_file(TENSORS, tmp_path / "model.fp16.safetensors")
    assert "expected one variant, found 2: model.fp16.safetensors, model." in refusal(tmp_path / "model")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path / "model").path.name == "model.safetensors"


def test_folders_without_one_answer(tmp_path: Path) -> None:
    assert "found neither" in refusal(tmp_path)
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    assert "found 2: a.safetensors, b.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "a list"),
        (torch.ones(3), "a Tensor"),
        (7, "an int"),
        ({}, "found a file without any"),
        ({"step": 3, "config": {"dim": 4}}, "found a file without any"),
    ],
)
def test_torch_file_of_something_else(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert said in refusal(tmp_path / "model.pt")


def test_names_that_collide(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, tmp_path / "model.pt")
    assert "expected a.b once" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x" * 300])
def test_names_that_no_message_could_repeat(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.ones(1)}, tmp_path / "model.pt")
    assert "expected names of tensors, found '" in refusal(tmp_path / "model.pt")
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    assert "expected names of tensors, found '" in refusal(tmp_path / "model.safetensors")


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    torch.save({(1, torch.ones(50)): torch.ones(1), 3: {"a": torch.ones(1)}}, tmp_path / "model.pt")
    assert set(open_tensors(tmp_path / "model.pt")) == {"<tuple>", "3.a"}


def test_weights_in_training_are_plain_numbers(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "model.pt")
    assert not open_tensors(tmp_path / "model.pt")["a"].requires_grad


def test_dict_inside_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"a": torch.ones(1)}
    content["self"] = content
    torch.save(content, tmp_path / "model.pt")
    assert "nested without end" in refusal(tmp_path / "model.pt")


class _WritesAFile:
    """Unpickled by anything that runs pickled code, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_pickled_code_is_refused_and_never_runs(tmp_path: Path, container: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    content = {"a": torch.ones(2), "b": _WritesAFile(trap)}
    if container == "plain":
        path.write_bytes(pickle.dumps({"b": _WritesAFile(trap)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    # A plain pickle is not even taken for a torch file.
    assert ("expected a torch file" if container == "plain" else "mkdir, which is code and is not run") in refusal(path)
    assert not trap.exists()
    # The trap works: this is what opening the file otherwise would have done.
    if container == "plain":
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_torchscript_is_refused_quietly(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert "expected a torch file" in refusal(path)
    assert not shown


def lengths_of(size: int) -> list[int]:
    """Where to cut a file: everywhere near both ends, and at many places between."""
    return sorted({*range(1, 40), *range(40, size - 40, max(1, size // 60)), *range(size - 40, size)})


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_at_any_length(tmp_path: Path, kind: str) -> None:
    whole = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pth")
    if kind == "safetensors":
        save_file(TENSORS, whole)
    else:
        torch.save(TENSORS, whole, _use_new_zipfile_serialization=kind == "zip")
    assert_same(open_tensors(whole), TENSORS)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    for length in lengths_of(len(content)):
        cut.write_bytes(content[:length])
        assert "expected" in refusal(cut), length


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    """Damage inside a tensor cannot be seen; damage anywhere else must not end in another error."""
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"generator": TENSORS, "step": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    assert refusals(path, 300) > 30


def test_truncated_golden_weights(tmp_path: Path, golden_dir: Path) -> None:
    content = (golden_dir / "vae" / "weights.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (7, 8, 9, 1000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        assert "expected a safetensors file" in refusal(cut)
    cut.write_bytes(content + b"\0")
    assert "expected a safetensors file" in refusal(cut)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", TENSORS)
    whole = json.loads(index.read_text())
    first, second, *_ = sorted(set(whole["weight_map"].values()))

    for broken in ([], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"metadata": {}}, 5):
        write_json(index, broken)
        assert "weight_map" in refusal(index)
    index.write_text("{")
    assert "found no JSON" in refusal(index)

    write_json(index, {"weight_map": whole["weight_map"] | {"a.weight": f"../{first}"}})
    assert f"expected shards beside the index, found '../{first}'" in refusal(index)
    write_json(index, {"weight_map": whole["weight_map"] | {"extra": first}})
    assert f"expected extra in {first}, which lacks it" in refusal(index)
    write_json(index, {"weight_map": {k: v for k, v in whole["weight_map"].items() if k != "c"}})
    assert "found also c" in refusal(index)

    write_json(index, whole)
    (tmp_path / second).unlink()
    assert f"expected the shard {second!r}" in refusal(index)
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes()[:100])
    assert f"{second}: expected a safetensors file" in refusal(index)


def test_check_tensors_passes_what_fits() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_tensors(TENSORS, shapes, "here")


def test_check_tensors_lists_everything_in_one_message() -> None:
    shapes = {f"w{i}": (2, 3) for i in range(12)}
    found = {f"w{i}": torch.zeros(2, 3) for i in range(4, 12)}
    found |= {f"x{i}": torch.zeros(1) for i in range(7)}
    found["w4"] = torch.zeros(3, 2)
    found["w5"] = torch.zeros(2, 3, dtype=torch.float8_e4m3fn)
    found["w6"] = torch.zeros(2, 3, dtype=torch.int32)
    found["w7"] = torch.zeros(2, 3).to_sparse()
    with pytest.raises(WeightsError) as caught:
        check_tensors(found, shapes, "model.pt")
    assert str(caught.value) == (
        "model.pt: expected 12 tensors, found 15: 4 missing (w0, w1, w2, w3); "
        "7 surplus (x0, x1, x2, x3, x4 and 2 more); 1 misshapen (w4 is [3, 2] for [2, 3]); "
        "3 not dense 16- to 64-bit floats (w5 is float8_e4m3fn, w6 is int32, w7 is float32)"
    )
