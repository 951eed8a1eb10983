"""The definition of the row updates, in plain torch."""

import torch
from torch import Tensor

from memforge_kernels.row_update.gradient import RowGradient


def segment_sum(grad: RowGradient) -> Tensor:
    """The gradient of each touched row, [u, v]. Materialises [r, v]."""
    segment = torch.arange(len(grad.touched)).repeat_interleave(grad.starts.diff())
    out = grad.rows.new_zeros(len(grad.touched), grad.rows.shape[1])
    return out.index_add(0, segment, grad.weights[:, None] * grad.rows[grad.row_idx])


def adamw(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: RowGradient,
    coefficients: Tensor,
    betas: tuple[float, float],
    eps: float,
    scale: float,
) -> None:
    """Update the touched rows of a table [m, v] and of its moments, in place; `coefficients` as in rules."""
    rows = grad.touched
    step_size, inv_sqrt_bias2, decay1, decay2, shrink, drift = coefficients.to(values.dtype).T.unsqueeze(2)
    w, m, s = values[rows], exp_avg[rows], exp_avg_sq[rows]
    w = shrink * w - drift * m / (s.sqrt() + eps)
    g = scale * segment_sum(grad)
    m = betas[0] * decay1 * m + (1 - betas[0]) * g
    s = betas[1] * decay2 * s + (1 - betas[1]) * g * g
    values[rows] = w - step_size * m / (s.sqrt() * inv_sqrt_bias2 + eps)
    exp_avg[rows], exp_avg_sq[rows] = m, s


def sgd(values: Tensor, grad: RowGradient, shrink: float, step: float) -> None:
    """Touched rows of a table [m, v] become shrink * row - step * gradient, in place."""
    values[grad.touched] = shrink * values[grad.touched] - step * segment_sum(grad)
