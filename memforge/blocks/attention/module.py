"""Grouped-query causal self-attention in torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks.attention.spec import AttentionPlan, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


class Attention(nn.Module):
    """Shape: x [b, t, d] -> [b, t, d]. Every token attends to itself and those before it, the nearest `window`
    of them if there is one.
    """

    def __init__(self, plan: AttentionPlan, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = plan.num_heads, plan.num_kv_heads
        self.head_dim, self.window = plan.head_dim, plan.window
        self.rope_theta, self.rope_scaling = plan.rope_theta, plan.rope_scaling
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
        cos, sin = rotary_angles(t, self.head_dim, self.rope_theta, q, self.rope_scaling)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if self.window is None else sliding_window(t, self.window, q.device),
            is_causal=self.window is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.wo(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


def sliding_window(t: int, window: int, device: torch.device) -> Tensor:
    """Which of [t, t] (query, key) pairs are seen: key <= query < key + window."""
    position = torch.arange(t, device=device)
    behind = position[:, None] - position[None, :]
    return (behind >= 0) & (behind < window)


def rotary_angles(
    t: int, head_dim: int, theta: float, like: Tensor, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [t, 1, head_dim / 2], in fp32 or, for an fp64 model, fp64.

    Computed, not stored: it is small beside one projection, and a model without buffers has nothing to rebuild after
    it was made on meta.

    Ref: Su et al. 2021 (2104.09864), section 3.4.2.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    channel = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype)
    frequency, size = theta ** (-channel / head_dim), 1.0
    if scaling is not None:
        kept = share_kept(frequency, scaling, theta)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
        # YaRN lengthens the vectors too, by sqrt(1/t) = 0.1 ln(factor) + 1 (equation 22).
        size = 0.1 * math.log(scaling.factor) + 1 if isinstance(scaling, YarnScaling) else 1.0
    position = torch.arange(t, device=like.device, dtype=dtype)
    angle = position[:, None, None] * frequency
    return angle.cos() * size, angle.sin() * size


def share_kept(frequency: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """For each channel [head_dim / 2], how much of its frequency stays; the rest is divided by the factor."""
    if isinstance(scaling, LinearScaling):
        return torch.zeros_like(frequency)
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)

    # As the published code does it: linear in the index of the channel, between the whole channels around those that
    # turn beta_fast and beta_slow times.
    num = frequency.shape[0]

    def channel_turning(turns: float) -> float:
        return num * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(channel_turning(scaling.beta_fast)), 0)
    last = min(math.ceil(channel_turning(scaling.beta_slow)), 2 * num - 1)
    index = torch.arange(num, device=frequency.device, dtype=frequency.dtype)
    return 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + dim/2}) of [b, t, h, dim] by the angle of their position."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
