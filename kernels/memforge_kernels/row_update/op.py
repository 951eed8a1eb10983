"""row_adamw_, row_sgd_, row_norm and segment_sum: a table's gradient and its update, over the rows that were read."""

import torch
from torch import Tensor

from memforge_kernels.checks import require_slots
from memforge_kernels.row_update.gradient import RowGradient


def segment_sum(grad: RowGradient) -> Tensor:
    """The gradient of each touched row.

    Shape: [u, v] in the dtype of grad.rows. Cost: 2*r*v FLOPs; rows, weights and indices read once, [u, v] written.
    """
    return torch.ops.memforge.segment_sum(grad.rows, grad.row_idx, grad.weights, grad.starts)


def squared_norm(grad: RowGradient) -> Tensor:
    """The square of the gradient's norm, a scalar in fp64. The summed rows are not written anywhere.

    Cost: 2*r*v FLOPs; rows, weights and indices read once.
    """
    return torch.ops.memforge.row_norm(grad.rows, grad.row_idx, grad.weights, grad.starts)


def adamw_(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: RowGradient,
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    scale: float = 1.0,
    master: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One step of AdamW on the touched rows, in place: each is read and written once, with its two moments.

    Shape: values [m, v]; moments [m, v] in fp32 (fp64 for fp64 values); coefficients [u, 6] or [1, 6], see rules.
    `scale` multiplies the gradient. Values in 16 bits are rounded from `master`, an fp32 table that is updated in their
    place, or, without one, stochastically (bf16 only) with `seed`.
    Cost: 2*r*v FLOPs for the sums; 3 rows of v elements read and written for each touched row.
    Raises: ValueError for shapes or dtypes that do not fit and for slots outside 0..m-1, before anything is written; on
    a GPU slots are looked at in checked mode only (MEMFORGE_CHECKED=1).
    """
    _require(values, master, grad)
    if exp_avg.shape != values.shape or exp_avg_sq.shape != values.shape:
        raise ValueError(f"moments {list(exp_avg.shape)} and {list(exp_avg_sq.shape)} of values {list(values.shape)}")
    if coefficients.dim() != 2 or coefficients.shape[1] != 6 or coefficients.shape[0] not in (1, len(grad.touched)):
        raise ValueError(f"coefficients {list(coefficients.shape)} must be [1, 6] or [{len(grad.touched)}, 6]")
    torch.ops.memforge.row_adamw_(
        values, exp_avg, exp_avg_sq, master, *_parts(grad), coefficients.to(exp_avg.dtype), *betas, eps, scale, seed
    )


def sgd_(
    values: Tensor,
    grad: RowGradient,
    *,
    lr: float,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    master: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Touched rows become (1 - lr * weight_decay) * row - lr * scale * gradient, in place; 16 bits as in `adamw_`.

    Raises: ValueError for shapes or dtypes that do not fit and for slots outside 0..m-1, before anything is written; on
    a GPU slots are looked at in checked mode only (MEMFORGE_CHECKED=1).
    """
    _require(values, master, grad)
    torch.ops.memforge.row_sgd_(values, master, *_parts(grad), lr, weight_decay, scale, seed)


def _parts(grad: RowGradient) -> tuple[Tensor, ...]:
    return grad.rows, grad.row_idx, grad.weights, grad.starts, grad.touched


def _require(values: Tensor, master: Tensor | None, grad: RowGradient) -> None:
    if values.dim() != 2 or values.shape[1] != grad.rows.shape[1] or not values.is_contiguous():
        raise ValueError(f"values {list(values.shape)} must be contiguous [m, v] with v = {grad.rows.shape[1]}")
    if values.dtype == torch.float16 and master is None:
        raise ValueError("fp16 values need an fp32 master: only bf16 is rounded stochastically")
    if master is not None and (master.shape != values.shape or master.dtype != torch.float32):
        raise ValueError(f"the master must be fp32 {list(values.shape)}, got {master.dtype} {list(master.shape)}")
    require_slots(grad.touched, values.shape[0])


def sum_kernel(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    if rows.is_cuda:
        from memforge_kernels.row_update import kernel

        return kernel.segment_sum(rows, row_idx, weights, starts)
    from memforge_kernels.row_update import cpu

    return cpu.segment_sum(rows, row_idx, weights, starts)


def norm_kernel(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    if rows.is_cuda:
        from memforge_kernels.row_update import kernel

        return kernel.squared_norm(rows, row_idx, weights, starts).double().sum()
    from memforge_kernels.row_update import cpu

    return cpu.squared_norms(rows, row_idx, weights, starts).double().sum()


def adamw_kernel(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    rows: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    starts: Tensor,
    touched: Tensor,
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    seed: int,
) -> None:
    factors = (starts, row_idx, weights, rows)
    if values.is_cuda:
        from memforge_kernels.row_update import kernel

        names = ("step_size", "inv_sqrt_bias2", "decay_first", "decay_second", "shrink", "drift")
        columns = coefficients.to(values.device).expand(len(touched), 6).T.contiguous()
        kernel.adamw_(
            values,
            exp_avg,
            exp_avg_sq,
            touched,
            *factors,
            **dict(zip(names, columns, strict=True)),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            scale=scale,
            seed=seed,
            master=master,
        )
        return
    from memforge_kernels.row_update import cpu

    with cpu.full_precision(values, master, touched, seed) as (table, where):
        cpu.adamw(table, where, exp_avg, exp_avg_sq, touched, coefficients, factors, (beta1, beta2), eps, scale)


def sgd_kernel(
    values: Tensor,
    master: Tensor | None,
    rows: Tensor,
    row_idx: Tensor,
    weights: Tensor,
    starts: Tensor,
    touched: Tensor,
    lr: float,
    weight_decay: float,
    scale: float,
    seed: int,
) -> None:
    factors = (starts, row_idx, weights, rows)
    if values.is_cuda:
        from memforge_kernels.row_update import kernel

        given = {"lr": lr, "weight_decay": weight_decay, "scale": scale, "seed": seed, "master": master}
        kernel.sgd_(values, touched, *factors, **given)
        return
    from memforge_kernels.row_update import cpu

    with cpu.full_precision(values, master, touched, seed) as (table, where):
        cpu.sgd(table, where, factors, 1 - lr * weight_decay, lr * scale)


_sum_op = torch.library.custom_op("memforge::segment_sum", sum_kernel, mutates_args=())
_norm_op = torch.library.custom_op("memforge::row_norm", norm_kernel, mutates_args=())
_adamw_op = torch.library.custom_op(
    "memforge::row_adamw_", adamw_kernel, mutates_args=("values", "exp_avg", "exp_avg_sq", "master")
)
_sgd_op = torch.library.custom_op("memforge::row_sgd_", sgd_kernel, mutates_args=("values", "master"))


@_sum_op.register_fake
def _(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    return rows.new_empty(starts.shape[0] - 1, rows.shape[1])


@_norm_op.register_fake
def _(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    return rows.new_empty((), dtype=torch.float64)


@_adamw_op.register_fake
def _(*_: object) -> None: ...


@_sgd_op.register_fake
def _(*_: object) -> None: ...
