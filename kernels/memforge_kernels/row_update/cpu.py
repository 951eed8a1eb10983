"""Row-sparse updates on a CPU: each touched row of the table and of its state is read and written once."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from memforge_kernels.threads import ask_for_row, compiled, over_rows

# starts [u + 1], row_idx [r], weights [r], rows [n, v]: see RowGradient.
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def squared_norms(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """The square of the norm of each touched row's gradient, [u]."""
    out = rows.new_empty(starts.shape[0] - 1)
    squares = rows.square().sum(dim=1)
    over_rows(_squared_norms, len(out), *_arrays(starts, row_idx, weights, rows, squares, out))
    return out


def segment_sum(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """The gradient of each touched row, [u, v]."""
    out = rows.new_empty(starts.shape[0] - 1, rows.shape[1])
    over_rows(_segment_sums, len(out), *_arrays(starts, row_idx, weights, rows, out))
    return out


def adamw(
    table: Tensor,
    where: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    touched: Tensor,
    coefficients: Tensor,
    factors: Factors,
    betas: tuple[float, float],
    eps: float,
    scale: float,
) -> None:
    """Update the rows `where` [u] of `table`, in fp32 or fp64, and the rows `touched` [u] of both moments."""
    arrays = _arrays(*factors, table, exp_avg, exp_avg_sq, where, touched, coefficients)
    kind = arrays[5].dtype.type
    # 1 - beta is rounded after the difference: that of a rounded beta2 would be off by 1e-5 of itself.
    numbers = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, scale)
    over_rows(_adamw, len(where), *arrays, *(kind(number) for number in numbers))


def sgd(table: Tensor, where: Tensor, factors: Factors, shrink: float, step: float) -> None:
    """Rows `where` [u] of `table` become shrink * row - step * gradient."""
    arrays = _arrays(*factors, table, where)
    kind = arrays[4].dtype.type
    over_rows(_sgd, len(where), *arrays, kind(shrink), kind(step))


@contextmanager
def full_precision(
    values: Tensor, master: Tensor | None, touched: Tensor, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A table in fp32 or fp64 to update and the places of the touched rows in it; values in 16 bits take them over."""
    if values.dtype in (torch.float32, torch.float64):
        yield values, touched
    elif master is not None:
        yield master, touched
        values[touched] = master[touched].to(values.dtype)
    else:
        rows = values[touched].float()
        yield rows, torch.arange(len(touched))
        values[touched] = stochastically_rounded(rows, seed)


def stochastically_rounded(x: Tensor, seed: int) -> Tensor:
    """fp32 as bf16, up or down with a chance proportional to the nearness, so that the mean of many is x."""
    noise = torch.randint(2**16, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    bits = x.view(torch.int32)
    # Infinity and NaN have no neighbour to be rounded to.
    rounded = torch.where(x.isfinite(), (bits + noise) & ~0xFFFF, bits)
    return rounded.view(torch.float32).to(torch.bfloat16)


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.numpy() for t in tensors)


@compiled
def _sum_segment(first, last, row_idx, weights, rows, total):
    for c in range(total.shape[0]):
        total[c] = 0
    for e in range(first, last):
        row, weight = rows[row_idx[e]], weights[e]
        for c in range(total.shape[0]):
            total[c] += weight * row[c]


@compiled
def _squared_norms(start, stop, starts, row_idx, weights, rows, squares, out):
    total = np.empty(rows.shape[1], rows.dtype)
    for i in range(start, stop):
        first = starts[i]
        if starts[i + 1] == first + 1:  # two rows in three of a large table have one term
            out[i] = weights[first] * weights[first] * squares[row_idx[first]]
            continue
        _sum_segment(first, starts[i + 1], row_idx, weights, rows, total)
        square = rows.dtype.type(0)
        for c in range(total.shape[0]):
            square += total[c] * total[c]
        out[i] = square


@compiled
def _segment_sums(start, stop, starts, row_idx, weights, rows, out):
    for i in range(start, stop):
        _sum_segment(starts[i], starts[i + 1], row_idx, weights, rows, out[i])


@compiled
def _adamw(
    start, stop, starts, row_idx, weights, rows, values, exp_avg, exp_avg_sq, where, slots, coefficients,
    beta1, rest1, beta2, rest2, eps, scale,
):  # fmt: skip
    grad = np.empty(rows.shape[1], rows.dtype)
    for i in range(start, stop):
        if i + 1 < stop:
            ask_for_row(values, where[i + 1])
            ask_for_row(exp_avg, slots[i + 1])
            ask_for_row(exp_avg_sq, slots[i + 1])
        _sum_segment(starts[i], starts[i + 1], row_idx, weights, rows, grad)
        w, m, s = values[where[i]], exp_avg[slots[i]], exp_avg_sq[slots[i]]
        of_row = coefficients[min(i, coefficients.shape[0] - 1)]
        step_size, inv_sqrt_bias2, decay1, decay2, shrink, drift = (
            of_row[0], of_row[1], of_row[2], of_row[3], of_row[4], of_row[5],
        )  # fmt: skip
        if drift != 0:  # the steps that were skipped
            for c in range(w.shape[0]):
                w[c] = shrink * w[c] - drift * m[c] / (np.sqrt(s[c]) + eps)
            shrink = 1
        for c in range(w.shape[0]):
            g = scale * grad[c]
            m_new = beta1 * (decay1 * m[c]) + rest1 * g
            s_new = beta2 * (decay2 * s[c]) + rest2 * (g * g)
            m[c], s[c] = m_new, s_new
            w[c] = shrink * w[c] - step_size * m_new / (np.sqrt(s_new) * inv_sqrt_bias2 + eps)


@compiled
def _sgd(start, stop, starts, row_idx, weights, rows, values, where, shrink, step):
    grad = np.empty(rows.shape[1], rows.dtype)
    for i in range(start, stop):
        if i + 1 < stop:
            ask_for_row(values, where[i + 1])
        _sum_segment(starts[i], starts[i + 1], row_idx, weights, rows, grad)
        w = values[where[i]]
        for c in range(w.shape[0]):
            w[c] = shrink * w[c] - step * grad[c]
