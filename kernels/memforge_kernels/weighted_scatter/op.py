"""weighted_scatter: rows added to the slots they name; the gradient of a pool of values."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_scatter(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """Row `slot` sums weights[i, j] * x[i] over all (i, j) that name it.

    Shape: x [n, v], slots [n, k] int64 in 0..num_slots-1, weights [n, k] -> [num_slots, v] in the dtype of x.
    Cost: 2*n*k*v FLOPs; writes every row. It has no gradient of its own.
    A stable sort by slot fixes the order of each sum, so the result is the same bit for bit from run to run, without
    atomics.
    Raises: ValueError for shapes or dtypes that do not fit. Slots are trusted: they are those of a gather.
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
    out = x.new_zeros(num_slots, x.shape[1])
    if n * k == 0:
        return out
    by_slot, order = slots.reshape(-1).sort(stable=True)
    touched, counts = torch.unique_consecutive(by_slot, return_counts=True)
    starts = counts.cumsum(0) - counts
    out[touched] = F.embedding_bag(
        order // k, x, starts, mode="sum", per_sample_weights=weights.reshape(-1)[order].to(x.dtype)
    )
    return out


_op = torch.library.custom_op("memforge::weighted_scatter", forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    return x.new_empty(num_slots, x.shape[1])
