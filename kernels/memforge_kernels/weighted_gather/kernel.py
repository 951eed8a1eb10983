"""The forward of weighted_gather as a Triton kernel.

Checked against float64 through Triton's interpreter and compiled offline in the tests; not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memforge_kernels import tuning


@triton.jit
def _weighted_gather_fwd_kernel(
    values_ptr,  # [m, v]
    slots_ptr,  # [n, k] int64
    weights_ptr,  # [n, k]
    gate_ptr,  # [n, v], or None
    out_ptr,  # [n, v] in the type of weights
    k,
    v: tl.constexpr,
    BLOCK_K: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """One token and BLOCK_V columns per program; BLOCK_K rows are in flight at a time and summed in fp32.

    v is a constant of the model, so it is compiled in: the compiler then knows which rows start on 16 bytes, and loads
    128 bits at a time from those (1000 columns of 16 bits too, which a flag for multiples of 16 would miss).
    """
    bag = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        slots = tl.load(slots_ptr + bag * k + rows, mask=rows < k, other=0)  # [BLOCK_K]
        weights = tl.load(weights_ptr + bag * k + rows, mask=rows < k, other=0.0).to(tl.float32)
        # Slots are 64-bit, so offsets are too: m * v passes 2**31 at 2**20 slots of 2,048.
        inside = (rows < k)[:, None] & (cols < v)[None, :]
        values = tl.load(values_ptr + slots[:, None] * v + cols[None, :], mask=inside, other=0.0)  # [BLOCK_K, BLOCK_V]
        total += tl.sum(values.to(tl.float32) * weights[:, None], axis=0)
    if gate_ptr is not None:
        total *= tl.load(gate_ptr + bag * v + cols, mask=cols < v, other=0.0).to(tl.float32)
    tl.store(out_ptr + bag * v + cols, total.to(out_ptr.dtype.element_ty), mask=cols < v)


def weighted_gather(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    gate: Tensor | None = None,
    *,
    config: tuning.Config | None = None,
) -> Tensor:
    """Weighted sum of the rows each bag names, times `gate` where there is one; summed in fp32.

    Shape: values [m, v], slots [n, k] int64, weights [n, k], gate [n, v] -> [n, v] in the dtype of weights.
    Cost: reads n*k rows, slots and weights once each (slots and weights once per block of columns).
    """
    (n, k), v = slots.shape, values.shape[1]
    out = torch.empty(n, v, dtype=weights.dtype, device=weights.device)
    if out.numel():
        config = config or tuning.config("weighted_gather", tuning.Key(n, v, k, values.dtype), values.device)
        grid = (n, triton.cdiv(v, config["BLOCK_V"]))
        gate = gate.contiguous() if gate is not None else None
        arguments = (values.contiguous(), slots.contiguous(), weights.contiguous(), gate, out, k, v)
        with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments are on
            _weighted_gather_fwd_kernel[grid](*arguments, **config.launch())
    return out
