"""The definition of weighted_gather, in plain torch."""

import torch
from torch import Tensor


def weighted_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows each bag names. Materialises [n, k, v].

    Shape: values [m, v], slots [n, k] int64, weights [n, k] -> [n, v] in the dtype of weights.
    """
    return torch.einsum("nk,nkv->nv", weights, values[slots].to(weights.dtype))
