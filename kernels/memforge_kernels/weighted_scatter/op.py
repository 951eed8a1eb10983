"""weighted_scatter: rows added to the slots they name; the gradient of a pool of values."""

import torch
from torch import Tensor

from memforge_kernels.checks import require_slots
from memforge_kernels.row_update.gradient import Read, sorted_gradient
from memforge_kernels.row_update.op import segment_sum


def weighted_scatter(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """Row `slot` sums weights[i, j] * x[i] over all (i, j) that name it.

    Shape: x [n, v], slots [n, k] int64 in 0..num_slots-1, weights [n, k] -> [num_slots, v] in the dtype of x.
    Cost: 2*n*k*v FLOPs; writes every row. It has no gradient of its own.
    Each sum has one order, that of the tokens, so the result is the same bit for bit from run to run, without atomics.
    Raises: ValueError for shapes or dtypes that do not fit and for a slot outside 0..num_slots-1; on a GPU slots are
    looked at in checked mode only (MEMFORGE_CHECKED=1).
    """
    if x.dim() != 2 or slots.dim() != 2 or slots.shape != weights.shape or slots.shape[0] != x.shape[0]:
        raise ValueError(
            f"weighted_scatter needs x [n, v] and slots, weights [n, k]; got {list(x.shape)}, {list(slots.shape)}, "
            f"{list(weights.shape)}"
        )
    if slots.dtype != torch.int64:
        raise ValueError(f"weighted_scatter needs int64 slots, got {slots.dtype}")
    return torch.ops.memforge.weighted_scatter(x, slots, weights, num_slots)


def forward(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    n, k = slots.shape
    if n * k == 0:
        return x.new_zeros(num_slots, x.shape[1])
    require_slots(slots, num_slots)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        from memforge_kernels.weighted_scatter import cpu

        return cpu.weighted_scatter(x, slots, weights, num_slots)
    out = x.new_zeros(num_slots, x.shape[1])
    grad = sorted_gradient([Read(slots, weights, x)])
    out[grad.touched] = segment_sum(grad).to(x.dtype)
    return out


_op = torch.library.custom_op("memforge::weighted_scatter", forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    return x.new_empty(num_slots, x.shape[1])
