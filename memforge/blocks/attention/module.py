"""Grouped-query causal self-attention in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks.attention.spec import AttentionPlan


class Attention(nn.Module):
    """Shape: x [b, t, d] -> [b, t, d]. Every token attends to itself and those before it."""

    def __init__(self, plan: AttentionPlan, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = plan.num_heads, plan.num_kv_heads
        self.head_dim, self.rope_theta = plan.head_dim, plan.rope_theta
        q_dim, kv_dim = plan.num_heads * plan.head_dim, plan.num_kv_heads * plan.head_dim
        self.wq = nn.Linear(plan.dim, q_dim, bias=False)
        self.wk = nn.Linear(plan.dim, kv_dim, bias=False)
        self.wv = nn.Linear(plan.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, plan.dim, bias=False)
        self.q_norm = nn.RMSNorm(plan.head_dim, eps=norm_eps) if plan.qk_norm else None
        self.k_norm = nn.RMSNorm(plan.head_dim, eps=norm_eps) if plan.qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.num_heads, self.head_dim)
        k = self.wk(x).view(b, t, self.num_kv_heads, self.head_dim)
        v = self.wv(x).view(b, t, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary_angles(t, self.head_dim, self.rope_theta, q)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.wo(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


def rotary_angles(t: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [t, 1, head_dim / 2], in fp32 or, for an fp64 model, fp64.

    Computed, not stored: it is small beside one projection, and a model without buffers has nothing to rebuild after
    it was made on meta.

    Ref: Su et al. 2021 (2104.09864), section 3.4.2.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    channel = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype)
    position = torch.arange(t, device=like.device, dtype=dtype)
    angle = position[:, None, None] * theta ** (-channel / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + dim/2}) of [b, t, h, dim] by the angle of their position."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
