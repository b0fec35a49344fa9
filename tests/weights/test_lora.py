"""LoRA files: the merged weight is the sum it stands for, and a LoRA that does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from random_weights import TRANSFORMER, assert_same, memory, random_tensors, transformer
from safetensors.torch import save_file
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.weights import merge_lora
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.shapes import MEMORY_PREFIX, transformer_shapes

RANK = 4
# Every Linear of every block, as the published LoRA has it.
MODULES = [
    name.removesuffix(".weight")
    for name, shape in transformer_shapes(TRANSFORMER).items()
    if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
]


def factors(modules: list[str] = MODULES, rank: int = RANK) -> dict[str, Tensor]:
    """PEFT's keys without what stands before the module."""
    shapes = {}
    for module in modules:
        rows, columns = transformer_shapes(TRANSFORMER)[f"{module}.weight"]
        shapes |= {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}
    return random_tensors(shapes, seed=9)


def peft(tensors: Mapping[str, Tensor], prefix: str = "base_model.model.") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tmp_path / "lora.pt"


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WeightsError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_merged(merged: Mapping[str, Tensor], scale: float = 1.0, modules: list[str] = MODULES) -> None:
    """``x @ W'.T`` is ``x @ W.T + scale * (x @ A.T) @ B.T`` where there are factors; all else is as it was."""
    base, low_rank = transformer(), factors(modules)
    assert list(merged) == list(base) and len(merged) == len(base)
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module not in modules or not name.endswith(".weight"):
            assert torch.equal(merged[name], weight), name
            continue
        x = random_tensors({"x": (5, weight.shape[1])}, seed=3)["x"]
        down, up = low_rank[f"{module}.lora_A.weight"], low_rank[f"{module}.lora_B.weight"]
        expected = x @ weight.T + scale * ((x @ down.T) @ up.T)
        assert relative_error(x @ merged[name].T, expected) < 1e-6, name


def test_every_linear_of_every_block() -> None:
    assert len(MODULES) == 10 * TRANSFORMER.num_layers


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: f"base_model.model.model.{name}",
        lambda name: f"base_model.model.{name}".replace(".weight", ".default.weight"),
        lambda name: f"base_model.model._fsdp_wrapped_module.{name}".replace(
            ".self_attn", "._fsdp_wrapped_module.self_attn"
        ),
        lambda name: name,
    ],
)
@pytest.mark.parametrize("container", ["section.pt", "bare.pt", "section.safetensors", "bare.safetensors"])
def test_key_forms(tmp_path: Path, rename: Callable[[str], str], container: str) -> None:
    tensors = {rename(name): tensor for name, tensor in factors().items()}
    if container == "section.pt":
        tensors = {"generator_lora": tensors, "critic_lora": {"other.lora_A.weight": torch.ones(2)}, "step": 3}
    elif container == "section.safetensors":
        tensors = {f"generator_lora.{name}": tensor for name, tensor in tensors.items()}
    merged = merge_lora(transformer(), saved(tmp_path / container, tensors))
    assert (merged.changed, merged.ranks, merged.memory) == (len(MODULES), (RANK,), None)
    check_merged(merged.transformer)


@pytest.mark.parametrize(
    "extra",
    [
        {"alpha": 8},
        {"lora_alpha": 8.0},
        {"generator_lora": {"lora_alpha": torch.tensor(8.0)}},
        {"lora_alpha": torch.tensor(8)},
        {"generator_lora": {f"base_model.model.{module}.alpha": torch.tensor(8.0) for module in MODULES}},
        {"alpha": 3, "generator_lora": {f"{module}.alpha": 8 for module in MODULES}},
    ],
)
def test_alpha_in_the_file(lora: Path, extra: dict[str, Any]) -> None:
    section = peft(factors()) | extra.get("generator_lora", {})
    saved(lora, extra | {"generator_lora": section})
    check_merged(merge_lora(transformer(), lora).transformer, scale=8 / RANK)


def test_alpha_in_safetensors_metadata(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(peft(factors()), path, {"format": "pt", "lora_alpha": "8"})
    check_merged(merge_lora(transformer(), path).transformer, scale=8 / RANK)


def test_some_layers_only_and_ranks_that_differ(lora: Path) -> None:
    some = MODULES[:3]
    saved(lora, {"generator_lora": peft(factors(some))})
    merged = merge_lora(transformer(), lora)
    assert merged.changed == 3
    check_merged(merged.transformer, modules=some)
    saved(lora, {"generator_lora": peft(factors(MODULES[:3]) | factors(MODULES[3:5], rank=2))})
    assert merge_lora(transformer(), lora).ranks == (2, RANK)


def test_merged_in_float32_then_cast_back(lora: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in transformer().items()}
    low_rank = factors()
    saved(lora, {"generator_lora": peft(low_rank)})
    merged = merge_lora(base, lora).transformer
    for module in MODULES:
        down, up = (low_rank[f"{module}.lora_{which}.weight"].double() for which in "AB")
        exact = base[f"{module}.weight"].double() + up @ down
        actual = merged[f"{module}.weight"]
        assert actual.dtype == torch.bfloat16
        # Rounded once, at the end: half a unit in the last of 8 bits, and float32's own error on top. Where weight
        # and change nearly cancel, any earlier rounding to bfloat16 is far outside.
        assert bool(((actual.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())


def test_merged_on_the_device_asked_for(lora: Path) -> None:
    saved(lora, {"generator_lora": peft(factors(MODULES[:1]))})
    merged = merge_lora(transformer(), lora, device="meta").transformer
    on_meta = [name for name, tensor in merged.items() if tensor.is_meta]
    assert on_meta == [f"{MODULES[0]}.weight"]


def test_the_same_files_have_the_same_fingerprint_however_they_are_rounded(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another GPU, or by another release of its libraries; a snapshot's model is known by it."""

    def digest(tensors: Mapping[str, Tensor]) -> str:
        read = FingerprintedTensors(tensors, "here")
        for name in read:
            read[name]
        return read.digest()

    base = transformer()
    merged = merge_lora(base, saved(lora, factors())).transformer
    first, unmerged = digest(merged), digest(base)
    with monkeypatch.context() as patch:
        addmm = torch.addmm
        patch.setattr(torch, "addmm", lambda *tensors, **options: addmm(*tensors, **options) * (1 + 1e-6))
        assert digest(merged) == first != unmerged
    others = [factors() | {"alpha": torch.tensor(2.0)}, factors(MODULES[1:])]
    for name in (f"{MODULES[0]}.lora_A.weight", f"{MODULES[0]}.lora_B.weight"):
        others.append(factors() | {name: factors()[name] * 2})
    digests = [digest(merge_lora(base, saved(lora, other)).transformer) for other in others]
    changed = base | {f"{MODULES[0]}.weight": base[f"{MODULES[0]}.weight"] + 1}
    digests.append(digest(merge_lora(changed, saved(lora, factors())).transformer))
    assert len({first, unmerged, *digests}) == 2 + len(digests)


def test_base_is_left_as_it_was(lora: Path) -> None:
    base = transformer()
    saved(lora, {"generator_lora": peft(factors())})
    for tensor in merge_lora(base, lora).transformer.values():
        tensor.shape  # noqa: B018 - the merge happens when a tensor is taken
    assert_same(base, transformer())


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        MEMORY_PREFIX,
        "_fsdp_wrapped_module.",
        f"model.{MEMORY_PREFIX}",
    ],
)
def test_memory_encoder_beside_the_lora(lora: Path, prefix: str) -> None:
    own = {prefix + name: tensor for name, tensor in memory().items()}
    saved(lora, {"generator_lora": peft(factors()), "query_memory_encoder": own})
    merged = merge_lora(transformer(), lora)
    assert merged.memory is not None
    assert_same(merged.memory, memory())
    check_merged(merged.transformer)


def test_memory_encoder_in_safetensors(tmp_path: Path) -> None:
    own = {MEMORY_PREFIX + name: tensor for name, tensor in memory().items()}
    for prefix in ("generator_lora.base_model.model.", "base_model.model."):
        merged = merge_lora(transformer(), saved(tmp_path / "l.safetensors", peft(factors(), prefix) | own))
        assert merged.memory is not None
        assert_same(merged.memory, memory())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # Nothing fits, or not everything.
        (lambda t: {k.replace("blocks", "layers"): v for k, v in t.items()}, "20 to modules that it does not have"),
        (
            lambda t: (
                t | {"mlp.lora_A.weight": t[f"{MODULES[0]}.lora_A.weight"], "mlp.lora_B.weight": torch.ones(24, 4)}
            ),
            "1 to modules that it does not have: mlp",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{MODULES[0]}.lora_B.weight"},
            f"1 without a partner: {MODULES[0]}.lora_A.weight",
        ),
        (lambda t: {k: v for k, v in t.items() if "lora_A" not in k}, "20 without a partner"),
        # Shapes.
        (lambda t: t | {f"{MODULES[0]}.lora_A.weight": torch.ones(RANK, 25)}, "expected factors of a weight [24, 24]"),
        (lambda t: t | {f"{MODULES[0]}.lora_A.weight": torch.ones(RANK + 1, 24)}, "[24, 4] and"),
        (lambda t: t | {f"{MODULES[0]}.lora_B.weight": torch.ones(24)}, "lora_B.weight [24] and"),
        (lambda t: t | {f"{MODULES[0]}.lora_A.weight": torch.ones(0, 24)}, "lora_A.weight [0, 24]"),
        (
            lambda t: (
                t
                | {
                    "patch_embedding.lora_A.weight": torch.ones(2, 64),
                    "patch_embedding.lora_B.weight": torch.ones(24, 2),
                }
            ),
            "expected factors of a weight [24, 16, 1, 2, 2]",
        ),
        # What is no LoRA.
        (lambda t: t | {"blocks.0.norm3.weight": torch.ones(24)}, "1 of something else: blocks.0.norm3.weight"),
        (lambda t: t | {f"{MODULES[0]}.lora_A.second.weight": torch.ones(RANK, 24)}, "expected one adapter"),
        (lambda t: {"step": torch.ones(1)}, "expected a LoRA (lora_A and lora_B), found 1 tensor without any"),
        (lambda t: transformer(), "expected a LoRA"),
        # Alphas.
        (lambda t: t | {"alpha": torch.tensor(0.0)}, "expected alpha to be a number above 0, found 0.0"),
        (
            lambda t: t | {"lora_alpha": torch.tensor(float("nan"))},
            "expected lora_alpha to be a number above 0, found nan",
        ),
        (lambda t: t | {"nowhere.alpha": torch.tensor(1.0)}, "1 of others: nowhere"),
    ],
)
@pytest.mark.parametrize("section", [True, False])
def test_refused(
    lora: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, section: bool
) -> None:
    tensors = change(factors())
    saved(lora, {"generator_lora": tensors} if section else tensors)
    message = refusal(lambda: merge_lora(transformer(), lora))
    assert said in message and str(lora) in message


def test_alpha_that_is_no_number(lora: Path) -> None:
    saved(lora, {"generator_lora": peft(factors()), "alpha": "much"})
    assert "expected alpha to be a number above 0, found 'much'" in refusal(lambda: merge_lora(transformer(), lora))


def test_damaged_file(lora: Path) -> None:
    assert "found none" in refusal(lambda: merge_lora(transformer(), lora))
    saved(lora, {"generator_lora": peft(factors())})
    lora.write_bytes(lora.read_bytes()[:-100])
    assert "expected a torch file" in refusal(lambda: merge_lora(transformer(), lora))
