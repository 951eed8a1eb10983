"""Product-key retrieval in torch."""

import torch
from torch import Tensor, nn

from memforge.blocks.pools import Pools
from memforge.blocks.product_keys.spec import ProductKeyPlan
from memforge_kernels import Reader, product_key_topk


class ProductKeys(nn.Module):
    """Queries, sub-keys and the pool they choose from; the base of the blocks that read a pool by product keys."""

    def __init__(self, plan: ProductKeyPlan, norm_eps: float, pool: nn.Module | None) -> None:
        super().__init__()
        self.num_heads, self.top_k, self.key_dim = plan.num_heads, plan.top_k, plan.key_dim
        self.pool, self.pool_name = pool, None if pool is not None else plan.pool.removeprefix("pool.")
        half = plan.key_dim // 2
        self.query = nn.Linear(plan.dim, plan.num_heads * plan.key_dim)
        self.sub_keys = nn.Parameter(torch.empty(plan.num_heads, 2, plan.num_sub_keys, half))
        self.query_norm = nn.RMSNorm(half, eps=norm_eps) if plan.qk_norm else None
        self.key_norm = nn.RMSNorm(half, eps=norm_eps) if plan.qk_norm else None

    def pool_among(self, pools: Pools) -> nn.Module:
        """The block's own pool, or the shared one it names."""
        pool = self.pool if self.pool_name is None else pools[self.pool_name]
        assert pool is not None
        return pool

    def lookup(self, flat: Tensor, reader: Reader) -> tuple[Tensor, Tensor]:
        """Slots and softmax weights of all heads: flat [n, d] -> two of [n, h*k]. The reader hears of the slots."""
        n = flat.shape[0]
        query, sub_keys = self.query(flat).view(n, self.num_heads, self.key_dim), self.sub_keys
        if self.query_norm is not None and self.key_norm is not None:
            halves = query.view(n, self.num_heads, 2, self.key_dim // 2)
            query = self.query_norm(halves).view(n, self.num_heads, self.key_dim)
            sub_keys = self.key_norm(sub_keys)
        scores, slots = product_key_topk(query, sub_keys, self.top_k)
        slots = slots.flatten(1)
        reader.announce(slots, sub_keys.shape[2] ** 2)
        return slots, scores.softmax(dim=-1).flatten(1)
