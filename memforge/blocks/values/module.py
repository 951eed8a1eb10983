"""A pool of value rows in torch."""

import torch
from torch import Tensor, nn

from memforge.blocks.values.spec import ValuesPlan
from memforge_kernels import Reader


class Values(nn.Module):
    """num_sub_keys ** 2 rows; every reader calls the one module that owns them."""

    def __init__(self, plan: ValuesPlan) -> None:
        super().__init__()
        shape = (plan.num_sub_keys**2, plan.value_dim)
        self.values = nn.Parameter(torch.empty(shape, dtype=getattr(torch, plan.dtype)))

    def forward(self, slots: Tensor, weights: Tensor, reader: Reader) -> Tensor:
        """Weighted sum of rows: slots, weights [n, k] -> [n, v]."""
        return reader.weighted_gather(self.values, slots, weights)
