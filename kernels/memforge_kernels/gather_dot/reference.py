"""The definition of gather_dot, in plain torch."""

import torch
from torch import Tensor


def gather_dot(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Dot of each row of x with each of the rows it names. Materialises [n, k, v].

    Shape: x [n, v], values [m, v], slots [n, k] int64 -> [n, k] in the dtype of x.
    """
    return torch.einsum("nv,nkv->nk", x, values[slots].to(x.dtype))
