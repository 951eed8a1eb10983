"""What needs a CUDA device; skipped where there is none."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, write

from memforge.plan import make_plan
from memforge.spec import load_spec
from memforge.training import train
from memforge_kernels import grouped_linear, weighted_gather

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "m", "v"), [(1, 1, 1, 1), (64, 33, 500, 100), (128, 128, 4096, 1536)])
def test_the_triton_forward_agrees_with_float64(n: int, k: int, m: int, v: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(m, v, generator=generator).to(dtype)
    slots = torch.randint(m, (n, k), generator=generator)
    weights = torch.randn(n, k, generator=generator)
    terms = values.double()[slots] * weights.double()[..., None]
    out = weighted_gather(values.cuda(), slots.cuda(), weights.cuda()).cpu().double()
    bound = 2 * k * 2.0**-24 * terms.abs().sum(1) + 2.0**-24 * terms.sum(1).abs()
    assert ((out - terms.sum(1)).abs() <= bound).all()


def test_the_grouped_gemm_agrees_with_a_loop_over_groups() -> None:
    generator, offsets = torch.Generator().manual_seed(0), torch.tensor([100, 100, 356, 512])
    x = torch.randn(512, 64, generator=generator).bfloat16()
    weights = torch.randn(4, 64, 128, generator=generator).bfloat16()
    on_gpu = [t.cuda().requires_grad_() for t in (x, weights)]
    on_cpu = [t.clone().requires_grad_() for t in (x, weights)]
    for tensors, ends in ((on_gpu, offsets.cuda()), (on_cpu, offsets)):
        grouped_linear(*tensors, ends).float().square().sum().backward()
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(
            got.grad.cpu(), expected.grad, rtol=2e-2, atol=2e-2 * float(expected.grad.abs().max())
        )


def test_a_small_run_learns_on_the_gpu(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL.replace("steps = 4", "steps = 30").replace("1e-3", "1e-2"))
    summary = train(make_plan(load_spec(spec)), tmp_path / "run", device="cuda")
    assert summary["final"]["loss"] < 5.0
