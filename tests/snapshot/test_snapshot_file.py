"""Snapshots in files: what comes back is what was there, in another process too, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import as_of_another_version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming import embeds, load, same, take, within

import echo_rt
from echo_rt.errors import OutputError, SnapshotError, SnapshotVersionError, StreamError
from echo_rt.snapshot.snapshot import Snapshot


@pytest.fixture(scope="module")
def snapshot(small_model: Path) -> Snapshot:
    """One with everything in it: a memory, prompts to come, two blocks that were made and not handed out."""
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime), seed=2**64 - 1) as stream:
        chunks = take(stream, 7)
        stream.set_prompt(prompt_embeds=embeds(runtime, 1))
        stream.set_prompt(prompt_embeds=embeds(runtime, 2), block=12)
        return dataclasses.replace(stream.snapshot(), held=tuple(chunks[-2:]), offset=2)


def assert_equal(loaded: Snapshot, saved: Snapshot) -> None:
    for name in ("model", "seed", "block", "memory_ready", "latents_decoded", "offset", "next_block"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert list(loaded.tensors) != [] and set(loaded.tensors) == set(saved.tensors)
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor), name
    assert set(loaded.prompts) == set(saved.prompts)
    assert all(torch.equal(loaded.prompts[block], embeds) for block, embeds in saved.prompts.items())
    assert same(list(loaded.held), list(saved.held))
    assert [(c.index, c.first_frame, c.stats) for c in loaded.held] == [
        (c.index, c.first_frame, c.stats) for c in saved.held
    ]


def test_everything_comes_back(snapshot: Snapshot, tmp_path: Path) -> None:
    assert len(snapshot.held) == 2 and snapshot.memory_ready and snapshot.next_block == 7
    assert set(snapshot.prompts) == {7, 12}
    snapshot.save(tmp_path / "s.safetensors")
    assert_equal(Snapshot.load(tmp_path / "s.safetensors"), snapshot)
    bare = dataclasses.replace(snapshot, prompts={}, held=())
    bare.save(tmp_path / "s.safetensors")
    assert_equal(Snapshot.load(tmp_path / "s.safetensors"), bare)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_odd_tensors_come_back(snapshot: Snapshot, tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    tensors = {f"t{i}": torch.arange(-3, 3).to(dtype) for i, dtype in enumerate(dtypes)} | {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "nan": torch.full((2,), float("inf")),
    }
    odd = dataclasses.replace(snapshot, tensors=tensors)
    odd.save(tmp_path / "s.safetensors")
    assert_equal(Snapshot.load(tmp_path / "s.safetensors"), odd)
    with pytest.raises(SnapshotError, match=r"complex64, which a snapshot's file cannot hold"):
        dataclasses.replace(snapshot, tensors={"c": torch.zeros(1, dtype=torch.complex64)}).save(tmp_path / "c")
    with pytest.raises(SnapshotError, match="not plain JSON"):
        dataclasses.replace(snapshot, model={"steps": (1, 2)}).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_it_is_a_safetensors_file(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    snapshot.save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["echo_rt"] == echo_rt.__version__
        for name, tensor in snapshot.tensors.items():
            assert torch.equal(file.get_tensor(f"state.{name}"), tensor)


GO_ON = """
    import sys
    import torch
    sys.path.insert(0, sys.argv[1])
    from streaming import load, take
    from pathlib import Path
    from echo_rt.snapshot.snapshot import Snapshot
    for dtype in ("float32", "bfloat16"):
        snapshot = Snapshot.load(f"{sys.argv[3]}/{dtype}.safetensors")
        with load(Path(sys.argv[2]), dtype=dtype) as runtime, runtime.resume(snapshot) as stream:
            chunks = take(stream, 4)
        torch.save([(c.index, c.first_frame, c.frames, c.latents) for c in chunks], f"{sys.argv[3]}/{dtype}.pt")
"""


def test_a_new_process_goes_on_bit_for_bit(small_model: Path, tmp_path: Path) -> None:
    """From after a memory update, with a prompt pending."""
    expected = {}
    for dtype in ("float32", "bfloat16"):
        with (
            load(small_model, dtype=dtype) as runtime,
            runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream,
        ):
            take(stream, 6)
            stream.set_prompt(prompt_embeds=embeds(runtime, 1))
            stream.snapshot().save(tmp_path / f"{dtype}.safetensors")
            expected[dtype] = take(stream, 4)
    script = textwrap.dedent(GO_ON)
    arguments = [str(Path(__file__).parent.parent), str(small_model), str(tmp_path)]
    done = subprocess.run([sys.executable, "-B", "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for dtype, chunks in expected.items():
        again = torch.load(tmp_path / f"{dtype}.pt")
        assert [(i, first) for i, first, _, _ in again] == [(c.index, c.first_frame) for c in chunks]
        for (_, _, frames, latents), chunk in zip(again, chunks, strict=True):
            assert torch.equal(frames, chunk.frames) and torch.equal(latents, chunk.latents), (dtype, chunk.index)


def test_another_model_is_refused_by_what_differs(small_model: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    dataclasses.replace(snapshot, held=()).save(tmp_path / "s.safetensors")
    loaded = Snapshot.load(tmp_path / "s.safetensors")
    with load(small_model, overrides={"local_frames": 6}) as other, pytest.raises(StreamError) as caught:
        other.resume(loaded)
    assert str(caught.value).endswith("of another model: local_frames is 9 in the snapshot and 6 here")
    loaded.model["local_frames"] = [f"blocks.{i}.ffn.2" for i in range(180)]  # long as a list of layers can be
    with load(small_model, overrides={"local_frames": 6}) as other, pytest.raises(StreamError) as caught:
        other.resume(loaded)
    assert "local_frames is ['blocks.0.ffn.2'," in str(caught.value) and len(str(caught.value)) < 300


def test_what_differs_is_named_as_its_user_names_it(small_model: Path, snapshot: Snapshot) -> None:
    """Options by their names, dtypes as they are asked for, weights by the part of the model; no hash is shown."""

    def refusal(runtime: echo_rt.Runtime, **facts: Any) -> str:
        with pytest.raises(StreamError) as caught:
            runtime.resume(dataclasses.replace(snapshot, model={**snapshot.model, **facts}))
        message = str(caught.value)
        assert "torch." not in message and "latent_" not in message and "0000" not in message and len(message) < 600
        return message.removeprefix("the snapshot is of another model: ")

    digests, memory = snapshot.model["weights"], snapshot.model["memory"]
    other = "0" * 64
    with load(small_model) as runtime:
        for part, words in (
            (
                0,
                "the weights of the transformer are not those of the snapshot, look at the model's folder, checkpoint,",
            ),
            (1, "the weights of the memory encoder are not those of the snapshot, look at checkpoint, lora"),
            (2, "the weights of the video decoder are not those of the snapshot, look at the model's folder, vae"),
        ):
            changed = [other if index == part else digest for index, digest in enumerate(digests)]
            assert refusal(runtime, weights=changed).startswith(words)
            with_dtype = refusal(runtime, weights=changed, dtype="torch.float8_e4m3fn", float8_except=[])
            assert with_dtype.startswith(
                "dtype is 'float8' in the snapshot and 'float32' here; also different: float8_e"
            )
            assert with_dtype.endswith(words.split(" are ")[0].removeprefix("the "))
        assert refusal(runtime, weights=[other] * 3).endswith("decoder") and refusal(runtime, weights="x")
        assert refusal(runtime, latent_width=6) == "width is 48 in the snapshot and 32 here"
        assert (
            refusal(runtime, vae_dtype="torch.float16") == "vae_dtype is 'float16' in the snapshot and 'float32' here"
        )
        assert refusal(runtime, memory={**memory, "frames": 1}) == "memory_frames is 1 in the snapshot and 3 here"
        assert refusal(runtime, memory={**memory, "layers": 1}).startswith("layers of the memory encoder is 1 in")
        without = refusal(runtime, memory=None, memory_mode="off", weights=[*digests[:1], other, digests[2]])
        assert without.startswith("memory is 'off' in the snapshot and 'evolve' here; also different: ")
        assert refusal(runtime, memory=None).startswith("ffn_multiplier of the memory encoder is not there in the snap")
        everything = {name: "?" for name in snapshot.model}
        with pytest.raises(StreamError, match=r"dtype is '\?' in .*; also different: vae_dtype, vae, .* and \d+ more$"):
            runtime.resume(dataclasses.replace(snapshot, model=everything))


# ---------------------------------------------------------------- other files


def refusal(path: Path) -> str:
    with pytest.raises(SnapshotError) as caught:
        Snapshot.load(path)
    message = str(caught.value)
    assert not isinstance(caught.value, SnapshotVersionError)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    assert "No such file" in refusal(path)
    path.mkdir()
    assert "found a folder" in refusal(path)
    path.rmdir()
    os.mkfifo(path)
    assert "found a pipe" in within(120, lambda: refusal(path))
    path.unlink()
    save_file({"a": torch.ones(3)}, path)
    assert "found a file of tensors with no 'echo-rt snapshot'" in refusal(path)
    torch.save({"a": torch.ones(3)}, path)
    assert "expected a safetensors file, found a damaged or other one" in refusal(path)
    for content in (b"", b"x", b"import echo_rt\n" * 100):
        path.write_bytes(content)
        assert "expected a safetensors file, found a damaged or other one" in refusal(path)
    for content in (b"\0" * 8, b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}"):
        path.write_bytes(content)
        refusal(path)
    nested = b"[" * 100_000
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    assert "expected a safetensors file" in refusal(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "header too large" in refusal(path)
    with open(path, "wb") as file:  # sparse: a header that would be 64 MiB long
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**26 + 8)
    assert "header" in refusal(path)


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "trap"),)

    (tmp_path / "s.safetensors").write_bytes(pickle.dumps(Trap()))
    refusal(tmp_path / "s.safetensors")
    assert not (tmp_path / "trap").exists()
    pickle.loads((tmp_path / "s.safetensors").read_bytes())
    assert (tmp_path / "trap").exists(), "the trap does not work"


def test_versions(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    snapshot.save(path)
    as_of_another_version(path)
    with pytest.raises(SnapshotVersionError) as caught:
        Snapshot.load(path)
    assert str(caught.value) == (
        f"{path}: expected a snapshot of version 1 or 2, found a whole one of version 3, written by echo-rt 9.1; "
        f"this is echo-rt {echo_rt.__version__}"
    )


def test_a_damaged_file_is_of_no_other_version(snapshot: Snapshot, tmp_path: Path) -> None:
    """Neither where the damage is in the number of the version, nor where it is in another version's file."""
    path = tmp_path / "s.safetensors"
    snapshot.save(path)
    content = path.read_bytes()
    for damage in (content.replace(b'"version":"2"', b'"version":"3"'), content.replace(b'"sha256"', b'"sha257"')):
        assert damage != content
        path.write_bytes(damage)
        assert "the snapshot is damaged" in refusal(path)
    path.write_bytes(content)
    as_of_another_version(path)
    content = path.read_bytes()
    for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damage)
        assert "the snapshot is damaged" in refusal(path)


def test_every_bit_counts(snapshot: Snapshot, tmp_path: Path) -> None:
    """One flipped bit, anywhere: in the length, the header, its padding, the tensors."""
    small = dataclasses.replace(snapshot, tensors={"t": torch.arange(40.0)}, prompts={}, held=())
    path = tmp_path / "s.safetensors"
    small.save(path)
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 37):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        refusal(path)
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole + b"\0")
    assert "the snapshot is damaged" in refusal(path)
    path.write_bytes(whole)
    assert_equal(Snapshot.load(path), small)


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_old_one(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"good")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so a write beyond the limit fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write: File too large"):
            snapshot.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"good"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    snapshot.save(path)
    assert load_file(path)


def test_the_file_and_its_name_reach_the_disk_in_order(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, then the name, then the folder that holds the name: any other order can lose both after a power cut."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def noted_replace(*names: str, **folders: int | None) -> None:
        events.append("rename")
        replace(*names, **folders)

    monkeypatch.setattr("echo_rt.utils.atomic_file.os.fsync", noted_sync)
    monkeypatch.setattr("echo_rt.utils.atomic_file.os.replace", noted_replace)
    snapshot.save(tmp_path / "s.safetensors")
    assert events[-2:] == ["rename", "folder"] and set(events[:-2]) == {"file"}
