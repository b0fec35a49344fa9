"""The kernels themselves under other orders of threads: a barrier or a wait that one of them lacks changes its result.

The order is chosen by a seed that is read once in a process, so each seed has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from echo_rt.ops.backends import available_backends

TESTS = Path(__file__).parent.parent
# Digests of all that each operation returns and writes. Two sizes: rows of one warp, and rows that warps share.
PROGRAM = """
import dataclasses, hashlib, json
import torch
from cases import OPS, Sizes, make_case
from echo_rt.ops.backends import load_ops

ops, digests = load_ops("emulated"), {}
shared = Sizes(tokens=7, heads=9, head_dim=64, vae=(1, 3, 17, 96), convolution=(20, 3, 3, 3))
cached = {"qkv_norm_rope_store", "reanchor"}  # in float8 too
for sizes in (Sizes(tokens=5, heads=1, head_dim=64), shared, dataclasses.replace(shared, float8=True)):
    for op in cached if sizes.float8 else OPS:
        args = make_case(op, sizes, torch.bfloat16)
        digest = hashlib.sha256()
        for result in (getattr(ops, op)(*args), *args):
            if isinstance(result, torch.Tensor):
                digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
        digests[f"{op} {sizes.dim} {sizes.float8}"] = digest.hexdigest()
print(json.dumps(digests))
"""


def digests(seed: int) -> dict[str, str]:
    environment = os.environ | {
        "ECHO_RT_EMULATION_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(available_backends()["emulated"] != "available", reason="this build has the kernels for GPUs")
def test_no_kernel_depends_on_the_order_of_threads() -> None:
    usual, other = digests(0), digests(7)
    assert not [op for op, digest in usual.items() if other[op] != digest]
