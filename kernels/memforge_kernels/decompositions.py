"""The ops as plain torch, for graphs that must run where this package is not installed.

Inference only, and made for tracing: no Python value depends on data. Results are those of the ops, down to the choice
among equal scores; some do more work.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memforge_kernels.topk import topk_ties_low

MAX_EXPERTS = 256


class TooManyExpertsError(ValueError):
    """Every expert is a node of the graph."""


def product_key_topk(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All k*k pairs of the two best-k lists, those that cannot win masked out: a graph holds no table of pairs."""
    n, h, q = query.shape
    s = sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    halves = query.reshape(n, h, 2, q // 2).to(dtype)
    half_scores = torch.einsum("nhcd,hcsd->nhcs", halves, sub_keys.to(dtype))
    best, idx = topk_ties_low(half_scores, torch.arange(s, device=query.device), k)
    rank = torch.arange(1, k + 1, device=query.device)
    cannot_win = (rank[:, None] * rank[None, :] > k).reshape(-1)
    scores = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).reshape(n, h, k * k)
    slots = (idx[:, :, 0, :, None] * s + idx[:, :, 1, None, :]).reshape(n, h, k * k)
    return topk_ties_low(scores.masked_fill(cannot_win, -torch.inf), slots, k)


def weighted_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if values.dtype == weights.dtype:
        return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
    return torch.einsum("nk,nkv->nv", weights, F.embedding(slots, values).to(weights.dtype))


def gather_dot(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    if values.dtype != x.dtype:
        return torch.einsum("nv,nkv->nk", x, F.embedding(slots, values).to(x.dtype))
    n, k = slots.shape
    bag = torch.arange(n * k, device=slots.device) // k
    starts = torch.arange(n, device=slots.device) * k
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), values, slots.reshape(-1).contiguous(), starts, bag, 0
    )
    return flat.view(n, k)


def grouped_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Every expert runs on every row, and each row takes the result of its own: e times the FLOPs of the op.

    Raises: TooManyExpertsError for more than MAX_EXPERTS matrices.
    """
    if weights.shape[0] > MAX_EXPERTS:
        raise TooManyExpertsError(
            f"a graph of plain torch ops holds at most {MAX_EXPERTS} experts, not {weights.shape[0]}"
        )
    expert = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device), right=True).unsqueeze(1)
    out = x.new_zeros(x.shape[0], weights.shape[2])
    for e in range(weights.shape[0]):
        out = torch.where(expert == e, x @ weights[e], out)
    return out


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.memforge.product_key_topk.default: product_key_topk,
    torch.ops.memforge.weighted_gather.default: weighted_gather,
    torch.ops.memforge.gather_dot.default: gather_dot,
    torch.ops.memforge.grouped_linear.default: grouped_linear,
}
