"""The definition of expert_lookup, in plain torch."""

import torch
from torch import Tensor

ACTIVATIONS = {"gelu": torch.nn.GELU(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}


def expert_lookup(
    x: Tensor, down: Tensor, up: Tensor, slots: Tensor, weights: Tensor, activation: str = "gelu"
) -> Tensor:
    """Weighted sum of single-neuron experts. Materialises [n, k, d] twice.

    Shape: x [n, d], down and up [m, d], slots and weights [n, k] -> [n, d].
    """
    hidden = ACTIVATIONS[activation](torch.einsum("nd,nkd->nk", x, down[slots].to(x.dtype)))
    return torch.einsum("nk,nkd->nd", weights * hidden, up[slots].to(x.dtype))
