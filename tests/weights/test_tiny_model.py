"""The small random model: whole, the same for a seed, and careful with what is already there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from echo_rt.config import MemoryConfig, ModelConfig
from echo_rt.errors import ConfigError, OutputError, PromptError
from echo_rt.model.text import TextEncoder
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.generator import load_generator
from echo_rt.weights.shapes import memory_config_of
from echo_rt.weights.tiny_model import CHECKPOINT_FILE, TINY_VAE_FILE, RandomTensors, write_tiny_model
from echo_rt.weights.tiny_vae import open_tiny_vae

SIZE = {"width": 48, "height": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "deep" / "model"
    write_tiny_model(path, **SIZE)
    return path


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_part_loads(tiny: Path) -> None:
    folder = ModelFolder.open(tiny)
    config = folder.transformer.config()
    assert config.text_dim == folder.text_encoder.config().d_model
    # Each of these holds every name and shape against the tables.
    for tensors in (folder.transformer.tensors(), folder.vae.tensors(), folder.text_encoder.tensors()):
        assert all(bool(tensors[name].isfinite().all()) for name in tensors)
    defaults = folder.rollout_defaults()
    assert (defaults["width"], defaults["height"]) == (SIZE["width"], SIZE["height"])
    assert sum(path.stat().st_size for path in tiny.rglob("*")) < 15e6


def test_checkpoint_loads(tiny: Path) -> None:
    folder = ModelFolder.open(tiny)
    config = folder.transformer.config()
    stride = folder.vae.config().spatial_stride
    model = ModelConfig(config, SIZE["height"] // stride, SIZE["width"] // stride, memory=MemoryConfig())
    parts = {ema: load_generator(tiny / CHECKPOINT_FILE, config, ema=ema) for ema in (False, True)}
    for part in parts.values():
        assert part.memory is not None
        tokens, memory = memory_config_of(part.memory, "here")
        assert tokens == model.memory_tokens and memory.normalize_k == MemoryConfig().normalize_k
        assert part.memory["gate_linear.bias"].float().mean() == pytest.approx(2, abs=0.1)
    name = "blocks.0.self_attn.q.weight"
    plain, averaged = (parts[ema].transformer[name] for ema in (False, True))
    assert not torch.equal(plain, averaged) and not torch.equal(plain, folder.transformer.tensors()[name])


def test_same_seed_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """Also in another process, whose hashes and memory lie differently."""
    write = "import sys; from echo_rt.weights.tiny_model import write_tiny_model; "
    write += f"write_tiny_model(sys.argv[1], width={SIZE['width']}, height={SIZE['height']})"
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "again")], check=True)
    assert digests(tmp_path / "again") == digests(tiny)
    write_tiny_model(tmp_path / "other", seed=1, **SIZE)
    changed = {name for name, digest in digests(tmp_path / "other").items() if digest != digests(tiny)[name]}
    assert changed == {name for name in digests(tiny) if "umt5-xxl/" not in name}


# ---------------------------------------------------------------- what is already there


def test_overwrite_only_what_was_written_here(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder, **SIZE)  # an empty folder is no obstacle
    before = digests(folder)
    with pytest.raises(OutputError, match="already holds a small random model"):
        write_tiny_model(folder, seed=1, **SIZE)
    assert digests(folder) == before
    write_tiny_model(folder, seed=1, overwrite=True, **SIZE)
    after = digests(folder)
    assert after.keys() == before.keys() and after != before
    (folder / "film.mp4").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"since it holds 1 other file \(film\.mp4\)"):
        write_tiny_model(folder, overwrite=True, **SIZE)
    assert digests(folder).items() > after.items()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("config", [None, "{}", "[]", "no json", '{"dim": 1536, "echo_rt": {"width": 832}}'])
def test_other_folders_are_left_alone(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="is not empty and holds no model written here"):
        write_tiny_model(tmp_path, overwrite=True, **SIZE)
    assert digests(tmp_path) == before


def test_target_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="got a file"):
        write_tiny_model(file, overwrite=True, **SIZE)
    with pytest.raises(OutputError, match="cannot write the model"):
        write_tiny_model(file / "model", **SIZE)
    assert file.read_text() == "mine"


def test_a_model_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model", **SIZE)
    before, rename = digests(tmp_path), Path.rename

    def full(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_tiny_model(tmp_path / "model", seed=1, overwrite=True, **SIZE)
    assert digests(tmp_path) == before


def test_nothing_half_written_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write_tiny_model(tmp_path / "model", **SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**64}, {"seed": True}, {"width": 40}, {"height": 0}])
def test_seed_and_size_that_cannot_be(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_tiny_model(tmp_path / "model", **(SIZE | wrong))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what it does


def test_tokenizer_takes_any_text(tiny: Path) -> None:
    folder = ModelFolder.open(tiny)
    config = folder.text_encoder.config()
    texts = ["a red fox in the snow", "naïve Ærøskøbing", "雪の中の狐", "🦊👩‍👩‍👧 ok", "a\u202eb", "\U0010ffff \ufffd"]
    made = TextEncoder(config, folder.text_encoder.tensors(), folder.tokenizer_path(), text_len=64)
    with closing(made) as encoder:
        for text in texts:
            ids = encoder.tokenize(text)
            assert ids[-1] == 1 and 0 not in ids and max(ids) < config.vocab_size
            assert encoder._tokenizer.decode(ids[:-1]).strip() == text
        assert len(encoder.tokenize(texts[0])) == 7  # whole words, not bytes
        with pytest.raises(PromptError):
            encoder.tokenize("")


def test_decoders_make_a_picture(tiny: Path) -> None:
    """Noise at the scale of latents decodes to colours that are neither grey nor clipped."""
    folder = ModelFolder.open(tiny)
    like = folder.vae.config()
    vae = open_tiny_vae("tiny", tiny, like)
    assert vae.path.name == TINY_VAE_FILE and all(tensor.dtype == torch.float16 for tensor in vae.tensors.values())
    latents = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    for decoder in (
        VaeDecoder(like, folder.vae.tensors(), load_ops("torch"), device="cpu", dtype=torch.float32),
        TinyDecoder(vae.config, vae.tensors, like, device="cpu", dtype=torch.float32),
    ):
        video = decoder.decode(latents, decoder.new_state(6, 6, 8))[9:]
        assert 0.15 < float(video.std()) < 0.8
        assert float((video.abs() > 1).float().mean()) < 0.2


def test_config_names_the_seed(tiny: Path) -> None:
    assert json.loads((tiny / "config.json").read_text())["echo_rt"]["tiny_seed"] == 0


# ---------------------------------------------------------------- tensors of any model


def test_random_tensors_depend_on_name_and_seed_alone() -> None:
    shapes = {"a.weight": (64, 1024), "b.weight": (64, 1024), "norm.weight": (4096,), "gate_linear.bias": (4096,)}
    tensors = RandomTensors(shapes, torch.device("cpu"))
    first = tensors["a.weight"]
    assert torch.equal(RandomTensors(dict(reversed(shapes.items())), torch.device("cpu"))["a.weight"], first)
    assert not torch.equal(tensors["b.weight"], first)
    assert not torch.equal(RandomTensors(shapes, torch.device("cpu"), seed=1)["a.weight"], first)
    assert float(first.std()) == pytest.approx(1 / 32, rel=0.05)
    assert float(tensors["norm.weight"].mean()) == pytest.approx(1, abs=0.01)
    assert float(tensors["gate_linear.bias"].mean()) == pytest.approx(2, abs=0.01)
    assert list(tensors) == list(shapes) and len(tensors) == 4 and "c" not in tensors
