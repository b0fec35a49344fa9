"""bench/golden.py and what the small scripts of bench say of mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import find_bundles, refusal, verify

ROOT = Path(__file__).parent.parent.parent


def test_a_bundle_that_is_off_is_seen(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(golden_dir / "vae", "cpu", "torch", "float32")["ok"]
    assert refusal(golden_dir / "rollout_small", "cpu", "emulated", "float32")
    assert not refusal(golden_dir / "rollout_small", "cpu", "emulated", "bfloat16")
    assert not refusal(golden_dir / "vae", "cuda", "cuda", "float32")
    assert not refusal(golden_dir / "rollout_small", "cpu", "emulated", "float8")
    bundle = tmp_path / "elsewhere" / "vae"
    shutil.copytree(golden_dir / "vae", bundle)
    (bundle / "config.json").write_text((bundle / "config.json").read_text() + "\n")
    (bundle / "weights.safetensors").write_bytes(b"no")
    monkeypatch.setenv("ECHO_RT_GOLDEN", str(tmp_path / "elsewhere"))
    assert bundle in find_bundles(small=False) and bundle not in find_bundles(small=True)
    result = verify(bundle, "cpu", "torch", "float32")
    assert not result["ok"] and "weights.safetensors" in result["note"]


@pytest.mark.parametrize(("capability", "old"), [((8, 6), True), ((8, 9), False)])
def test_a_gpu_that_does_not_multiply_float8_must_refuse_it(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], old: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    bundle, reason = golden_dir / "text_encoder", "float8 needs compute capability 8.9, this GPU has 8.6"
    assert refusal(bundle, "cuda:0", "torch", "float8") == (reason if old else "")
    assert refusal(bundle, "cuda:0", "torch", "bfloat16") == ""
    if old:
        result = verify(bundle, "cuda:0", "torch", "float8")
        assert result["ok"] and result["note"] == f"refused, as it must be: {reason}"
        monkeypatch.setattr("echo_rt.utils.device.require_products", lambda device: None)
        monkeypatch.setattr("echo_rt.verify.bundles.parse_device", lambda device: torch.device("cpu"))
        result = verify(bundle, "cuda:0", "torch", "float8")
        assert not result["ok"] and result["note"] == f"expected a refusal of float8 ({reason}), it ran"


MISTAKES = [
    (["golden.py", "--device", "gpu"], "golden.py: device must be 'cpu', 'cuda' or 'cuda:N'; got 'gpu'"),
    (["golden.py", "--device", "cuda:99"], "golden.py: device 'cuda:99' was asked for, but "),
    (["golden.py", "--out", "x" * 300], "x: cannot be a folder: File name too long"),
    (["environment.py", "--device", "gpu"], "environment.py: device must be 'cpu', 'cuda' or 'cuda:N'; got 'gpu'"),
    (["golden.py", "--out="], "argument --out: expected a path, got ''"),
    (["registers.py", "absent"], "absent: expected a log of nvcc -Xptxas -v, cannot read it: No such file or dir"),
]
# Each in a fork of a process that has imported what takes long: its code and what it says come one after another.
RUN = """
import json, os, runpy, sys
import torch, echo_rt.verify.bundles
for script, *arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = [script, *arguments]
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"\\ncode {code}", file=sys.stderr, flush=True)
"""


def test_mistakes_of_the_other_scripts_are_told_in_one_line(tmp_path: Path) -> None:
    commands = [
        [str(ROOT / "bench" / name), *(["--out", "out"] if name == "golden.py" else []), *given]
        for (name, *given), _ in MISTAKES
    ]
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *said, rest = done.stderr.split("\ncode 2\n")
    assert rest == "" and "Traceback" not in done.stderr
    for (_, words), lines in zip(MISTAKES, said, strict=True):
        assert words in lines and ("usage: " in lines or len(lines.splitlines()) == 1), lines
    assert not list(tmp_path.iterdir())
