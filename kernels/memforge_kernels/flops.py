"""FLOP formulas of the ops, for FlopCounterMode(custom_mapping=FLOP_FORMULAS); a multiply-add is 2."""

from collections.abc import Callable
from typing import Any

import torch

from memforge_kernels.gather_dot import op as _gather_dot  # noqa: F401  registers the ops
from memforge_kernels.grouped_linear import op as _grouped_linear  # noqa: F401
from memforge_kernels.product_key_topk import op as _product_key_topk  # noqa: F401
from memforge_kernels.weighted_gather import op as _weighted_gather  # noqa: F401
from memforge_kernels.weighted_scatter import op as _weighted_scatter  # noqa: F401

Shape = tuple[int, ...]


def _product_key_topk_flops(query: Shape, sub_keys: Shape, k: int, **_: Any) -> int:
    n, h, q = query
    return 2 * n * h * sub_keys[2] * q


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


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.memforge.product_key_topk: _product_key_topk_flops,
    torch.ops.memforge.weighted_gather: _weighted_gather_flops,
    torch.ops.memforge.gather_dot: _gather_dot_flops,
    torch.ops.memforge.weighted_scatter: _weighted_scatter_flops,
    torch.ops.memforge.grouped_linear: _grouped_linear_flops,
    torch.ops.memforge.grouped_linear_weight_grad: _grouped_weight_grad_flops,
}
