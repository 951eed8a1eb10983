"""The definition of grouped_linear, in plain torch."""

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[i-1]..offsets[i] of x times weights[i].

    Shape: x [n, a], weights [e, a, b], offsets [e] int64, ascending, the last is n -> [n, b].
    """
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([x[i:j] @ w for i, j, w in zip(starts, ends, weights, strict=True)])
