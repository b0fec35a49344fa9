"""``echo-rt bench``: from arguments to a run, and from a run to files, JSON and an exit code."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echo_rt.bench import settings, tables
from echo_rt.bench.run import Run
from echo_rt.bench.settings import BenchModel, Request
from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig, WindowConfig
from echo_rt.errors import BackendError

SMALLEST = BenchModel(
    "tiny",
    ModelConfig(
        TransformerConfig(dim=24, ffn_dim=16, freq_dim=8, num_heads=2, num_layers=1, text_dim=8, text_len=4),
        latent_height=2,
        latent_width=2,
        window=WindowConfig(local_frames=3, max_temporal_id=8),  # full, and saturated, after three blocks
        memory=MemoryConfig(),
    ),
    VaeConfig(base_dim=2, num_res_blocks=1),
)


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("echo_rt")


@pytest.fixture(scope="module")
def smallest_run() -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.MODELS, "tiny", SMALLEST)
        patch.delenv("ECHO_RT_BACKEND", raising=False)
        return Run(Request(device="cpu", variants=("off",), rounds=1, blocks=1, peers=False)).measure()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, smallest_run: Run) -> list[Request]:
    """What was asked for; what is answered is the smallest run there is."""
    requests: list[Request] = []

    def begin(run: Run, request: Request, say: Any) -> None:
        say("round 1 of 1")
        requests.append(request)

    monkeypatch.setattr(Run, "__init__", begin)
    monkeypatch.setattr(Run, "measure", lambda run, save: smallest_run)
    return requests


def test_the_least_that_can_be_asked(call: Any, asked: list[Request]) -> None:
    done = call("bench")
    assert done.code == 0 and asked == [Request()]
    assert done.out.startswith("# A whole block") and "| off " in done.out and "rehearsal" in done.out
    assert done.err == "echo-rt: round 1 of 1\n"


def test_all_that_can_be_asked(call: Any, asked: list[Request], tmp_path: Path) -> None:
    text = (
        "--model m --checkpoint c --lora l --lora k:2 --no-ema --convolution conv3d,phases --vae-tiles 2 --no-graphs "
        "--dtype float8 --float8-except *.ffn.2 --device cpu --backend torch "
        "--attention sdpa --linear torch --seed 9 "
        "--variants evolve,off --lookahead 2 --rounds 3 --blocks 4 --no-peers --no-chart"
    )
    done = call("bench", *shlex.split(text), "--out", tmp_path / "new" / "deep")
    assert done.code == 0 and asked == [
        Request(
            model="m",
            checkpoint="c",
            lora=((Path("l"), 1.0), (Path("k"), 2.0)),
            ema=False,
            convolution="conv3d,phases",
            vae_tiles=2,
            graphs=False,
            device="cpu",
            dtype="float8",
            float8_except=("*.ffn.2",),
            backend="torch",
            attention="sdpa",
            linear="torch",
            variants=("evolve", "off"),
            rounds=3,
            blocks=4,
            lookahead=2,
            peers=False,
            seed=9,
        )
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == ["block.json", "block.md"]
    assert (tmp_path / "new" / "deep" / "block.md").read_text() == done.out


def test_json_is_what_the_file_has(call: Any, asked: list[Request], tmp_path: Path) -> None:
    done = call("bench", "--size", "tiny", "--json", "--chart", "--out", tmp_path)
    assert done.code == 0 and asked == [Request(size="tiny")]
    written = json.loads((tmp_path / "block.json").read_text())
    files = [str(tmp_path / f"block.{end}") for end in ("json", "md", "png")]
    assert done.json == {**written, "files": files, "exit_code": 0}
    assert written["passed"] is True and written["tables"]["Block"][0]["variant"] == "off"
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_variant_is_in_the_exit_code(
    call: Any, asked: list[Request], smallest_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smallest_run.entries[0], "problem", "differs")
    done = call("bench", "--json")
    assert done.code == 1 and done.json["passed"] is False and done.json["exit_code"] == 1
    assert done.json["tables"]["Block"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rounds 0", "--rounds: expected an integer of 1 or more, got '0'"),
        ("--blocks many", "--blocks: expected an integer of 1 or more, got 'many'"),
        ("--lookahead -1", "--lookahead: expected an integer in 0..100, got '-1'"),
        ("--seed x", "--seed: expected an integer in 0..2^64-1, got 'x'"),
        ("--size huge", "--size: 'huge' is not one of"),
        ("--size tiny --model m", "--size and --model: expected one of them, got both"),
        (
            "--variants evolve,fast --device cpu",
            "--variants: expected some of evolve, prior, off, no-graphs, torch; got fast",
        ),
        ("--variants evolve, --device cpu", "torch; got ''"),
        ("--size released --device cpu", "--size: the released sizes need a GPU"),
        ("--lookahead 101", "--lookahead: expected an integer in 0..100, got '101'"),
        ("--checkpoint f", "--checkpoint: expected --model DIR with it"),
        ("--lora f", "--lora: expected --model DIR with it"),
        ("--no-ema", "--ema: expected --checkpoint FILE with it"),
        ("--convolution magic --device cpu", "convolution must be one of conv3d, "),
        ("--vae-tiles 0", "--vae-tiles: expected an integer of 1 or more, got '0'"),
        ("--vae-tiles 99 --device cpu", "vae_tiles: expected 1 for latents 4 rows high, got 99"),
        ("--model /no/such/folder --device cpu", "/no/such/folder"),
        ("--attention magic --device cpu", "magic"),
        ("--linear magic --device cpu", "linear must be one of torch, cublaslt-1, "),
        ("--backend magic --device cpu", "magic"),
        ("--backend= --device cpu", "backend must be one of torch, emulated, cuda; got ''"),
        ("--chart", "--chart: expected --out DIR"),
    ],
)
def test_mistakes_are_told_in_one_line(call: Any, arguments: str, words: str) -> None:
    done = call("bench", *shlex.split(arguments.replace("--lookahead -1", "--lookahead=-1")))
    assert done.code == 2 and words in done.error and done.out == ""


def test_what_cannot_be_written_is_known_before_the_run(call: Any, asked: list[Request], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("bench", "--out", tmp_path / "file" / "deep")
    assert done.code == 2 and "got a file in its place" in done.error and not asked
    (tmp_path / "block.json").mkdir()
    done = call("bench", "--out", tmp_path)
    assert done.code == 2 and "block.json" in done.error and not asked


def test_results_lie_apart_from_the_model(call: Any, asked: list[Request], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for out in (tmp_path / "model", tmp_path / "model" / "new"):
        done = call("bench", "--model", tmp_path / "model", "--out", out)
        assert done.code == 2 and "--out: expected a folder apart from what is read" in done.error and not asked
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_without_matplotlib_a_chart_is_refused_and_the_rest_written(
    call: Any, asked: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "can_draw", lambda: False)
    done = call("bench", "--out", tmp_path, "--chart")
    assert done.code == 2 and "pip install 'echo-rt[bench]'" in done.error and not asked
    assert call("bench", "--out", tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.json", "block.md"]


def test_a_run_that_fails_writes_nothing(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Run:
        raise BackendError("too little memory")

    monkeypatch.setattr(Run, "measure", fail)
    done = call("bench", "--out", tmp_path, "--json")
    assert done.code == 2 and done.json == {"error": "too little memory", "exit_code": 2}
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch() -> None:
    code = "import sys; import echo_rt.cli.main, echo_rt.cli.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_help_names_what_there_is(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call("bench", "--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "evolve, prior, off, no-graphs, torch" in out and "--lookahead" in out
