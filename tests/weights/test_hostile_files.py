"""Small files that ask for large work, and machines that are out of memory or descriptors: one line, at once."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import original_config, transformer, write_json, write_original, write_shards
from safetensors.torch import save_file

from echo_rt.errors import EchoError, ResourceError, WeightsError
from echo_rt.weights.files import open_safetensors, open_tensors
from echo_rt.weights.folder import ModelFolder


def refusal(read: Callable[[], Any], kind: type[EchoError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# ---------------------------------------------------------------- pickles


class _Zeros:
    """Unpickled, a thousand million zeros: what torch takes for plain data."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return bytearray, (10**9,)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_of_any_number(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2), "b": _Zeros()}, path, _use_new_zipfile_serialization=zipped)
    assert "makes bytes of any number" in refusal(lambda: open_tensors(path))


def test_dicts_that_hold_one_another_many_times(tmp_path: Path) -> None:
    """Ten names for each of nine dicts: a thousand million tensors in a kilobyte."""
    content: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(9):
        content = {str(name): content for name in range(10)}
    torch.save(content, tmp_path / "model.pt")
    assert "expected at most 65536 entries" in refusal(lambda: open_tensors(tmp_path / "model.pt"))


def test_long_names_of_dicts_in_dicts(tmp_path: Path) -> None:
    """A hundred kilobytes of keys before each of sixty thousand names would be six gigabytes of names."""
    content: dict[str, Any] = dict.fromkeys(map(str, range(60_000)), 1)
    for depth in range(100):
        content = {f"{depth}{'x' * 1000}": content}
    torch.save(content, tmp_path / "model.pt")
    assert "found dicts nested without end" in refusal(lambda: open_tensors(tmp_path / "model.pt"))


@pytest.mark.parametrize("name", ["a", "optimizer.state.0.exp_avg", "m.comfy_quant"])
def test_shapes_for_which_nothing_is_stored(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({"b": torch.ones(2), name: torch.ones(1, dtype=torch.uint8).expand(10**7, 10**6)}, path)
    told = refusal(lambda: open_tensors(path))
    assert f"found {name} [10000000, 1000000] of 1 bytes" in told


def test_one_storage_under_a_few_names_and_under_many(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.pt", torch.arange(100_000.0)
    torch.save({"tied": whole, "again": whole, "part": whole[10:20]}, path)
    assert set(open_tensors(path)) == {"tied", "again", "part"}
    torch.save({str(name): whole for name in range(50)}, path)
    assert "expected tensors as large as what is stored" in refusal(lambda: open_tensors(path))


def test_a_legacy_file_that_states_more_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(70_000)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(struct.pack("<cI", b"J", 70_000)) >= 1
    path.write_bytes(content.replace(struct.pack("<cI", b"J", 70_000), struct.pack("<cI", b"J", 2**31 - 1)))
    assert "expected a torch file of tensors, found a damaged" in refusal(lambda: open_tensors(path))


def test_a_compressed_torch_file_is_named(tmp_path: Path) -> None:
    """Unpacking it would take a thousand times its size."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert "a torch file that was compressed" in refusal(lambda: open_tensors(tmp_path / "model.pt"))


def test_a_number_past_every_float_as_alpha(tmp_path: Path) -> None:
    from echo_rt.weights.lora import merge_lora

    factors = {f"blocks.0.self_attn.q.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 24)), ("B", (24, 2)))}
    torch.save(factors | {"alpha": 10**400}, tmp_path / "lora.pt")
    told = refusal(lambda: merge_lora(transformer(), tmp_path / "lora.pt"))
    assert "expected alpha to be a number above 0" in told


def test_gguf_tensors_upon_one_another(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for name in "ab":
        writer.add_tensor(name, np.ones((16, 1000), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(open_tensors(path)) == 2
    content = path.read_bytes()
    at = content.rindex(struct.pack("<Q", 64000))  # where the second begins
    path.write_bytes(content[:at] + struct.pack("<Q", 0) + content[at + 8 : -64000])
    assert "its tensors lie upon one another" in refusal(lambda: open_tensors(path))


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"dim": NaN}',
        b'{"dim": 1e999}',
        b'{"dim": ' + b"9" * 5000 + b"}",
        b'{"dim": "\xff"}',
        b'{"dim": 24',
    ],
    ids=lambda content: content[:12].decode(errors="replace"),
)
def test_json_that_nobody_writes(tmp_path: Path, content: bytes) -> None:
    folder = write_original(tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    for read in (ModelFolder.open(folder).transformer.config, ModelFolder.open(folder).rollout_defaults):
        assert f"{folder / 'config.json'}: expected" in refusal(read)


def test_json_of_many_gigabytes(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "model")
    os.truncate(folder / "config.json", 2**33)
    assert "found a file of more than 67108864 bytes" in refusal(ModelFolder.open(folder).transformer.config)


def test_a_config_after_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "model")
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert ModelFolder.open(folder).transformer.config().dim == original_config()["dim"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", ".", "x" * 10**6], ids=lambda name: name[:3])
def test_names_of_shards_that_no_file_has(tmp_path: Path, name: str) -> None:
    index = write_shards(tmp_path, "model", {"a": torch.ones(1)}, 1)
    write_json(index, {"weight_map": {"a": name}})
    assert "expected" in refusal(lambda: open_tensors(index))


def test_special_files_in_place_of_any_file_of_a_folder(tmp_path: Path) -> None:
    """To open a pipe would be to wait for whoever fills it."""
    folder = write_original(tmp_path / "model")
    reads = {
        "config.json": "transformer.config",
        "diffusion_pytorch_model.safetensors": "transformer.tensors",
        "Wan2.1_VAE.pth": "vae.config",
        "models_t5_umt5-xxl-enc-bf16.pth": "text_encoder.config",
    }
    for name, read in reads.items():
        kept = (folder / name).rename(tmp_path / "kept")
        os.mkfifo(folder / name)
        assert "found a pipe or a device" in refusal(attrgetter(read)(ModelFolder.open(folder)))
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        assert "found a pipe or a device" in refusal(attrgetter(read)(ModelFolder.open(folder)))
        (folder / name).unlink()
        kept.rename(folder / name)


# ---------------------------------------------------------------- what the machine does not have


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    held: list[int] = []
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 20):
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        try:
            yield
        finally:
            for descriptor in held:
                os.close(descriptor)


def write(path: Path, size: int) -> Path:
    tensors = {"a": torch.zeros(size)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_descriptors_that_are_used_up_are_no_damage(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 10)
    with no_more_descriptors():
        told = refusal(lambda: open_tensors(path), ResourceError)
    assert told == f"{path}: expected memory and file descriptors to open it with, found: Too many open files"
    assert len(open_tensors(path)) == 1


def test_a_library_that_calls_a_file_missing_which_it_has_no_descriptor_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", 10)
    with no_more_descriptors():
        assert "Too many open files" in refusal(lambda: open_safetensors(path), ResourceError)


def test_descriptors_that_are_used_up_while_a_folder_is_looked_through(tmp_path: Path) -> None:
    original = write_original(tmp_path / "original")
    single = tmp_path / "single" / "vae"
    single.mkdir(parents=True)
    (original / "Wan2.1_VAE.pth").rename(single / "wan_2.1_vae.pth")
    reads: tuple[Callable[[], Any], ...] = (
        ModelFolder.open(original).transformer.config,
        ModelFolder.open(original).transformer.tensors,
        ModelFolder.open(single.parent).vae.config,
        lambda: ModelFolder.open(single.parent),
        lambda: open_tensors(original),
        lambda: open_tensors(original / "diffusion_pytorch_model"),
    )
    with no_more_descriptors():
        for read in reads:
            assert "Too many open files" in refusal(read, ResourceError)
    assert ModelFolder.open(single.parent).vae.config().base_dim == 4


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_memory_that_is_used_up_is_no_damage(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 2**23)  # 32 MiB
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + 2**24):
        told = refusal(lambda: open_tensors(path), ResourceError)
    assert told == f"{path}: expected memory and file descriptors to open it with, found: Cannot allocate memory"
    assert ResourceError.exit_code == 1, "nothing is wrong with what was given"


def test_the_trap_of_these_tests_works() -> None:
    """Unpickled by anything else, the zeros are made."""
    small = pickle.dumps(_Zeros())
    assert len(small) < 100 and b"bytearray" in small
