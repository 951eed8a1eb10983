"""gather_dot as a Triton kernel: the weight gradient of a bag.

Checked against float64 through Triton's interpreter and compiled offline in the tests; not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memforge_kernels import tuning


@triton.jit
def _gather_dot_fwd_kernel(
    x_ptr,  # [n, v]
    values_ptr,  # [m, v]
    slots_ptr,  # [n, k] int64
    out_ptr,  # [n, k] in the type of x
    k,
    v: tl.constexpr,
    BLOCK_K: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """One token per program: its whole row of x stays in registers while BLOCK_K rows pass at a time."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + token * v + cols, mask=cols < v, other=0.0).to(tl.float32)  # [BLOCK_V]
    for start in range(0, k, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        slots = tl.load(slots_ptr + token * k + rows, mask=rows < k, other=0)  # [BLOCK_K]
        inside = (rows < k)[:, None] & (cols < v)[None, :]
        values = tl.load(values_ptr + slots[:, None] * v + cols[None, :], mask=inside, other=0.0)  # [BLOCK_K, BLOCK_V]
        dots = tl.sum(values.to(tl.float32) * x[None, :], axis=1)
        tl.store(out_ptr + token * k + rows, dots.to(out_ptr.dtype.element_ty), mask=rows < k)


def gather_dot(x: Tensor, values: Tensor, slots: Tensor, *, config: tuning.Config | None = None) -> Tensor:
    """Dot of each row of x with each of the rows it names, in fp32.

    Shape: x [n, v], values [m, v], slots [n, k] int64 -> [n, k] in the dtype of x.
    Cost: reads n*k rows, the slots and x once each.
    Raises: ValueError for a config whose tile is narrower than a row, of which it would sum only a part.
    """
    (n, k), v = slots.shape, values.shape[1]
    out = torch.empty(n, k, dtype=x.dtype, device=x.device)
    if v == 0:
        return out.zero_()
    if out.numel():
        config = config or tuning.config("gather_dot", tuning.Key(n, v, k, values.dtype), values.device)
        if config["BLOCK_V"] < v:
            raise ValueError(f"gather_dot needs BLOCK_V of at least v = {v}, not {config['BLOCK_V']}")
        arguments = (x.contiguous(), values.contiguous(), slots.contiguous(), out, k, v)
        with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments are on
            _gather_dot_fwd_kernel[(n,)](*arguments, **config.launch())
    return out
