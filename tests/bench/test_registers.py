"""What ptxas says of the kernels: what is fine, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import registers

KERNEL = """ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem
"""
WAITING = (
    "ptxas info    : (C7517) warpgroup.wait is injected in around line 9 by compiler to allow use of registers "
    "defined by GMMA in function 'norm_kernel'\n"
)


def log_of(name: str = "norm_kernel", stack: int = 0, spilled: int = 0) -> str:
    return KERNEL.format(name=name, stack=stack, spilled=spilled)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (log_of(), ""),
        (log_of(stack=24, spilled=24), "norm_kernel spills registers"),
        (log_of(stack=16), "norm_kernel has variables in memory"),
        (log_of("advance_kernel", stack=40), ""),
        (log_of("advance_kernel", stack=40, spilled=8), "advance_kernel spills registers"),
        (WAITING + log_of(), "norm_kernel: products of a warpgroup wait for one another"),
    ],
    ids=["fine", "spills", "stack", "sine", "sine and spills", "waiting"],
)
def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], log: str, said: str) -> None:
    path = tmp_path / "kernel.ptxas"
    path.write_text(log)
    assert registers.main([str(path)]) == (1 if said else 0)
    out, err = capsys.readouterr()
    assert "_kernel" in out and err.startswith(said) and err.count("\n") == (1 if said else 0)


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void echo::<unnamed>::norm_kernel<echo::RowShape<__half, (int)8, (int)1>>(echo::NormParams)",
            "norm_kernel<RowShape<__half, (int)8, (int)1>>",
        ),
        ("void echo::(anonymous namespace)::step_kernel<float>(StepParams)", "step_kernel<float>"),
        (
            "void at::native::elementwise<4, at::Op<(bool)1>>(int, at::Op<(bool)1>)",
            "at::native::elementwise<4, at::Op<(bool)1>>",
        ),
        ("sm90_xmma_gemm_bf16", "sm90_xmma_gemm_bf16"),
        ("(odd)", "(odd)"),
    ],
)
def test_kernels_have_short_names(demangled: str, name: str) -> None:
    assert registers.short_name(demangled) == name
