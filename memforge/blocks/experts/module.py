"""A pool of single-neuron experts in torch."""

import torch
from torch import Tensor, nn

from memforge.blocks.experts.spec import ExpertsPlan
from memforge_kernels import Reader, expert_lookup
from memforge_kernels.expert_lookup.op import Activation


class Experts(nn.Module):
    """num_sub_keys ** 2 experts; every reader calls the one module that owns them."""

    def __init__(self, plan: ExpertsPlan) -> None:
        super().__init__()
        shape, dtype = (plan.num_sub_keys**2, plan.dim), getattr(torch, plan.dtype)
        self.down = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.up = nn.Parameter(torch.empty(shape, dtype=dtype))

    def forward(self, x: Tensor, slots: Tensor, weights: Tensor, activation: Activation, reader: Reader) -> Tensor:
        """Weighted sum of the chosen experts' outputs: x [n, d], slots and weights [n, k] -> [n, d]."""
        return expert_lookup(x, self.down, self.up, slots, weights, activation, reader=reader)
