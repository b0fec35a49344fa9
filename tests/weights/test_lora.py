"""LoRA files: the merged weight is the sum it stands for, and a LoRA that does not fit is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from random_weights import TRANSFORMER, TRANSFORMER_NAMES, assert_same, memory, random_tensors, transformer
from safetensors.torch import save_file
from torch import Tensor

from echo_rt.errors import ConfigError, WeightsError
from echo_rt.weights.lora import merge_lora
from echo_rt.weights.shapes import MEMORY_PREFIX, transformer_shapes
from echo_rt.weights.tensors import FingerprintedTensors

RANK, ALPHA = 4, 8
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


def merged_by_hand(module: str, scale: float, modules: list[str] = MODULES, rank: int = RANK) -> Tensor:
    """The weight of ``module`` with ``scale`` times its factors of :func:`factors`."""
    down, up = (factors(modules, rank)[f"{module}.lora_{which}.weight"] for which in "AB")
    return transformer()[f"{module}.weight"] + scale * (up @ down)


def test_every_linear_of_every_block() -> None:
    assert len(MODULES) == 10 * TRANSFORMER.num_layers


def to_diffusers(module: str) -> str:
    return TRANSFORMER_NAMES[f"{module}.weight"].removesuffix(".weight")


# What stands before a module, how modules are called, and what follows them for the two factors.
NAMINGS: dict[str, tuple[str, Callable[[str], str], str, str]] = {
    "bare": ("", str, "lora_A.weight", "lora_B.weight"),
    "peft": ("base_model.model.", str, "lora_A.weight", "lora_B.weight"),
    "peft, trainer's model": ("base_model.model.model.", str, "lora_A.default.weight", "lora_B.default.weight"),
    "fsdp": (
        "base_model.model._fsdp_wrapped_module.",
        lambda module: module.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "lora_A.weight",
        "lora_B.weight",
    ),
    "diffsynth": ("pipe.dit.", str, "lora_A.default.weight", "lora_B.default.weight"),
    "comfyui": ("diffusion_model.", str, "lora_down.weight", "lora_up.weight"),
    "comfyui, whole": ("model.diffusion_model.", str, "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_", lambda module: module.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "kohya of diffusers": (
        "lora_transformer_",
        lambda module: to_diffusers(module).replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "diffusers": ("transformer.", to_diffusers, "lora_A.weight", "lora_B.weight"),
    "diffusers, peft": ("transformer.base_model.model.", to_diffusers, "lora_A.weight", "lora_B.weight"),
    "diffusers, old": ("unet.", to_diffusers, "lora.down.weight", "lora.up.weight"),
    "transformers": ("", to_diffusers, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "mochi": ("", str, "lora_A", "lora_B"),
    "lightning": ("state_dict.module.", str, "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("container", ["section.pt", "bare.safetensors"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(tmp_path: Path, naming: str, container: str) -> None:
    prefix, of_module, down, up = NAMINGS[naming]
    endings = {"lora_A": down, "lora_B": up}
    tensors: dict[str, Any] = {}
    for name, tensor in factors().items():
        module, factor, _ = name.rsplit(".", 2)
        tensors[f"{prefix}{of_module(module)}.{endings[factor]}"] = tensor
    if container == "section.pt":
        tensors = {"generator_lora": tensors, "critic_lora": {"other.lora_A.weight": torch.ones(2)}, "step": 3}
    merged = merge_lora(transformer(), saved(tmp_path / container, tensors))
    assert merged.memory is None
    check_merged(merged.transformer)


@pytest.mark.parametrize("names", ["of parameters", "numbers"])
def test_a_training_checkpoint_of_a_lora(lora: Path, names: str) -> None:
    """As trainers write it to go on: averages of all weights, factors among them, an optimizer's state and a step."""
    averaged = {
        f"model.base_model.model.{name}".replace(".weight", ".default.weight"): 2 * tensor
        for name, tensor in factors().items()
    }
    averaged |= {
        f"model.base_model.model.{module}.base_layer.weight": transformer()[f"{module}.weight"] for module in MODULES
    }
    trained = [torch.nn.Parameter(tensor) for tensor in averaged.values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.0, 0.999))
    torch.stack([parameter.square().sum() for parameter in trained]).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    if names == "of parameters":  # as FSDP has them
        by_name = {name: state["state"][number] for number, name in enumerate(averaged)}
        state = {"state": by_name, "param_groups": [state["param_groups"][0] | {"params": list(averaged)}]}
    section = peft(factors())
    saved(lora, {"generator_lora": section, "generator_optimizer": state, "step": 3000, "generator_ema": averaged})
    merged = merge_lora(transformer(), lora)
    assert merged.memory is None
    check_merged(merged.transformer)
    saved(lora, {"generator_ema": averaged, "step": 3000, "generator_optimizer": state, "generator_lora": section})
    check_merged(merge_lora(transformer(), lora, alpha=float(RANK)).transformer)


@pytest.mark.parametrize(
    ("naming", "convert"),
    [
        ("comfyui", "_convert_non_diffusers_wan_lora_to_diffusers"),
        ("kohya", "_convert_musubi_wan_lora_to_diffusers"),
    ],
)
def test_what_diffusers_converts_is_the_same(tmp_path: Path, naming: str, convert: str) -> None:
    """Its own converters take other names to its own, and alpha into the factors."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    prefix, of_module, down, up = NAMINGS[naming]
    tensors = {}
    for module in MODULES:
        tensors |= {
            f"{prefix}{of_module(module)}.{ending}": tensor
            for ending, tensor in (
                (down, factors()[f"{module}.lora_A.weight"]),
                (up, factors()[f"{module}.lora_B.weight"]),
                ("alpha", torch.tensor(float(ALPHA))),
            )
        }
    path = saved(tmp_path / "lora.safetensors", tensors)
    check_merged(merge_lora(transformer(), path).transformer, scale=ALPHA / RANK)
    path = saved(tmp_path / "converted.safetensors", getattr(conversion, convert)(tensors))  # which it writes into
    check_merged(merge_lora(transformer(), path).transformer, scale=ALPHA / RANK)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_differences(lora: Path, prefix: str) -> None:
    """Of CausVid's and LightX2V's files: of weights, biases, norms and modulations; no alpha scales them."""
    keys = {
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.0.norm3.bias": "blocks.0.norm3.diff_b",
        "blocks.1.norm3.weight": "blocks.1.norm2.w_norm" if prefix == "transformer." else "blocks.1.norm3.w_norm",
        "blocks.1.ffn.0.bias": "blocks.1.ffn.0.diff_b",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.modulation": "head.diff_m",
        "head.head.weight": "head.head.diff",
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
    }
    base = transformer()
    differences = random_tensors({name: tuple(base[name].shape) for name in keys}, seed=5)
    tensors = {prefix + key: differences[name] for name, key in keys.items()} | factors(MODULES[:1]) | {"alpha": ALPHA}
    merged = merge_lora(base, [(saved(lora, tensors), 0.5)])
    for name, tensor in merged.transformer.items():
        expected = base[name] + 0.5 * differences[name] if name in keys else base[name]
        if name == f"{MODULES[0]}.weight":
            expected = merged_by_hand(MODULES[0], 0.5 * ALPHA / RANK)
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "matrix"])
def test_factors_of_a_convolution_and_of_a_bias(lora: Path, kernel: bool) -> None:
    weight, bias = (transformer()[f"patch_embedding.{which}"] for which in ("weight", "bias"))
    low_rank = random_tensors(
        {"lora_A.weight": (2, *weight.shape[1:]), "lora_B.weight": (len(weight), 2, 1, 1, 1), "lora_B.bias": bias.shape}
    )
    down, up, added = low_rank.values()
    if not kernel:
        low_rank |= {"lora_A.weight": down.flatten(1), "lora_B.weight": up.flatten(1)}
    saved(lora, {f"patch_embedding.{name}": tensor for name, tensor in low_rank.items()} | {"alpha": ALPHA})
    merged = merge_lora(transformer(), lora).transformer
    expected = weight + ALPHA / 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    assert torch.allclose(merged["patch_embedding.weight"], expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(merged["patch_embedding.bias"], bias + ALPHA / 2 * added)


def test_several_with_strengths_in_order(tmp_path: Path) -> None:
    first = saved(tmp_path / "first.safetensors", factors(MODULES[:2]))
    second = saved(tmp_path / "second.pt", factors(MODULES[1:3], rank=2) | {"alpha": ALPHA})
    merged = merge_lora(transformer(), [(first, 0.5), second, (str(first), -2)])
    assert merged.loras == ((first, 0.5), (second, 1.0), (first, -2.0))
    expected = {
        MODULES[0]: merged_by_hand(MODULES[0], -1.5),
        MODULES[1]: merged_by_hand(MODULES[1], -1.5) + merged_by_hand(MODULES[1], ALPHA / 2, MODULES[1:3], rank=2),
        MODULES[2]: merged_by_hand(MODULES[2], ALPHA / 2, MODULES[1:3], rank=2),
    }
    expected[MODULES[1]] -= transformer()[f"{MODULES[1]}.weight"]
    for name, weight in transformer().items():
        close = torch.allclose(merged.transformer[name], expected.get(name.removesuffix(".weight"), weight), atol=1e-5)
        assert close, name
    nothing = merge_lora(transformer(), [(first, 0)]).transformer
    assert_same(dict(nothing), transformer())


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


ADAPTER = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": False, "init_lora_weights": True}
IN_HEADER = "lora_adapter_metadata"


def in_header(fields: Mapping[str, Any]) -> dict[str, str]:
    """PEFT's config as diffusers writes it into the header."""
    return {IN_HEADER: json.dumps({f"transformer.{name}": value for name, value in fields.items()})}


def peft_folder(folder: Path, config: Mapping[str, Any] | None, header: Mapping[str, str] | None = None) -> Path:
    folder.mkdir()
    save_file(peft(factors()), folder / "adapter_model.safetensors", {"format": "pt", **(header or {})})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "header", "scale"),
    [
        (None, {"lora_alpha": "8"}, 2),
        (None, {"alpha": "8.0"}, 2),
        (None, {"network_alpha": "8"}, 2),
        (None, {"ss_network_alpha": "8.0", "ss_network_dim": "4"}, 2),
        (None, {"ss_network_alpha": "Dynamic"}, 1),
        (None, in_header({"lora_alpha": 8, "r": 4}), 2),
        (None, in_header({"lora_alpha": 8, "use_rslora": True}), 4),
        (ADAPTER, None, 2),
        ({"lora_alpha": 8.0, "init_lora_weights": "gaussian"}, {"lora_alpha": "8"}, 2),
        (ADAPTER | {"use_rslora": True}, None, 4),
        (ADAPTER | {"r": 99, "rank_pattern": {"self_attn.[qkvo]|cross_attn.[qkvo]|ffn.[02]": RANK}}, None, 2),
        (ADAPTER | {"lora_alpha": 99, "alpha_pattern": {".*attn\\.[qkvo]": 8, "blocks.\\d.ffn.[02]": 8}}, None, 2),
        ({}, None, 1),
    ],
)
@pytest.mark.parametrize("of", ["folder", "file"])
def test_alpha_beside_the_tensors(
    tmp_path: Path, config: dict[str, Any] | None, header: dict[str, str] | None, scale: float, of: str
) -> None:
    folder = peft_folder(tmp_path / "lora", config, header)
    path = folder if of == "folder" else folder / "adapter_model.safetensors"
    check_merged(merge_lora(transformer(), path).transformer, scale=scale)


def test_an_alpha_that_is_given_is_for_files_without_one(tmp_path: Path) -> None:
    without = saved(tmp_path / "without.pt", factors())
    stating = saved(tmp_path / "stating.pt", factors() | {"alpha": torch.tensor(2.0)})
    check_merged(merge_lora(transformer(), without, alpha=8).transformer, scale=2)
    both = merge_lora(transformer(), [without, stating], alpha=8).transformer
    check_merged(both, scale=2 + 2 / RANK)
    check_merged(merge_lora(transformer(), stating, alpha=2).transformer, scale=2 / RANK)
    said = f"{stating}: expected factors without an alpha, to take lora_alpha 8, found 2"
    assert said in refusal(lambda: merge_lora(transformer(), stating, alpha=8))


@pytest.mark.parametrize(
    ("config", "header", "said"),
    [
        (ADAPTER, {"alpha": "16"}, "found 16 (alpha) and 8 (lora_alpha of adapter_config.json)"),
        (None, {"alpha": "16", "ss_network_alpha": "8"}, "found 16 (alpha) and 8 (ss_network_alpha)"),
        (
            None,
            {"lora_alpha": "16", **in_header({"lora_alpha": 8})},
            f"16 (lora_alpha) and 8 (lora_alpha of {IN_HEADER})",
        ),
        (
            ADAPTER,
            in_header({"lora_alpha": 4}),
            f"8 (lora_alpha of adapter_config.json) and 4 (lora_alpha of {IN_HEADER})",
        ),
        (ADAPTER | {"r": 8}, None, "found 8 (r of adapter_config.json) and 4 (its factors)"),
        (ADAPTER | {"use_dora": True}, None, "expected a LoRA, found DoRA (in adapter_config.json)"),
        (ADAPTER | {"peft_type": "LOKR"}, None, "expected a LoRA, found LOKR (in adapter_config.json)"),
        (ADAPTER | {"init_lora_weights": "pissa"}, None, "found init_lora_weights 'pissa'"),
        (
            ADAPTER | {"lora_alpha": "much"},
            None,
            "config of an adapter, found no JSON of one: Expected `float | null`",
        ),
        (ADAPTER | {"lora_alpha": -1}, None, "Expected `float` > 0.0 - at `$.lora_alpha`"),
        (ADAPTER | {"alpha_pattern": {"(": 8}}, None, "expected simple patterns of modules' names in adapter_config"),
        # Each would take years to match a name of a hundred letters.
        (ADAPTER | {"alpha_pattern": {"(a+)+": 8}}, None, "expected simple patterns"),
        (ADAPTER | {"rank_pattern": {"(.|.)*x": 8}}, None, "expected simple patterns"),
        (ADAPTER | {"rank_pattern": {".*.*.*x": 8}}, None, "expected simple patterns"),
        (ADAPTER | {"rank_pattern": {f"a{i}": 8 for i in range(3000)}}, None, "length <= 2048 - at `$.rank_pattern`"),
        (ADAPTER | {"alpha_pattern": [8]}, None, "Expected `object | null`, got `array` - at `$.alpha_pattern`"),
        (None, {IN_HEADER: "8"}, f"expected {IN_HEADER} to be PEFT's config as a JSON object"),
        (None, {IN_HEADER: "[" * 100_000}, f"expected {IN_HEADER} to be PEFT's config as a JSON object"),
        (None, {"ss_network_alpha": "-8"}, "expected ss_network_alpha to be a number above 0"),
    ],
)
def test_what_is_stated_is_refused(
    tmp_path: Path, config: dict[str, Any] | None, header: dict[str, str] | None, said: str
) -> None:
    folder = peft_folder(tmp_path / "lora", config, header)
    assert said in refusal(lambda: merge_lora(transformer(), folder))


def test_alphas_of_tensors_and_facts_that_disagree(lora: Path) -> None:
    saved(lora, {"alpha": 16, "generator_lora": factors() | {f"{MODULES[0]}.alpha": torch.tensor(8.0)}})
    said = f"expected one alpha of {MODULES[0]}, found 8 (alphas of modules) and 16 (alpha)"
    assert said in refusal(lambda: merge_lora(transformer(), lora))
    # What bfloat16 makes of an alpha is no other alpha.
    rounded = torch.tensor(8.03, dtype=torch.bfloat16)
    saved(lora, {"alpha": 8.03, "generator_lora": factors() | {f"{m}.alpha": rounded for m in MODULES}})
    check_merged(merge_lora(transformer(), lora).transformer, scale=rounded.item() / RANK)


def test_some_layers_only_and_ranks_that_differ(lora: Path) -> None:
    some = MODULES[:3]
    saved(lora, {"generator_lora": peft(factors(some))})
    merged = merge_lora(transformer(), lora)
    check_merged(merged.transformer, modules=some)
    saved(lora, {"generator_lora": peft(factors(MODULES[:3]) | factors(MODULES[3:5], rank=2))})
    merged = merge_lora(transformer(), lora)
    low_rank = MODULES[3:5]
    for module in MODULES[:5]:
        by_hand = merged_by_hand(module, 1, low_rank, 2) if module in low_rank else merged_by_hand(module, 1, some)
        assert torch.allclose(merged.transformer[f"{module}.weight"], by_hand, atol=1e-5), module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merged_in_float32_and_left_so(lora: Path, dtype: torch.dtype) -> None:
    """Whatever the file is in: rounded once, by who computes with it."""
    base = {name: tensor.to(dtype) for name, tensor in transformer().items()}
    low_rank = factors()
    saved(lora, {"generator_lora": peft(low_rank)})
    merged = merge_lora(base, lora).transformer
    for module in MODULES:
        down, up = (low_rank[f"{module}.lora_{which}.weight"].double() for which in "AB")
        exact = base[f"{module}.weight"].double() + up @ down
        actual = merged[f"{module}.weight"]
        assert actual.dtype == torch.float32
        assert bool(((actual.double() - exact).abs() <= 1e-5).all())
    assert merged["head.head.weight"].dtype == dtype


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
    digests += [digest(merge_lora(base, [(lora, strength)]).transformer) for strength in (0.5, 0)]
    digests.append(digest(merge_lora(base, [lora, lora]).transformer))
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
        (
            lambda t: {k.replace("blocks", "layers"): v for k, v in t.items()},
            "40 of modules that it does not have: layers",
        ),
        (
            lambda t: (
                t | {"mlp.lora_A.weight": t[f"{MODULES[0]}.lora_A.weight"], "mlp.lora_B.weight": torch.ones(24, 4)}
            ),
            "2 of modules that it does not have: mlp.lora_A.weight",
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
        # A rank for which nothing is stored.
        (
            lambda t: (
                t
                | {
                    f"{MODULES[0]}.lora_A.weight": torch.ones(1).expand(10**7, 24),
                    f"{MODULES[0]}.lora_B.weight": torch.ones(1).expand(24, 10**7),
                }
            ),
            "expected tensors as large as what is stored, found",
        ),
        (lambda t: t | {f"{MODULES[0]}.lora_A.weight": torch.ones(0, 24)}, "lora_A.weight [0, 24]"),
        (
            lambda t: (
                t | {f"{MODULES[0]}.lora_A.weight": torch.ones(1, 24), f"{MODULES[0]}.lora_B.weight": torch.ones(24)}
            ),
            "lora_B.weight [24] and",
        ),
        (
            lambda t: (
                t
                | {
                    "patch_embedding.lora_A.weight": torch.ones(2, 63),
                    "patch_embedding.lora_B.weight": torch.ones(24, 2),
                }
            ),
            "expected factors of a weight [24, 16, 1, 2, 2]",
        ),
        (
            lambda t: t | {f"{MODULES[0]}.diff": torch.ones(24)},
            f"expected a difference of {MODULES[0]}.weight [24, 24], found {MODULES[0]}.diff [24]",
        ),
        # Other models.
        (
            lambda t: (
                t
                | {
                    f"{MODULES[0]}.lora_A.weight": torch.ones(RANK, 5120),
                    f"{MODULES[0]}.lora_B.weight": torch.ones(5120, RANK),
                    "blocks.39.self_attn.q.lora_A.weight": torch.ones(RANK, 5120),
                    "blocks.39.self_attn.q.lora_B.weight": torch.ones(5120, RANK),
                }
            ),
            "a LoRA of Wan 14B, 5120 wide, for a model 24 wide",
        ),
        (
            lambda t: (
                t
                | {
                    "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(RANK, 24),
                    "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(24, RANK),
                    "diffusion_model.img_emb.proj.1.diff_b": torch.ones(24),
                }
            ),
            "expected a LoRA of a text-to-video model, found 3 of an image-to-video one: "
            "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight",
        ),
        # Other methods.
        (lambda t: t | {f"{MODULES[0]}.dora_scale": torch.ones(24, 1)}, f"found DoRA: {MODULES[0]}.dora_scale"),
        (lambda t: t | {f"{MODULES[0]}.lora_magnitude_vector.weight": torch.ones(24)}, "found DoRA"),
        (lambda t: {f"lora_unet_{MODULES[0]}.lokr_w1": torch.ones(2, 2)}, "expected a LoRA, found LoKr"),
        (lambda t: {f"{MODULES[0]}.hada_w1_a": torch.ones(2, 2)}, "expected a LoRA, found LoHa"),
        # What is no LoRA.
        (lambda t: t | {f"{MODULES[0]}.lora_A.weight": torch.ones(RANK, 24).int()}, "1 of something else"),
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


def test_of_two_files_the_one_that_is_at_fault_is_named(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt", factors() | {MEMORY_PREFIX + name: tensor for name, tensor in memory().items()})
    bad = saved(tmp_path / "bad.pt", {name.replace("blocks", "layers"): tensor for name, tensor in factors().items()})
    assert f"{bad}: expected changes to this transformer" in refusal(lambda: merge_lora(transformer(), [good, bad]))
    merged = merge_lora(transformer(), [saved(tmp_path / "plain.pt", factors()), good])
    assert merged.memory_path == good and merged.memory is not None
    said = f"{good}: expected one LoRA with a memory encoder, {good} has one too"
    assert said in refusal(lambda: merge_lora(transformer(), [good, (good, 0.5)]))


@pytest.mark.parametrize(
    "wrong", ["", 3, [3], [("l.pt", 1, 2)], [("l.pt", "1")], [("l.pt", True)], [("l.pt", math.nan)]]
)
def test_what_names_no_loras(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be a"):
        merge_lora(transformer(), wrong)


def test_a_scale_beyond_float32(lora: Path) -> None:
    saved(lora, {"generator_lora": peft(factors())})
    assert "found 1e+39 for" in refusal(lambda: merge_lora(transformer(), [(lora, 1e39)]))
    assert "found -2.5e+299 for" in refusal(lambda: merge_lora(transformer(), [(lora, -1.0)], alpha=1e300))


def test_alpha_that_is_no_number(lora: Path) -> None:
    saved(lora, {"generator_lora": peft(factors()), "alpha": "much"})
    assert "expected alpha to be a number above 0, found 'much'" in refusal(lambda: merge_lora(transformer(), lora))


def test_damaged_file(lora: Path) -> None:
    assert "found none" in refusal(lambda: merge_lora(transformer(), lora))
    saved(lora, {"generator_lora": peft(factors())})
    lora.write_bytes(lora.read_bytes()[:-100])
    assert "expected a torch file" in refusal(lambda: merge_lora(transformer(), lora))
