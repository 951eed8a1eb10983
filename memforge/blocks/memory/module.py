"""The product-key memory layer in torch."""

import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks.memory.spec import MemoryPlan
from memforge.blocks.pools import Pools
from memforge.blocks.product_keys.module import ProductKeys


class Memory(ProductKeys):
    """out = sum over heads and selected slots of softmax(score) * value, then the gate.

    Shape: x [b, t, d] -> [b, t, d].
    Ref: Berges et al. 2024 (2412.09764), sections 3.1 and 3.3.
    """

    def __init__(self, plan: MemoryPlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__(plan, norm_eps, pool)
        swilu, d, v = plan.gate == "swilu", plan.dim, plan.value_dim
        self.gate = plan.gate
        self.w1 = nn.Linear(d, v, bias=False) if swilu else None
        self.w2 = nn.Linear(v, d, bias=False) if swilu else None
        self.gate_proj = nn.Linear(d, 1, bias=False) if plan.gate == "sigmoid" else None
        self.value_proj = nn.Linear(v, d, bias=False) if plan.has_value_proj else None

    def forward(self, x: Tensor, pools: Pools) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        slots, weights = self.lookup(flat, pools.reader)
        # Before the read: where the slots are under way to other ranks, this does not wait for them.
        gate = F.silu(self.w1(flat)) if self.w1 is not None else None
        y = self.pool_among(pools)(slots, weights, pools.reader).to(x.dtype)
        if gate is not None and self.w2 is not None:
            y = self.w2(y * gate)
        if self.gate_proj is not None:
            y = y * self.gate_proj(flat).sigmoid()
        if self.value_proj is not None:
            y = self.value_proj(y)
        return y.view(b, t, d), {}
