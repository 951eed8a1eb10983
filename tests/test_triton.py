"""The Triton kernels without a GPU: right in the interpreter, and compiled for the targets they are meant for."""

import os
import subprocess
import sys

import pytest

INTERPRETED = """
import torch
from memforge_kernels.weighted_gather.kernel import weighted_gather
generator = torch.Generator().manual_seed(0)
for n, k, m, v in [(1, 1, 1, 1), (3, 5, 7, 13), (2, 8, 4, 96), (4, 33, 50, 100), (2, 3, 9, 600), (0, 4, 5, 6)]:
    for dtype in (torch.float32, torch.float16):
        values = torch.randn(m, v, generator=generator).to(dtype)
        slots = torch.randint(m, (n, k), generator=generator)
        weights = torch.randn(n, k, generator=generator)
        values[-1] = float("nan") if m > 1 else values[-1]  # read by no bag: a masked load must not bring it in
        slots = slots.clamp(max=max(m - 2, 0))
        terms = values.double()[slots] * weights.double()[..., None]
        bound = 2 * k * 2.0**-24 * terms.abs().sum(1) + 2.0**-24 * terms.sum(1).abs()
        assert ((weighted_gather(values, slots, weights).double() - terms.sum(1)).abs() <= bound).all(), (n, k, m, v)
print("agree")
"""

COMPILED = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memforge_kernels.weighted_gather.kernel import BLOCK_K, _weighted_gather_fwd_kernel
signature = {"values_ptr": "*bf16", "slots_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*fp32", "k": "i32",
             "v": "i32", "BLOCK_K": "constexpr", "BLOCK_V": "constexpr"}
source = ASTSource(_weighted_gather_fwd_kernel, signature, {"BLOCK_K": BLOCK_K, "BLOCK_V": 512},
                   {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)})
backend, arch, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp)
kernel = triton.compile(source, target=target, options={"num_warps": 4})
text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
wide = r"ld\\.global\\.v4\\.b32" if backend == "cuda" else r"(?:global|buffer)_load_dwordx4"
assert re.search(wide, text), text
assert "atom" not in text
print("compiled")
"""


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
        timeout=300,
    )


def interpreted(code: str, tmp_path: object) -> subprocess.CompletedProcess[str]:
    return run(code, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))


def test_the_interpreter_agrees_with_float64(tmp_path: object) -> None:
    done = interpreted(INTERPRETED, tmp_path)
    assert done.stdout == "agree\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    "target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("cuda", "100", "32"), ("hip", "gfx942", "64")]
)
def test_the_kernel_compiles_with_128_bit_loads(target: tuple[str, str, str], tmp_path: object) -> None:
    done = run(COMPILED, *target, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "compiled\n", done.stderr[-2000:]
