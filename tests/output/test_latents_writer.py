"""Latents streamed into a safetensors file."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.latents import LatentsWriter

SHAPE = (16, 3, 5)


def test_round_trip_with_metadata(tmp_path):
    path = tmp_path / "l.safetensors"
    blocks = [torch.randn(n, *SHAPE) for n in (3, 3, 1)]
    with LatentsWriter(path, SHAPE, metadata={"seed": "7", "prompt": "a füchs"}) as writer:
        for block in blocks:
            writer.write(block)
        assert not path.exists()
    assert torch.equal(load_file(path)["latents"], torch.cat(blocks))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"seed": "7", "prompt": "a füchs"}
    assert [file.name for file in tmp_path.iterdir()] == ["l.safetensors"]


def test_the_header_has_room_for_any_length(tmp_path):
    writer = LatentsWriter(tmp_path / "l.safetensors", SHAPE)
    room = len(writer._header())
    writer.frames_on_disk = 10**12  # 8,000 years of video
    assert len(writer._header()) == room
    writer.frames_on_disk = 0
    writer.close()


def test_after_an_error_the_file_is_whole(tmp_path):
    path = tmp_path / "l.safetensors"
    with pytest.raises(RuntimeError), LatentsWriter(path, SHAPE) as writer:
        writer.write(np.ones((2, *SHAPE), np.float32))
        raise RuntimeError
    assert load_file(path)["latents"].shape == (2, *SHAPE)


def test_a_full_disk_keeps_whole_frames(tmp_path, monkeypatch):
    path = tmp_path / "l.safetensors"
    writer = LatentsWriter(path, SHAPE)
    append, calls = writer._part.append, []

    def full(data):
        calls.append(len(data))
        if len(calls) == 4:  # after the header and two frames
            raise OSError(28, "No space left on device")
        append(data)

    monkeypatch.setattr(writer._part, "append", full)
    with pytest.raises(OutputError, match=r"No space left on device; its first 2 latent frames are kept"):
        writer.write(torch.arange(4 * 16 * 15, dtype=torch.float32).view(4, *SHAPE))
    writer.close()
    assert load_file(path)["latents"].flatten().tolist() == list(range(2 * 16 * 15))


def test_nothing_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "l.safetensors"
    path.write_bytes(b"good")
    LatentsWriter(path, SHAPE).close()
    assert path.read_bytes() == b"good"
    assert len(list(tmp_path.iterdir())) == 1


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="channels, height, width"):
        LatentsWriter(tmp_path / "l.safetensors", (3, 5))
    with (
        LatentsWriter(tmp_path / "l.safetensors", SHAPE) as writer,
        pytest.raises(ConfigError, match="expected latents"),
    ):
        writer.write(torch.zeros(1, 16, 5, 3))
    with pytest.raises(OutputError, match="closed"):
        writer.write(torch.zeros(1, *SHAPE))
