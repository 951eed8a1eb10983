"""The definition of weighted_scatter, in plain torch."""

import torch
from torch import Tensor


def weighted_scatter(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """Every row of x, scaled, added to the slots it names; in full matrices, as torch counts FLOPs.

    Shape: x [n, v], slots [n, k] int64, weights [n, k] -> [num_slots, v] in the dtype of x.
    """
    (n, k), v = slots.shape, x.shape[1]
    terms = torch.bmm(weights.to(x.dtype).unsqueeze(2), x.unsqueeze(1)).reshape(n * k, v)
    return x.new_zeros(num_slots, v).index_add(0, slots.reshape(-1), terms)
