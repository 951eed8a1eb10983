"""What is known of each registered op: FLOP_FORMULAS for FlopCounterMode(custom_mapping=FLOP_FORMULAS), a multiply-add
being 2, and KERNELS, the function that runs when it is called, for tools that look inside.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memforge_kernels.gather_dot import op as gather_dot
from memforge_kernels.grouped_linear import op as grouped_linear
from memforge_kernels.product_key_topk import op as product_key_topk
from memforge_kernels.row_update import op as row_update
from memforge_kernels.weighted_gather import op as weighted_gather
from memforge_kernels.weighted_scatter import op as weighted_scatter

Shape = tuple[int, ...]


def _product_key_topk_flops(query: Shape, sub_keys: Shape, k: int, **_: Any) -> int:
    n, h, q = query
    return 2 * n * h * sub_keys[2] * q


def _product_key_topk_grad_flops(grad: Shape, query: Shape, *_: Any, **__: Any) -> int:
    return 4 * grad[0] * grad[1] * grad[2] * query[2]


def _weighted_gather_flops(values: Shape, slots: Shape, weights: Shape, **_: Any) -> int:
    return 2 * slots[0] * slots[1] * values[1]


def _gather_dot_flops(x: Shape, values: Shape, slots: Shape, **_: Any) -> int:
    return 2 * slots[0] * slots[1] * values[1]


def _weighted_scatter_flops(x: Shape, slots: Shape, weights: Shape, num_slots: int, **_: Any) -> int:
    return 2 * slots[0] * slots[1] * x[1]


def _grouped_linear_flops(x: Shape, weights: Shape, offsets: Shape, **_: Any) -> int:
    return 2 * x[0] * x[1] * weights[2]


def _grouped_weight_grad_flops(x: Shape, grad: Shape, offsets: Shape, **_: Any) -> int:
    return 2 * x[0] * x[1] * grad[1]


def _segment_sum_flops(rows: Shape, row_idx: Shape, weights: Shape, starts: Shape, **_: Any) -> int:
    return 2 * row_idx[0] * rows[1]


def _row_adamw_flops(
    values: Shape, exp_avg: Shape, exp_avg_sq: Shape, master: Any, rows: Shape, *args: Any, **_: Any
) -> int:
    return 2 * args[0][0] * rows[1]


def _row_sgd_flops(values: Shape, master: Any, rows: Shape, row_idx: Shape, *args: Any, **_: Any) -> int:
    return 2 * row_idx[0] * rows[1]


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.memforge.product_key_topk: _product_key_topk_flops,
    torch.ops.memforge.product_key_topk_grad: _product_key_topk_grad_flops,
    torch.ops.memforge.weighted_gather: _weighted_gather_flops,
    torch.ops.memforge.gather_dot: _gather_dot_flops,
    torch.ops.memforge.weighted_scatter: _weighted_scatter_flops,
    torch.ops.memforge.grouped_linear: _grouped_linear_flops,
    torch.ops.memforge.grouped_linear_weight_grad: _grouped_weight_grad_flops,
    torch.ops.memforge.segment_sum: _segment_sum_flops,
    torch.ops.memforge.row_norm: _segment_sum_flops,
    torch.ops.memforge.row_adamw_: _row_adamw_flops,
    torch.ops.memforge.row_sgd_: _row_sgd_flops,
}

KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.memforge.product_key_topk.default: product_key_topk.forward,
    torch.ops.memforge.product_key_topk_grad.default: product_key_topk.gradients,
    torch.ops.memforge.weighted_gather.default: weighted_gather.forward,
    torch.ops.memforge.weighted_scatter.default: weighted_scatter.forward,
    torch.ops.memforge.gather_dot.default: gather_dot.forward,
    torch.ops.memforge.grouped_linear.default: grouped_linear.forward,
    torch.ops.memforge.grouped_linear_weight_grad.default: grouped_linear.weight_grad,
    torch.ops.memforge.segment_sum.default: row_update.sum_kernel,
    torch.ops.memforge.row_norm.default: row_update.norm_kernel,
    torch.ops.memforge.row_adamw_.default: row_update.adamw_kernel,
    torch.ops.memforge.row_sgd_.default: row_update.sgd_kernel,
}


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _weighted_gather_bytes(values: Tensor, slots: Tensor, weights: Tensor) -> int:
    out = slots.shape[0] * values.shape[1] * weights.element_size()
    return slots.numel() * values.shape[1] * values.element_size() + _bytes(slots, weights) + out


def _gather_dot_bytes(x: Tensor, values: Tensor, slots: Tensor) -> int:
    out = slots.numel() * x.element_size()
    return slots.numel() * values.shape[1] * values.element_size() + _bytes(x, slots) + out


def _product_key_topk_bytes(query: Tensor, sub_keys: Tensor, k: int) -> int:
    return _bytes(query, sub_keys) + query.shape[0] * query.shape[1] * k * (4 + 8)


def _segment_sum_bytes(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> int:
    read = row_idx.numel() * rows.shape[1] * rows.element_size() + _bytes(row_idx, weights, starts)
    return read + (starts.numel() - 1) * rows.shape[1] * rows.element_size()


# What each op must move at least, given its arguments, where every row that is named comes from memory.
BYTE_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.memforge.product_key_topk: _product_key_topk_bytes,
    torch.ops.memforge.weighted_gather: _weighted_gather_bytes,
    torch.ops.memforge.gather_dot: _gather_dot_bytes,
    torch.ops.memforge.segment_sum: _segment_sum_bytes,
}
