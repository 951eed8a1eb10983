"""The product-key memory layer in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks.memory.spec import MemoryPlan
from memforge_kernels import product_key_topk


class Memory(nn.Module):
    """out = sum over heads and selected slots of softmax(score) * value, then the gate.

    Shape: x [b, t, d] -> [b, t, d].
    Ref: Berges et al. 2024 (2412.09764), sections 3.1 and 3.3.
    """

    def __init__(self, plan: MemoryPlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.num_heads, self.top_k, self.key_dim = plan.num_heads, plan.top_k, plan.key_dim
        self.gate, self.pool = plan.gate, pool
        self.pool_name = None if pool is not None else plan.pool.removeprefix("pool.")
        half = plan.key_dim // 2
        self.query = nn.Linear(plan.dim, plan.num_heads * plan.key_dim)
        self.sub_keys = nn.Parameter(torch.empty(plan.num_heads, 2, plan.num_sub_keys, half))
        self.query_norm = nn.RMSNorm(half, eps=norm_eps) if plan.qk_norm else None
        self.key_norm = nn.RMSNorm(half, eps=norm_eps) if plan.qk_norm else None
        swilu, d, v = plan.gate == "swilu", plan.dim, plan.value_dim
        self.w1 = nn.Linear(d, v, bias=False) if swilu else None
        self.w2 = nn.Linear(v, d, bias=False) if swilu else None
        self.gate_proj = nn.Linear(d, 1, bias=False) if plan.gate == "sigmoid" else None
        self.value_proj = nn.Linear(v, d, bias=False) if plan.has_value_proj else None

    def forward(self, x: Tensor, pools: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        slots, weights = self.lookup(flat)
        pool = pools[self.pool_name] if self.pool_name is not None else self.pool
        y = pool(slots, weights).to(x.dtype)
        if self.w1 is not None and self.w2 is not None:
            y = self.w2(y * F.silu(self.w1(flat)))
        if self.gate_proj is not None:
            y = y * self.gate_proj(flat).sigmoid()
        if self.value_proj is not None:
            y = self.value_proj(y)
        return y.view(b, t, d), {}

    def lookup(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Slots and softmax weights of all heads: flat [n, d] -> two of [n, h*k]."""
        n = flat.shape[0]
        query, sub_keys = self.query(flat).view(n, self.num_heads, self.key_dim), self.sub_keys
        if self.query_norm is not None and self.key_norm is not None:
            halves = query.view(n, self.num_heads, 2, self.key_dim // 2)
            query = self.query_norm(halves).view(n, self.num_heads, self.key_dim)
            sub_keys = self.key_norm(sub_keys)
        scores, slots = product_key_topk(query, sub_keys, self.top_k)
        return slots.flatten(1), scores.softmax(dim=-1).flatten(1)
