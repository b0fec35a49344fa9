"""A whole block, measured on the CPU: what is compared, in which order, and the arithmetic of what is reported."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_cuda import refuse_capture
from torch import Tensor
from virtual_gpu.names import active

from echo_rt.bench import run as run_module
from echo_rt.bench import settings as settings_module
from echo_rt.bench.report import ALONE, Report
from echo_rt.bench.run import DEVICE_CLOCK, Model, Run, open_model
from echo_rt.bench.runner import BlockRunner
from echo_rt.bench.settings import BenchModel, Request, plan, turns_of
from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig, WindowConfig
from echo_rt.engine.build import Networks
from echo_rt.errors import BackendError, CaptureError, ConfigError
from echo_rt.ops import backends as ops_module
from echo_rt.ops import reference
from echo_rt.options import MemoryMode
from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model

ROUNDS, BLOCKS = 2, 2
SMALLEST = BenchModel(
    "tiny",
    ModelConfig(
        TransformerConfig(dim=128, ffn_dim=128, freq_dim=32, num_heads=2, num_layers=1, text_dim=16, text_len=4),
        latent_height=2,
        latent_width=2,
        window=WindowConfig(local_frames=3, max_temporal_id=8),  # full, and saturated, after three blocks
        memory=MemoryConfig(),
    ),
    VaeConfig(base_dim=4, num_res_blocks=1),
)
ASKED_OF_TORCH = {"device": "cpu", "dtype": "bfloat16", "backend": "torch"}
ASKED = {"device": "cpu", "dtype": "bfloat16", "backend": "emulated"}


def _load(broken: bool) -> Any:
    """Backends: ``emulated`` is the definition under that name, or one that goes wrong by a hundredth."""

    def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
        reference.flow_step(x, flow, sigmas, noise)
        x.mul_(1.1)

    changes = {"flow_step": flow_step} if broken else {}
    other = SimpleNamespace(**{**vars(reference), "name": "emulated", **changes})
    return lambda backend: reference if backend == "torch" else other


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        context.setitem(settings_module.MODELS, "tiny", SMALLEST)
        yield context


@pytest.fixture(scope="module")
def turns() -> list[tuple[BlockRunner, int]]:
    return []


@pytest.fixture(scope="module")
def saved() -> list[tuple[dict[str, Any], str]]:
    """What was there to be written whenever more was known."""
    return []


@pytest.fixture(scope="module")
def measured(
    patch: pytest.MonkeyPatch, turns: list[tuple[BlockRunner, int]], saved: list[tuple[dict[str, Any], str]]
) -> Run:
    turn = BlockRunner.turn

    def noted(runner: BlockRunner, lookahead: int, *rest: Any) -> None:
        turns.append((runner, lookahead))
        turn(runner, lookahead, *rest)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(ops_module, "load_ops", _load(broken=False))
        context.setattr(BlockRunner, "turn", noted)
        request = Request(variants=("evolve", "off", "torch"), rounds=ROUNDS, blocks=BLOCKS, **ASKED)
        return Run(request).measure(lambda found: saved.append(copy.deepcopy(Report(found).content())))


@pytest.fixture(scope="module")
def content(measured: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is in block.json, read by a strict reader."""
    folder = tmp_path_factory.mktemp("out")
    files = Report(measured).write(folder / "new", picture=True)
    assert sorted(path.name for path in (folder / "new").iterdir()) == sorted(path.name for path in files)
    assert [path.name for path in files] == ["block.json", "block.md", "block.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    page = files[1].read_text()
    assert "a rehearsal, no results" in page and "## Goals" not in page
    assert "Convolutions of the decoder: conv3d for " in page
    found: dict[str, Any] = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert {way["name"] for way in found["convolutions"].values()} == {"conv3d", "enlarged"}
    return found


@pytest.fixture(scope="module")
def as_on_a_gpu(measured: Run) -> dict[str, Any]:
    """What the report would say had a GPU told these times."""
    on_gpu = copy.copy(measured)
    on_gpu.clock, on_gpu.on_gpu = DEVICE_CLOCK, True
    return Report(on_gpu).content()[0]


def test_rows_are_those_of_the_samples(content: dict[str, Any]) -> None:
    rows = content["tables"]["Block"]
    assert {row["variant"] for row in rows} == {"evolve", "off", "torch"} == set(content["milliseconds"])
    assert content["frames_per_block"] == 12
    for row in rows:
        sample = content["milliseconds"][row["variant"]][row["part"]]
        assert len(sample) == row["blocks"] == ROUNDS * BLOCKS and min(sample) > 0, row
        assert row["ms"] == pytest.approx(statistics.median(sample)) and row["p99_ms"] == pytest.approx(max(sample))
        assert row["fps"] is None, "a rate of a rehearsal"
        torchs = content["milliseconds"]["torch"][row["part"]]
        ratio = None if row["variant"] == "torch" else pytest.approx(statistics.median(torchs) / row["ms"])
        assert row["x_torch"] == ratio


def test_every_part_of_a_block_is_there(content: dict[str, Any]) -> None:
    parts = {variant: list(samples) for variant, samples in content["milliseconds"].items()}
    beside = [f"beside each other: {lane}" for lane in ("transformer, all passes", "VAE decode")]
    whole = [ALONE, *beside, "whole block, 1 begun ahead"]
    assert parts["evolve"] == parts["torch"] == ["transformer, all passes", "memory update", "VAE decode", *whole]
    assert parts["off"] == ["transformer, all passes", "VAE decode", *whole]
    for samples in content["milliseconds"].values():
        # One at a time on one host: the whole is the sum of what happens in it, and a little.
        pieces = zip(samples["transformer, all passes"], samples["VAE decode"], samples[ALONE], strict=True)
        assert all(transformer + decode < block for transformer, decode, block in pieces)


def test_what_was_measured_was_right_and_says_so(content: dict[str, Any]) -> None:
    assert content["passed"] is True and content["result"] is False and "no result" in content["clock"]
    assert (content["backend"], content["backend_reason"]) == ("emulated", "asked for by name")
    rows = {row["variant"]: row for row in content["tables"]["Variants"]}
    for row in rows.values():
        assert (row["latents_error"], row["frames_error"], row["bound"]) == (0.0, 0.0, pytest.approx(0.03))
        assert row["verdict"] == "right, measured" and 0 <= row["idle"] < 1 and row["joules_a_frame"] is None
    assert [rows[name]["backend"] for name in ("evolve", "off", "torch")] == ["emulated", "emulated", "torch"]
    assert [rows[name]["memory"] for name in ("evolve", "off", "torch")] == ["evolve", "off", "evolve"]
    assert content["absent"] == {
        "prior": "not asked for",
        "no-graphs": "not asked for",
    }


def test_what_is_known_is_saved_at_once(measured: Run, saved: list[tuple[dict[str, Any], str]]) -> None:
    """A run that is killed has told its first number, and that it is one."""
    verdicts = [[row["verdict"] for row in content["tables"]["Variants"]] for content, _ in saved]
    unknown, unmeasured = "not yet held against torch, not yet measured", "right, not yet measured"
    assert verdicts[0] == ["not yet held against torch, measured", unknown, unknown]
    assert verdicts[1] == ["right, measured", unmeasured, unmeasured]
    assert verdicts[2:] == [["right, measured"] * 3] * ROUNDS
    assert {row["variant"] for row in saved[0][0]["tables"]["Block"]} == {"evolve"}
    for content, page in saved:
        assert content["complete"] is content["passed"] is False and "Not complete" in page
    assert measured.complete and "Not complete" not in Report(measured).content()[1]


def test_variants_take_turns(measured: Run, turns: list[tuple[BlockRunner, int]], content: dict[str, Any]) -> None:
    """In every round each variant has both its turns, and each is first once before one is first again."""
    alone, *rounds = turns[:2], turns[2:8], turns[8:]
    assert [runner for runner, _ in alone] == [turns[2][0]] * 2  # the first number there is
    runners = [rounds[0][place][0] for place in (0, 2, 4)]
    assert [runner.mode.value for runner in runners] == ["evolve", "off", "evolve"]
    assert rounds[0] == [(runner, lookahead) for runner in runners for lookahead in (0, 1)]
    assert rounds[1] == [(runner, lookahead) for runner in (runners[1], runners[2], runners[0]) for lookahead in (0, 1)]
    names = ["evolve", "off", "torch", *(each.name for each in measured.baselines if each.ok)]
    assert content["order"] == [names, [*names[1:], names[0]]]
    assert turns_of(5, ["a", "b", "c"]) == ["c", "a", "b"] and turns_of(3, []) == []


def test_others_code_computes_the_same_and_is_named_where_it_is_not(content: dict[str, Any]) -> None:
    rows = {row["peer"]: row for row in content["tables"]["Peers"]}
    row = rows["diffusers AutoencoderKLWan"]
    assert 0 < row["error"] < 0.1 and "mid-stream" in row["what"]
    decode = next(row for row in content["tables"]["Block"] if row["part"] == "VAE decode")
    assert row["ours_ms"] == decode["ms"] and row["ratio"] == pytest.approx(row["ms"] / row["ours_ms"])
    assert len(content["peer_milliseconds"]["diffusers AutoencoderKLWan"]) == ROUNDS * BLOCKS
    assert rows["FlashDreams"]["ms"] is None and "flashdreams" in rows["FlashDreams"]["what"]


def test_results_have_rates(as_on_a_gpu: dict[str, Any]) -> None:
    for row in as_on_a_gpu["tables"]["Block"]:
        sample = as_on_a_gpu["milliseconds"][row["variant"]][row["part"]]
        assert row["fps"] == pytest.approx(12 / statistics.median(sample) * 1e3)


def test_goals_are_judged_where_a_checkout_has_them(
    measured: Run, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU, at the released sizes; the figures are those of the memory that evolves."""
    judged = copy.copy(measured)
    judged.on_gpu = True
    judged.resources = measured.resources | {"growth": 0, "peak": 13e9}
    monkeypatch.setattr(run_module, "RELEASED", SMALLEST)
    rows = Report(judged).content()[0]["tables"]["Goals"]
    goals = {row["goal"].partition(":")[0]: row for row in rows}
    evolve, off = (
        statistics.median(content["milliseconds"][name]["whole block, 1 begun ahead"]) for name in ("evolve", "off")
    )
    assert goals["whole block, bfloat16"]["value"] == pytest.approx(evolve)
    assert goals["video frames a second"]["value"] == pytest.approx(12e3 / evolve)
    assert goals["memory against no memory"]["value"] == pytest.approx(100 * (evolve / off - 1))
    of_memory = [goals[f"{what} of device memory"] for what in ("growth", "peak")]
    assert [(row["value"], row["verdict"]) for row in of_memory] == [(0, "met"), (13, "unmet")]
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    assert "Goals" not in Report(judged).content()[0]["tables"], "a package that was installed without a checkout"


def test_a_backend_that_is_wrong_is_not_timed(patch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(ops_module, "load_ops", _load(broken=True))
        request = Request(variants=("off", "torch"), rounds=1, blocks=1, peers=False, **ASKED)
        found = Run(request, said.append).measure()
    assert not found.passed and [entry.variant.name for entry in found.measured] == ["torch"]
    wrong, right = found.entries
    assert wrong.errors is not None and wrong.errors[0] > found.bound and not wrong.samples
    assert right.errors == (0.0, 0.0)
    content, page = Report(found).content()
    assert {row["variant"] for row in content["tables"]["Block"]} == {"torch"} and "differs from the torch" in page
    assert any("off: differs" in line for line in said)
    assert {row["what"] for row in content["tables"]["Peers"]} == {"left out by --no-peers"}


@pytest.mark.parametrize("at", ["_alone", "ready", "_held_against", "_variant_turn"])
def test_where_graphs_fail_the_variant_is_measured_without(
    at: str, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the capture was. The numbers are there, and so is what happened, in the exit code too."""
    work, name = getattr(Run, at), "evolve" if at == "_alone" else "off"

    def fail(*given: Any) -> Any:
        if given[-1].variant.name == name and given[-1].graphs:
            work(*given)  # what was made and timed until then is not kept
            raise CaptureError("Rollout._denoise", "not now")
        return work(*given)

    made: list[tuple[MemoryMode, bool | None]] = []

    class Noted(BlockRunner):
        def __init__(self, networks: Networks, mode: MemoryMode, *, graphs: bool | None, depth: int) -> None:
            made.append((mode, graphs))
            super().__init__(networks, mode, graphs=graphs, depth=depth)

    said: list[str] = []
    monkeypatch.setattr(run_module, "BlockRunner", Noted)
    monkeypatch.setattr(Run, at, fail)
    request = Request(variants=("evolve", "off"), rounds=1, blocks=1, peers=False, **ASKED_OF_TORCH)
    found = Run(request, said.append).measure()
    content, page = Report(found).content()
    assert len(found.measured) == 2 and found.passed is False is content["passed"]
    failed = {row["variant"]: row["graphs_failed"] for row in content["tables"]["Variants"]}
    assert failed == {"evolve": None, "off": None} | {name: "Rollout._denoise: not now"}
    assert f"GRAPHS FAILED in variant {name}, whose times are without them: Rollout._denoise: not now." in page
    assert page.count("measured without graphs, which failed") == 1
    assert any(f"{name}: graphs failed in Rollout._denoise: not now" in line for line in said)
    mode = next(entry.mode for entry in found.entries if entry.variant.name == name)
    assert (mode, False) in made
    assert {len(sample.whole) for entry in found.entries for sample in entry.samples.values()} == {1}


def test_no_graphs_is_for_all_variants(patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(variants=("off",), rounds=1, blocks=1, peers=False, graphs=False, **ASKED_OF_TORCH)
    found = Run(request).measure()
    assert found.passed and [entry.graphs for entry in found.entries] == [False]
    chosen, absent = plan(None, has_memory=True, no_graphs="--no-graphs was given", backend="torch")
    assert [variant.name for variant in chosen] == ["evolve", "prior", "off"]
    assert absent["no-graphs"] == "--no-graphs was given, so no variant has any"


def test_a_folder_is_measured_as_a_runtime_would_load_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny", width=32, height=32)
    facts = {"model": str(tmp_path / "tiny"), "device": "cpu"}
    device = torch.device("cpu")
    plain = open_model(Request(**facts), device)
    assert not plain.released and plain.config.memory is None
    whole = open_model(Request(checkpoint=str(tmp_path / "tiny" / CHECKPOINT_FILE), **facts), device)
    assert len(whole.tensors.memory) and whole.config.memory_tokens == 3 * whole.config.tokens_per_frame
    name = "blocks.0.self_attn.q.weight"
    assert not torch.equal(plain.tensors.transformer[name].float(), whole.tensors.transformer[name].float())
    with pytest.raises(ConfigError, match="variant 'evolve' cannot be measured: the weights have no memory encoder"):
        Run(Request(variants=("evolve",), **facts))


def test_what_is_asked_of_the_decoder_is_not_asked_of_what_it_is_held_against(
    patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    networks = Model.networks

    def kept(*given: Any) -> Networks:
        made.append(networks(*given))
        return made[-1]

    monkeypatch.setattr(ops_module, "load_ops", _load(broken=False))
    monkeypatch.setattr(Model, "networks", kept)
    higher = replace(SMALLEST, config=replace(SMALLEST.config, latent_height=6))  # bands need some rows
    monkeypatch.setitem(settings_module.MODELS, "tiny", higher)
    asked = {"convolution": "three-products,phases", "vae_tiles": 2, "variants": ("off",), "rounds": 1, "blocks": 1}
    asked["attention"] = "products"  # is of the model, whichever the backend
    found = Run(Request(**asked, **ASKED, peers=False)).measure()
    named = {parts.ops.name: {choice.name for choice in parts.convolutions.values()} for parts in made}
    assert found.passed and named == {"torch": {"conv3d", "enlarged"}, "emulated": {"three-products", "phases"}}
    assert {parts.ops.name: parts.decoder.tiles for parts in made} == {"torch": 1, "emulated": 2}
    assert "bands of rows" in Report(found).content()[1]
    assert {choice.name for choice in found.convolutions.values()} == named["emulated"]
    assert {parts.ops.name: parts.vae_attention.name for parts in made} == dict.fromkeys(named, "products")


def test_each_attention_is_said(measured: Run) -> None:
    facts, page = Report(measured).content()
    assert [choice["name"] for choice in facts["attention"]] == ["sdpa"] * 3
    for what in ("over the cache", "over the text", "of the decoder"):
        assert f"Attention {what}: sdpa, torch's own on a CPU." in page


def test_a_model_without_a_steady_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_rt.bench.runner._MOST_BLOCKS", 2)
    monkeypatch.setitem(settings_module.MODELS, "tiny", SMALLEST)
    with pytest.raises(ConfigError, match="a steady state to measure, and there was none within 2 blocks"):
        Run(Request(device="cpu", backend="torch", variants=("off",))).measure()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"size": "tiny", "model": "m"}, "--size and --model: expected one of them, got both"),
        ({"checkpoint": "f"}, "--checkpoint: expected --model DIR with it"),
        ({"seed": -1}, "seed"),
        ({"device": "cpu", "size": "released"}, "the released sizes need a GPU, .* use 'tiny'"),
        ({"device": "cpu", "variants": ("prior", "fast")}, "--variants: expected some of evolve, .*; got fast"),
        ({"device": "cpu", "variants": ()}, "--variants: expected some of evolve, .*; got none"),
        ({"device": "cpu", "variants": ("no-graphs",)}, "cannot be measured: there are no graphs on a CPU"),
        ({"device": "cpu", "variants": ("torch",)}, "cannot be measured: the backend of all variants is torch"),
    ],
)
def test_requests_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], words: str) -> None:
    monkeypatch.delenv("ECHO_RT_BACKEND", raising=False)
    with pytest.raises(ConfigError, match=words) as error:
        Run(Request(**facts))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"dtype": "float8", "float8_except": ("none",)}, "'none' matches no layer that can be float8"),
        ({"float8_except": ("*.ffn.2",)}, "float8_except is for dtype 'float8', and the dtype is 'float32'"),
        ({"dtype": "float32", "backend": "emulated", "variants": ("off", "evolve")}, "updates the memory in bfloat16"),
    ],
)
def test_what_no_variant_can_compute_in_is_told_before_any_is_made(
    patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], words: str
) -> None:
    def begin(*_: object) -> None:
        pytest.fail("a trial of attention, or networks, would take minutes on a GPU")

    monkeypatch.delenv("ECHO_RT_BACKEND", raising=False)
    monkeypatch.setattr(ops_module, "load_ops", _load(broken=False))
    monkeypatch.setattr(Model, "networks", begin)
    with pytest.raises((ConfigError, BackendError), match=words):
        Run(Request(device="cpu", **facts))


def test_a_gpu_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 8 * 2**30))
    monkeypatch.setattr(Run, "_measure", full)
    with pytest.raises(BackendError, match=r"1\.0 of 8\.0 GiB were free .* --variants"):
        Run(Request(variants=("off",), **ASKED_OF_TORCH)).measure()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*needs nvidia-ml-py:RuntimeWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_measured_by_its_own_clock() -> None:
    found = Run(Request(size="tiny", device="cuda", backend="torch", rounds=2, blocks=3)).measure()
    assert found.clock == DEVICE_CLOCK and found.passed
    assert [entry.variant.name for entry in found.entries] == ["evolve", "prior", "off", "no-graphs"]
    assert found.resources["growth"] == 0 and 0 < found.resources["device"] <= found.resources["peak"]
    for entry in found.entries:
        for sample in entry.samples.values():
            assert 0 <= sample.idle < 1 and len(sample.whole) == 6 and min(sample.whole) > 0
            assert (min(sample.memory) > 0) is (entry.mode is MemoryMode.EVOLVE)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*its figures are left out:RuntimeWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_whose_graphs_fail_is_measured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what CUDA forbids amid a capture; the process can go on, another variant with graphs among it."""
    refuse_capture(monkeypatch, "Rollout._update_memory", amid=lambda: torch.cuda.current_stream().synchronize())
    request = Request(size="tiny", device="cuda", backend="torch", variants=("evolve", "off"), rounds=1, blocks=2)
    found = Run(request).measure()
    assert not found.passed and len(found.measured) == 2
    assert {entry.variant.name: entry.graphs for entry in found.entries} == {"evolve": False, "off": True}
    assert "Rollout._update_memory: " in found.entries[0].graphs_failed
    if active():
        from virtual_gpu.device import device

        assert device().take_complaints() == ["cudaStreamSynchronize of a capturing stream"]
