"""Golden bundles through ``verify``, bundles of other shapes, and bundles that are damaged."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import as_json, changed, one_line, slow
from hypothesis import given
from hypothesis import strategies as st
from naive_rollout import NaiveRollout
from random_model import flat_config, random_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo_rt.errors import BackendError, EchoError
from echo_rt.ops.backends import available_backends
from echo_rt.verify.bundles import BOUNDS, verify_bundle

SMALL = ("rollout_small", "vae", "text_encoder")
LARGE = ("rollout", "rollout_no_memory", "rollout_prompt_switch", "rollout_early_switch")
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
BACKENDS = [name for name, status in available_backends().items() if status == "available"]
# float32 agrees far better than its bound; this keeps it so.
SHARP = 2e-6


# A decoder has no float8, and its emulated kernels are compared dtype by dtype where they are tested themselves.
SLOW = {("vae", torch.float8_e4m3fn, backend) for backend in BACKENDS} | {("vae", torch.float16, "emulated")}


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        pytest.param(*each, marks=[pytest.mark.long] if each in SLOW else [])
        for each in itertools.product(SMALL, BOUNDS, BACKENDS)
    ],
)
def test_small_bundles_pass(golden_dir: Path, name: str, dtype: torch.dtype, backend: str) -> None:
    if backend != "torch" and name == "rollout_small" and dtype == torch.float32:
        with pytest.raises(BackendError, match=r"in bfloat16 or float16 .* got float32"):
            check(golden_dir / name, dtype, backend)
        return
    check(golden_dir / name, dtype, backend)


@DTYPES
@pytest.mark.parametrize("name", LARGE)
def test_large_bundles_pass(shared_golden: Path, name: str, dtype: torch.dtype) -> None:
    check(shared_golden / name, dtype, "torch")


@pytest.mark.skipif("emulated" not in BACKENDS, reason="this build has no emulated kernels")
def test_a_large_bundle_passes_on_emulated_kernels(shared_golden: Path) -> None:
    check(shared_golden / "rollout", torch.bfloat16, "emulated")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@DTYPES
@pytest.mark.parametrize("name", SMALL)
def test_small_bundles_pass_on_a_gpu(golden_dir: Path, name: str, dtype: torch.dtype) -> None:
    skip_unless_able(dtype)
    assert verify_bundle(golden_dir / name, device="cuda", dtype=dtype).passed


def skip_unless_able(dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply float8")


def check(bundle: Path, dtype: torch.dtype, backend: str) -> None:
    if backend == "cuda":
        skip_unless_able(dtype)
    report = verify_bundle(bundle, device="cuda" if backend == "cuda" else "cpu", dtype=dtype, backend=backend)
    wrong = [f"{row.name} {row.error:.1e}" for row in report.rows if not row.ok]
    assert report.passed and not wrong, wrong
    assert {row.name for row in report.rows} == set(load_file(bundle / "expected.safetensors"))
    if dtype == torch.float32:
        assert max(row.error for row in report.rows) < SHARP


OTHER_SHAPES = {
    "one-frame-blocks": {
        "frames_per_block": 1,
        "sink_frames": 2,
        "local_frames": 5,
        "max_temporal_id": 8,
        "memory": {"frames": 1, "layers": 1, "normalize_k": True, "rebuild_on_prompt_switch": True},
        "prompt_switch_blocks": [1, 4, 8, 9, 20],
        "num_blocks": 24,
    },
    "two-frame-blocks": {
        "frames_per_block": 2,
        "sink_frames": 2,
        "local_frames": 4,
        "max_temporal_id": 9,
        "memory": {"frames": 2, "layers": 3, "normalize_k": True, "rebuild_on_prompt_switch": False},
        "denoising_steps": [1000, 400],
        "prompt_switch_blocks": [3, 7, 12],
        "num_blocks": 15,
    },
    "deep-and-wide": {
        "dim": 64,
        "num_heads": 2,
        "num_layers": 4,
        "latent_height": 6,
        "latent_width": 4,
        "denoising_steps": [800],
        "prompt_switch_blocks": [],
        "num_blocks": 7,
    },
    "no-memory": {"memory": None, "sink_frames": 6, "local_frames": 6, "prompt_switch_blocks": [5], "num_blocks": 9},
}
# The facts in which published recipes differ; heads that the memory's kernels have tiles for.
RECIPES = {
    "rotated-reads": {
        "dim": 64,
        "num_heads": 1,
        "memory": {
            "frames": 3,
            "layers": 2,
            "normalize_k": True,
            "rebuild_on_prompt_switch": True,
            "reads": "rotated",
        },
        "denoising_steps": [1000, 500],
        "prompt_switch_blocks": [9],
        "num_blocks": 12,
    },
    "no-sink": {
        "memory": None,
        "sink_frames": 0,
        "frames_per_block": 1,
        "local_frames": 5,
        "max_temporal_id": 8,
        "denoising_steps": [1000, 500],
        "first_block_steps": [1000, 750, 500, 250],
        "prompt_switch_blocks": [3, 9],
        "num_blocks": 14,
    },
    "renewed-sink": {
        "memory": None,
        "recache_sink": True,
        "max_temporal_id": 11,
        "denoising_steps": [1000, 500],
        "prompt_switch_blocks": [2],
        "num_blocks": 8,
    },
}


def write_bundle(folder: Path, changes: dict[str, object]) -> None:
    """A bundle of another shape, its truth computed by the naive rollout in float64."""
    flat = flat_config(kind="rollout", **changes)
    weights = random_weights(flat)
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    shape = (flat["frames_per_block"], flat["in_channels"], flat["latent_height"], flat["latent_width"])
    naive = NaiveRollout(flat, weights, "off" if flat["memory"] is None else "evolve")

    def prompt(number: int) -> None:
        embeds = torch.randn(1 + number % flat["text_len"], flat["text_dim"], generator=generator)
        inputs[f"prompt_embeds.{number}"] = embeds
        naive.set_prompt(embeds)

    def noise(block: int, step: int) -> Tensor:
        name = f"noise.{block}" if step == 0 else f"renoise.{block}.{step - 1}"
        return inputs.setdefault(name, torch.randn(shape, generator=generator))

    prompt(0)
    for block in range(flat["num_blocks"]):
        if block in flat["prompt_switch_blocks"]:
            prompt(1 + flat["prompt_switch_blocks"].index(block))
        expected[f"latents.{block}"] = naive.next_block(noise).float()
        if naive.memory is not None:
            expected[f"memory_state.{block}"] = naive.memory.float()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(flat))
    for name, tensors in (("weights", weights), ("inputs", inputs), ("expected", expected)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a shape or recipe, whose truth is computed once; tests must not change it."""
    folder = tmp_path_factory.mktemp("bundles")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            write_bundle(folder / name, (OTHER_SHAPES | RECIPES)[name])
        return folder / name

    return find


@DTYPES
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_bundles_of_other_shapes_pass(written: Callable[[str], Path], shape: str, dtype: torch.dtype) -> None:
    check(written(shape), dtype, "torch")


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_facts_of_recipes_pass_on_every_backend(
    written: Callable[[str], Path], recipe: str, dtype: torch.dtype, backend: str
) -> None:
    if RECIPES[recipe]["memory"] is not None and backend != "torch" and dtype == torch.float32:
        with pytest.raises(BackendError, match=r"in bfloat16 or float16 .* got float32"):
            check(written(recipe), dtype, backend)
        return
    check(written(recipe), dtype, backend)


def test_dump_writes_every_tensor_under_its_name(golden_dir: Path, tmp_path: Path) -> None:
    for name in SMALL:
        verify_bundle(golden_dir / name, dump=tmp_path)
        actual = load_file(tmp_path / name / "actual.safetensors")
        expected = load_file(golden_dir / name / "expected.safetensors")
        assert {key: value.shape for key, value in actual.items()} == {k: v.shape for k, v in expected.items()}


def change_tensor(file: str, name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        tensors = load_file(bundle / file)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, bundle / file)

    return apply


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        file = bundle / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def test_a_wrong_result_is_seen(golden_dir: Path, tmp_path: Path) -> None:
    for number, change in enumerate((lambda t: t * 1.01, lambda t: t[:2].clone(), lambda t: t * float("nan"))):
        bundle = tmp_path / str(number)
        shutil.copytree(golden_dir / "rollout_small", bundle)
        change_tensor("expected.safetensors", "latents.5", change)(bundle)
        report = verify_bundle(bundle)
        assert not report.passed
        assert [row.name for row in report.rows if not row.ok] == ["latents.5"]
    # What was expected and never computed is wrong too.
    change_tensor("expected.safetensors", "latents.5", lambda t: t)(bundle)
    tensors = load_file(bundle / "expected.safetensors") | {"latents.99": torch.zeros(1)}
    save_file(tensors, bundle / "expected.safetensors")
    assert not verify_bundle(bundle).passed


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda b: (b / "config.json").unlink(), "expected the folder of a golden bundle or of a model"),
    "bad-json": (lambda b: (b / "config.json").write_text("{"), "expected JSON"),
    "unknown-kind": (lambda b: (b / "config.json").write_text('{"kind": "song"}'), "got 'song'"),
    "no-blocks": (lambda b: (b / "config.json").write_text(json.dumps(flat_config(kind="rollout"))), "config|tensors"),
    "no-weights": (lambda b: (b / "weights.safetensors").unlink(), "weights.safetensors"),
    "half-weights": (lambda b: truncate(b / "weights.safetensors"), "weights.safetensors"),
    "missing-tensor": (
        change_tensor("weights.safetensors", "blocks.1.ffn.0.bias", lambda t: None),
        r"blocks\.1\.ffn\.0\.bias",
    ),
    "misshapen-tensor": (
        change_tensor("weights.safetensors", "head.head.bias", lambda t: t[:3].clone()),
        r"head\.head\.bias",
    ),
    "wide-prompt": (
        change_tensor("inputs.safetensors", "prompt_embeds.1", lambda t: t.repeat(1, 2)),
        "64 wide, the model takes 32",
    ),
    "long-prompt": (
        change_tensor("inputs.safetensors", "prompt_embeds.0", lambda t: t.repeat(3, 1)),
        "21 tokens, the model takes at most 16",
    ),
    "blocks-in-words": (change_config(num_blocks="many"), "`int`, got `str`"),
    "no-switches": (change_config(prompt_switch_blocks=None), "`array`, got `null`"),
    "memory-in-words": (change_config(memory="x"), "memory must be an object or null, got 'x'"),
    "shift-in-words": (change_config(timestep_shift="5"), "timestep_shift must be a number .*, got '5'"),
    "not-numbers": (
        change_tensor("weights.safetensors", "head.head.bias", lambda t: t * float("nan")),
        "of head.head.bias are NaN or infinite",
    ),
    "no-noise": (change_tensor("inputs.safetensors", "noise.4", lambda t: None), r"noise\.4"),
    "other-noise": (change_tensor("inputs.safetensors", "noise.4", lambda t: t[:1].clone()), r"noise\.4"),
}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_a_clear_error(golden_dir: Path, tmp_path: Path, damage: str) -> None:
    apply, words = DAMAGE[damage]
    bundle = tmp_path / "bundle"
    shutil.copytree(golden_dir / "rollout_small", bundle)
    apply(bundle)
    with pytest.raises(EchoError, match=words) as error:
        verify_bundle(bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "apply", "words"),
    [
        ("vae", change_tensor("inputs.safetensors", "latents", lambda t: t[0].clone()), "latents with 4 dimensions"),
        ("text_encoder", change_tensor("inputs.safetensors", "input_ids", lambda t: t[0].clone()), "2 dimensions"),
        ("text_encoder", change_config(num_heads=0), "num_heads must be a positive integer of at most 1048576, got 0"),
        ("text_encoder", change_config(d_model="x"), "d_model must be a positive integer of at most 1048576, got 'x'"),
    ],
)
def test_other_kinds_damaged(
    golden_dir: Path, tmp_path: Path, name: str, apply: Callable[[Path], None], words: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(golden_dir / name, bundle)
    apply(bundle)
    with pytest.raises(EchoError, match=words) as error:
        verify_bundle(bundle)
    assert "\n" not in str(error.value)


@slow
@given(name=st.sampled_from(SMALL), data=st.data())
def test_whatever_a_bundles_config_says(
    golden_dir: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bundle") / name
    folder.mkdir()
    for file in (golden_dir / name).iterdir():
        (folder / file.name).symlink_to(file)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(as_json(data.draw(changed(whole))))
    try:
        verify_bundle(folder)
    except EchoError as error:
        one_line(error)
