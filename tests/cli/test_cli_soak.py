"""``echo-rt soak``: from arguments to a soak, and from its outcome to an exit code."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import echo_rt.soak
from echo_rt.errors import OutputError
from echo_rt.soak import Limits, Outcome, SoakConfig
from echo_rt.soak.checks import Status, Verdict

REQUIRED = ("soak", "--model", "m", "--out", "o")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the soak was asked for, and what it answers."""
    answers: dict[str, Any] = {
        "outcome": Outcome("complete", 7, [Verdict("a", Status.KEPT, "", "")], Path("o/report.md"))
    }

    def run(config: SoakConfig, **_: object) -> Outcome:
        answers["config"] = config
        outcome = answers["outcome"]
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Outcome)
        return outcome

    monkeypatch.setattr(echo_rt.soak, "run", run, raising=False)
    return answers


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("echo_rt")


def test_the_least_that_can_be_asked(call: Any, asked: dict[str, Any]) -> None:
    done = call(*REQUIRED, "--blocks", 7)
    assert done.code == 0 and asked["config"] == SoakConfig(model=Path("m"), out="o", blocks=7)
    assert done.out.strip() == "complete after 7 blocks; promises: 1 kept, 0 broken, 0 not checked; o/report.md"


def test_all_that_can_be_asked(call: Any, asked: dict[str, Any]) -> None:
    text = (
        "--hours 24 --checkpoint c --lora l --no-ema --memory prior --dtype float8 --float8-except a "
        "--float8-except b --device cpu --backend torch "
        "--size 832x480 "
        "--set denoising_steps=1000,500 --set sink_frames=3 --prompt 'a fox' --prompt 'a lake' --switch-every 30 "
        "--seed 9 --snapshot-every 500 --keep 2 --interval 2.5 --hash-every 10 --port 0.0.0.0:9000 --no-plots --quiet "
        "--warmup-blocks 20 --device-growth 512 --host-slope off --host-slack 1e6 --latency-ratio 1.2 "
        "--latency-zscore off --outliers 0.01 --drift 0.3 --roll-back --block-seconds 5 --attention sdpa --lookahead 2 "
        "--no-graphs --vae tiny --vae-dtype float32 --linear torch --convolution conv3d,phases"
    )
    assert call(*REQUIRED, *shlex.split(text)).code == 0
    assert asked["config"] == SoakConfig(
        model=Path("m"),
        out="o",
        hours=24.0,
        checkpoint="c",
        lora=((Path("l"), 1.0),),
        ema=False,
        memory="prior",
        vae="tiny",
        dtype="float8",
        float8_except=("a", "b"),
        vae_dtype="float32",
        device="cpu",
        backend="torch",
        attention="sdpa",
        linear="torch",
        convolution="conv3d,phases",
        lookahead=2,
        graphs=False,
        width=832,
        height=480,
        overrides={"denoising_steps": [1000, 500], "sink_frames": 3},
        prompts=("a fox", "a lake"),
        switch_every=30,
        seed=9,
        interval=2.5,
        hash_every=10,
        snapshot_every=500,
        keep=2,
        roll_back=True,
        block_seconds=5.0,
        limits=Limits(
            warmup_blocks=20,
            device_growth=512.0,
            host_slope=None,
            host_slack=1e6,
            latency_ratio=1.2,
            latency_zscore=None,
            outliers=0.01,
            drift=0.3,
        ),
        serve=("0.0.0.0", 9000),
        plots=False,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of --blocks and --hours, got none"),
        ("--hours 1 --blocks 2", "expected one of --blocks and --hours, got both"),
        ("--hours 0", "--hours: expected a number above 0, got '0'"),
        ("--blocks 1.5", "--blocks: expected an integer of 1 or more, got '1.5'"),
        ("--blocks 9 --keep 2", "--keep: expected --snapshot-every N with it"),
        ("--blocks 9 --interval nan", "--interval: expected a number above 0"),
        ("--blocks 9 --prompt a --prompt 10:b --switch-every 3", "--prompt '10:b': expected a text without a time"),
        ("--blocks 9 --switch-every 3", "exactly where there are several --prompt; got 1 of them and --switch-every 3"),
        ("--blocks 9 --port 70000", "--port: expected PORT or ADDRESS:PORT with a port in 1..65535, got '70000'"),
        ("--blocks 9 --port x", "--port: expected PORT or ADDRESS:PORT with a port in 1..65535, got 'x'"),
        (
            "--blocks 9 --latency-ratio 0.9",
            "--latency-ratio: expected a number of 1 or more, or 'off', or 'auto'",
        ),
        ("--blocks 9 --outliers 1.5", "--outliers: expected a number of 0 or more and at most 1, got '1.5'"),
        ("--blocks 9 --lookahead 101", "--lookahead: expected an integer in 0..100, got '101'"),
        ("--blocks 9 --host-slack off", "--host-slack: expected a number of 0 or more, got 'off'"),
        ("--blocks 9 --warmup-blocks 1.5", "--warmup-blocks: expected an integer of 0 or more, got '1.5'"),
        ("--blocks 9 --drift auto", "--drift: expected a number of 0 or more, or 'off', got 'auto'"),
        ("--blocks 9 --latency-ratio x", "--latency-ratio: expected a number of 1 or more, or 'off', or 'auto', got"),
        ("--blocks 9 --ema", "--ema: expected --checkpoint FILE with it"),
        ("--blocks 9 --set size=3", "--set: expected NAME=VALUE"),
        ("--blocks 9 --seed -1", "--seed: expected"),
    ],
)
def test_mistakes(text: str, message: str, call: Any, asked: dict[str, Any]) -> None:
    done = call(*REQUIRED, *shlex.split(text))
    assert done.code == 2 and message in done.error and "config" not in asked


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "--out: expected a folder apart from what is read, got 'model', which belongs to --model model"),
        ("model/day", "got 'model/day', which belongs to --model model"),
        (".", "--out: expected a folder apart from what is read, got '.', which holds --model model"),
        ("vae.pth", "got 'vae.pth', which belongs to --vae vae.pth"),
        ("absent/day", "absent/day: expected a folder to write into, got no folder absent to make it in"),
    ],
)
def test_a_place_that_is_not_the_soaks_own(
    out: str, message: str, call: Any, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    done = call("soak", "--model", "model", "--vae", "vae.pth", "--blocks", 7, "--out", out)
    assert done.code == 2 and message in done.error and "config" not in asked
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_a_broken_promise(call: Any, asked: dict[str, Any]) -> None:
    asked["outcome"] = Outcome(
        "complete", 7, [Verdict("hashes", Status.BROKEN, "same", "block 3")], Path("r"), "torch", "as in the snapshot"
    )
    done = call(*REQUIRED, "--blocks", 7, "--json")
    assert done.code == 3 and done.json["exit_code"] == 3
    assert (done.json["backend"], done.json["backend_reason"]) == ("torch", "as in the snapshot")
    assert done.json["promises"] == [{"promise": "hashes", "status": "broken", "limit": "same", "evidence": "block 3"}]


def test_a_stream_that_fails(call: Any, asked: dict[str, Any]) -> None:
    asked["outcome"] = Outcome("failed", 7, [], Path("r"), failure="NumericalError: block 7")
    done = call(*REQUIRED, "--blocks", 9)
    assert done.code == 4 and done.error == "NumericalError: block 7"


def test_a_full_disk(call: Any, asked: dict[str, Any]) -> None:
    asked["outcome"] = OutputError("o/soak.jsonl: cannot write: No space left on device")
    done = call(*REQUIRED, "--blocks", 9)
    assert done.code == 1 and "No space left" in done.error


def test_files_that_may_not_be_as_long_as_a_snapshot(call: Any, small_model: Path, tmp_path: Path) -> None:
    """For real: a limit of the system ends the soak, what is there is whole, and without the limit it goes on."""
    out = tmp_path / "out"
    model = ["--model", str(small_model), "--checkpoint", str(small_model / "echo_infinity.pt"), "--device", "cpu"]
    soak = ["soak", *model, "--out", str(out), "--blocks", "6", "--quiet", "--no-plots"]
    soak += ["--snapshot-every", "2", "--hash-every", "1"]
    command = shlex.join([sys.executable, "-m", "echo_rt", *soak])
    limited = subprocess.run(["bash", "-c", f"ulimit -f 64; exec {command}"], capture_output=True, text=True)
    assert limited.returncode == 1, limited.stderr
    assert "error" in limited.stderr and "File too large" in limited.stderr and "Traceback" not in limited.stderr
    lines = [json.loads(line) for line in (out / "soak.jsonl").read_text().splitlines()]
    assert lines[0]["block"] == 1 and lines[-1]["end"] == "failed" and "File too large" in lines[-1]["problem"]
    assert "File too large" in (out / "report.md").read_text()
    assert not list((out / "snapshots").glob("*.safetensors"))
    free = call(*soak)
    assert free.code == 0, free.err
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 3


def test_help_needs_no_torch() -> None:
    code = "import sys; import echo_rt.cli.main, echo_rt.cli.soak; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
