"""Row-sparse optimizer steps as Triton kernels: a segmented sum and the update of the rows it belongs to, in one pass.

Everywhere, the gradient of a table is in factors: row touched[i] has the gradient
G[i] = sum over e in starts[i]..starts[i + 1] of weights[e] * rows[row_idx[e]].
Shape: touched [u] int64, distinct and ascending; starts [u + 1] int64; row_idx [r] int64; weights [r] fp32;
rows [n, v] fp32. Every sum runs in the order of the entries, without atomics: results are the same bit for bit from
run to run. Checked against float64 through Triton's interpreter and compiled offline; not measured on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memforge_kernels import tuning

# Most segments hold one or two entries and all of a program's rows wait for its longest, so longer ones are cut.
MAX_ENTRIES = 64


class Segments(NamedTuple):
    """The factors of a gradient, and the sums of the pieces that its long segments are cut into.

    Shape: begins, ends [u] int64, first_piece [u + 1] int64, pieces [num_pieces, v] fp32; the last two are None where
    no segment is long.
    """

    begins: Tensor
    ends: Tensor
    row_idx: Tensor
    weights: Tensor
    rows: Tensor
    first_piece: Tensor | None = None
    pieces: Tensor | None = None


class RowSteps(NamedTuple):
    """What AdamW does to each touched row; all [u] fp32."""

    step_size: Tensor
    inv_sqrt_bias2: Tensor
    decay_first: Tensor
    decay_second: Tensor
    shrink: Tensor
    drift: Tensor


@triton.jit
def _sum_entries(
    rows_ptr,  # [n, v] fp32
    row_idx_ptr,  # [r] int64, or None where entry e is row e
    weights_ptr,  # [r] fp32, or None where all are 1
    begins,  # [BLOCK_U] int64
    ends,  # [BLOCK_U] int64
    cols,  # [BLOCK_V]
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """[BLOCK_U, BLOCK_V]: one entry of each segment per step, so that a step has BLOCK_U rows in flight."""
    total = tl.zeros((BLOCK_U, BLOCK_V), dtype=tl.float32)
    for step in range(0, tl.max(ends - begins, axis=0)):
        entries = begins + step
        live = entries < ends
        row_idx = entries if row_idx_ptr is None else tl.load(row_idx_ptr + entries, mask=live, other=0)
        inside = live[:, None] & (cols < v)[None, :]
        rows = tl.load(rows_ptr + row_idx[:, None] * v + cols[None, :], mask=inside, other=0.0)  # [BLOCK_U, BLOCK_V]
        if weights_ptr is not None:
            rows *= tl.load(weights_ptr + entries, mask=live, other=0.0)[:, None]
        total += rows
    return total


@triton.jit
def _gradient(
    segments,
    u_idx,  # [BLOCK_U]
    live,  # [BLOCK_U]: u_idx is inside
    cols,  # [BLOCK_V]
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """[BLOCK_U, BLOCK_V] of G: short segments entry by entry, long ones piece by piece."""
    begins = tl.load(segments.begins + u_idx, mask=live, other=0)
    ends = tl.load(segments.ends + u_idx, mask=live, other=0)
    if segments.pieces is not None:
        first = tl.load(segments.first_piece + u_idx, mask=live, other=0)
        last = tl.load(segments.first_piece + u_idx + 1, mask=live, other=0)
        ends = tl.where(last > first, begins, ends)
    total = _sum_entries(segments.rows, segments.row_idx, segments.weights, begins, ends, cols, v, BLOCK_U, BLOCK_V)
    if segments.pieces is not None:
        total += _sum_entries(segments.pieces, None, None, first, last, cols, v, BLOCK_U, BLOCK_V)
    return total


@triton.jit(do_not_specialize=["u"])
def _segment_sum_kernel(
    segments,
    out_ptr,  # [u, v] fp32
    u,
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """BLOCK_U segments by BLOCK_V columns per program."""
    u_idx = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = u_idx < u
    grad = _gradient(segments, u_idx, live, cols, v, BLOCK_U, BLOCK_V)
    tl.store(out_ptr + u_idx[:, None] * v + cols[None, :], grad, mask=live[:, None] & (cols < v)[None, :])


@triton.jit(do_not_specialize=["u"])
def _squared_norm_kernel(
    segments,
    out_ptr,  # [u] fp32
    u,
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """BLOCK_U whole segments per program, BLOCK_V columns at a time."""
    u_idx = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    live = u_idx < u
    total = tl.zeros((BLOCK_U,), dtype=tl.float32)
    for col in range(0, v, BLOCK_V):
        grad = _gradient(segments, u_idx, live, col + tl.arange(0, BLOCK_V), v, BLOCK_U, BLOCK_V)
        total += tl.sum(grad * grad, axis=1)
    tl.store(out_ptr + u_idx, total, mask=live)


@triton.jit
def _round_at_random(weight, offsets, seed):
    """bf16 above or below each fp32 weight, with odds that make the mean exact; the same for one seed and offset.

    Adding 16 random bits below the 16 that are kept carries into them with probability (dropped bits) / 2**16.
    """
    bits = weight.to(tl.int32, bitcast=True) + (tl.randint(seed, offsets) & 0xFFFF).to(tl.int32)
    rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    # A NaN of all ones would carry into the sign and come out as -0.
    return tl.where(weight != weight, weight.to(tl.bfloat16), rounded)


@triton.jit
def _load_weight(values_ptr, master_ptr, offsets, inside):
    if master_ptr is not None:
        weight = tl.load(master_ptr + offsets, mask=inside, other=0.0)
    else:
        weight = tl.load(values_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _store_weight(weight, values_ptr, master_ptr, offsets, inside, seed):
    """To the nearest in the table's type; at random for bf16 without a master, where most steps would round to none."""
    if master_ptr is not None:
        tl.store(master_ptr + offsets, weight, mask=inside)
        tl.store(values_ptr + offsets, weight.to(values_ptr.dtype.element_ty), mask=inside)
    elif values_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(values_ptr + offsets, _round_at_random(weight, offsets, seed), mask=inside)
    else:
        tl.store(values_ptr + offsets, weight.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["u", "seed"])
def _adamw_kernel(
    values_ptr,  # [m, v]
    master_ptr,  # [m, v] fp32, or None
    exp_avg_ptr,  # [m, v] fp32
    exp_avg_sq_ptr,  # [m, v] fp32
    touched_ptr,  # [u] int64
    segments,
    steps,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    scale,
    seed,
    u,
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """BLOCK_U touched rows by BLOCK_V columns per program; all tiles are [BLOCK_U, BLOCK_V] in fp32."""
    u_idx = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = u_idx < u
    inside = live[:, None] & (cols < v)[None, :]
    offsets = tl.load(touched_ptr + u_idx, mask=live, other=0)[:, None] * v + cols[None, :]
    # Table and state are asked for before the gradient is summed, so that the sum hides their latency.
    weight = _load_weight(values_ptr, master_ptr, offsets, inside)
    first = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    second = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    grad = scale * _gradient(segments, u_idx, live, cols, v, BLOCK_U, BLOCK_V)

    drift = tl.load(steps.drift + u_idx, mask=live, other=0.0)[:, None]
    weight = weight * tl.load(steps.shrink + u_idx, mask=live, other=0.0)[:, None]
    weight -= drift * first / (tl.sqrt(second) + eps)
    first = beta1 * (first * tl.load(steps.decay_first + u_idx, mask=live, other=0.0)[:, None])
    first += one_minus_beta1 * grad
    second = beta2 * (second * tl.load(steps.decay_second + u_idx, mask=live, other=0.0)[:, None])
    second += one_minus_beta2 * grad * grad
    step_size = tl.load(steps.step_size + u_idx, mask=live, other=0.0)[:, None]
    inv_sqrt_bias2 = tl.load(steps.inv_sqrt_bias2 + u_idx, mask=live, other=0.0)[:, None]
    weight -= step_size * first / (tl.sqrt(second) * inv_sqrt_bias2 + eps)

    tl.store(exp_avg_ptr + offsets, first, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, second, mask=inside)
    _store_weight(weight, values_ptr, master_ptr, offsets, inside, seed)


@triton.jit(do_not_specialize=["u", "seed"])
def _sgd_kernel(
    values_ptr,  # [m, v]
    master_ptr,  # [m, v] fp32, or None
    touched_ptr,  # [u] int64
    segments,
    shrink,
    step,
    seed,
    u,
    v: tl.constexpr,
    BLOCK_U: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    """BLOCK_U touched rows by BLOCK_V columns per program."""
    u_idx = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = u_idx < u
    inside = live[:, None] & (cols < v)[None, :]
    offsets = tl.load(touched_ptr + u_idx, mask=live, other=0)[:, None] * v + cols[None, :]
    weight = _load_weight(values_ptr, master_ptr, offsets, inside)
    grad = _gradient(segments, u_idx, live, cols, v, BLOCK_U, BLOCK_V)
    _store_weight(weight * shrink - step * grad, values_ptr, master_ptr, offsets, inside, seed)


def segment_sum(
    rows: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    starts: Tensor,
    *,
    max_entries: int = MAX_ENTRIES,
    config: tuning.Config | None = None,
) -> Tensor:
    """G, one row per segment: [u, v] fp32."""
    segments = _split(rows, row_idx, weights, starts, max_entries)
    return _sums(segments, config)


def squared_norm(
    rows: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    starts: Tensor,
    *,
    max_entries: int = MAX_ENTRIES,
    config: tuning.Config | None = None,
) -> Tensor:
    """Sum of squares of each row of G, which is not written: [u] fp32."""
    segments = _split(rows, row_idx, weights, starts, max_entries)
    out = torch.empty(segments.begins.shape[0], dtype=torch.float32, device=rows.device)
    if out.numel():
        config = config or _config("squared_norm", segments, rows.dtype)
        with torch.cuda.device_of(rows):  # Triton launches on the current device, whatever its arguments are on
            _squared_norm_kernel[_grid(segments, config)[:1]](segments, out, len(out), rows.shape[1], **config.launch())
    return out


def adamw_(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    touched: Tensor,
    starts: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    rows: Tensor,
    *,
    step_size: Tensor,
    inv_sqrt_bias2: Tensor,
    decay_first: Tensor,
    decay_second: Tensor,
    shrink: Tensor,
    drift: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    seed: int,
    master: Tensor | None = None,
    max_entries: int = MAX_ENTRIES,
    config: tuning.Config | None = None,
) -> None:
    """AdamW on the touched rows, in place. With g = scale * G[i] and m, s2, w the row of each table, row i becomes

    w = shrink[i] * w - drift[i] * m / (sqrt(s2) + eps)
    m = beta1 * decay_first[i] * m + (1 - beta1) * g
    s2 = beta2 * decay_second[i] * s2 + (1 - beta2) * g**2
    w = w - step_size[i] * m / (sqrt(s2) * inv_sqrt_bias2[i] + eps)

    so that a caller who skipped steps of a row catches up with drift and the two decays, 0 and 1 otherwise.
    Shape: values [m, v] fp32, bf16 or fp16; exp_avg, exp_avg_sq and master [m, v] fp32; the six vectors [u] fp32.
    With a master the step is taken there and rounded into values; a bf16 table without one is rounded at random by
    Philox over (seed, slot * v + column), so `seed` must differ from step to step.
    Cost: one read and one write of values and both moments per touched row, one row of `rows` per entry.
    Raises: ValueError for a table or state that is not contiguous.
    Ref: Loshchilov and Hutter 2019 (1711.05101), algorithm 2.
    """
    _check_contiguous(values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master)
    if not len(touched):
        return
    segments = _split(rows, row_idx, weights, starts, max_entries)
    vectors = (step_size, inv_sqrt_bias2, decay_first, decay_second, shrink, drift)
    steps = RowSteps(*(vector.contiguous() for vector in vectors))
    config = config or _config("adamw", segments, values.dtype)
    # 1 - beta is rounded to fp32 from the exact difference: 1 - fp32(0.999) would be off by 1e-5 of itself.
    scalars = (beta1, 1 - beta1, beta2, 1 - beta2, eps, scale, seed, len(touched), values.shape[1])
    with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments are on
        _adamw_kernel[_grid(segments, config)](
            values, master, exp_avg, exp_avg_sq, touched.contiguous(), segments, steps, *scalars, **config.launch()
        )


def sgd_(
    values: Tensor,
    touched: Tensor,
    starts: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    rows: Tensor,
    *,
    lr: float,
    weight_decay: float,
    scale: float,
    seed: int,
    master: Tensor | None = None,
    max_entries: int = MAX_ENTRIES,
    config: tuning.Config | None = None,
) -> None:
    """w = (1 - lr * weight_decay) * w - lr * scale * G[i] on the touched rows, in place; dtypes as in adamw_."""
    _check_contiguous(values=values, master=master)
    if not len(touched):
        return
    segments = _split(rows, row_idx, weights, starts, max_entries)
    config = config or _config("sgd", segments, values.dtype)
    scalars = (1 - lr * weight_decay, lr * scale, seed, len(touched), values.shape[1])
    with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments are on
        _sgd_kernel[_grid(segments, config)](
            values, master, touched.contiguous(), segments, *scalars, **config.launch()
        )


def _split(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor, max_entries: int) -> Segments:
    """The segments, those above max_entries cut into pieces of at most that many entries and each piece summed."""
    begins, ends = starts[:-1].contiguous(), starts[1:].contiguous()
    whole = Segments(begins, ends, row_idx.contiguous(), weights.contiguous(), rows.contiguous())
    lengths = ends - begins
    counts = torch.where(lengths > max_entries, (lengths + max_entries - 1) // max_entries, 0)
    num_pieces = int(counts.sum())
    if not num_pieces:
        return whole
    first_piece = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    owner = torch.repeat_interleave(counts, output_size=num_pieces)
    piece_begins = begins[owner] + (torch.arange(num_pieces, device=rows.device) - first_piece[owner]) * max_entries
    piece_ends = torch.minimum(piece_begins + max_entries, ends[owner])
    pieces = _sums(whole._replace(begins=piece_begins, ends=piece_ends))
    return whole._replace(first_piece=first_piece, pieces=pieces)


def _sums(segments: Segments, config: tuning.Config | None = None) -> Tensor:
    u, v = segments.begins.shape[0], segments.rows.shape[1]
    out = torch.empty(u, v, dtype=torch.float32, device=segments.rows.device)
    if out.numel():
        config = config or _config("segment_sum", segments, torch.float32)
        with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its arguments are on
            _segment_sum_kernel[_grid(segments, config)](segments, out, u, v, **config.launch())
    return out


def _config(kernel: str, segments: Segments, dtype: torch.dtype) -> tuning.Config:
    u, entries = segments.begins.shape[0], segments.row_idx.shape[0]
    key = tuning.Key(u, segments.rows.shape[1], triton.cdiv(entries, u), dtype)
    return tuning.config(f"row_update.{kernel}", key, segments.rows.device)


def _grid(segments: Segments, config: tuning.Config) -> tuple[int, int]:
    u, v = segments.begins.shape[0], segments.rows.shape[1]
    return triton.cdiv(u, config["BLOCK_U"]), triton.cdiv(v, config["BLOCK_V"])


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is updated in place and must be contiguous; its strides are {tensor.stride()}")
