"""grouped_linear: one matrix per group of rows, as one op; the experts of a mixture."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[i-1]..offsets[i] of x times weights[i]; groups may be empty.

    Shape: x [n, a], weights [e, a, b], offsets [e] int64, ascending, the last is n -> [n, b].
    Cost: 2*n*a*b FLOPs, no padding; the backward costs twice that.
    On a GPU 16-bit matrices are torch's grouped GEMM, which reads the offsets where they are; other matrices are
    multiplied group by group.
    Raises: ValueError for shapes that do not fit, or when the last offset is not n; a grouped GEMM trusts the offsets.
    """
    if x.dim() != 2 or weights.dim() != 3 or x.shape[1] != weights.shape[1] or offsets.shape != weights.shape[:1]:
        raise ValueError(
            f"grouped_linear needs x [n, a], weights [e, a, b], offsets [e]; got {list(x.shape)}, "
            f"{list(weights.shape)}, {list(offsets.shape)}"
        )
    return torch.ops.memforge.grouped_linear(x, weights, offsets)


def _groups(offsets: Tensor, n: int) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    if ends[-1] != n or any(i > j for i, j in zip(starts, ends, strict=True)):
        raise ValueError(f"offsets must ascend to the number of rows, {n}; got {ends}")
    return list(zip(starts, ends, strict=True))


def fit_grouped_gemm(*matrices: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: 16-bit numbers, one stride 1, all else at multiples of 16 bytes."""
    return all(
        m.dtype in (torch.bfloat16, torch.float16)
        and 1 in m.stride()[-2:]
        and all(stride == 1 or (stride > 0 and stride * m.element_size() % 16 == 0) for stride in m.stride())
        and m.data_ptr() % 16 == 0
        for m in matrices
    )


def forward(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if x.is_cuda and fit_grouped_gemm(x, weights):
        return F.grouped_mm(x, weights, offs=offsets.int())
    out = x.new_empty(x.shape[0], weights.shape[2])
    for expert, (i, j) in enumerate(_groups(offsets, x.shape[0])):
        torch.mm(x[i:j], weights[expert], out=out[i:j])
    return out


_op = torch.library.custom_op("memforge::grouped_linear", forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


def weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """x^T grad of each group: x [n, a], grad [n, b], offsets [e] -> [e, a, b]."""
    if x.is_cuda and fit_grouped_gemm(x, grad):
        return F.grouped_mm(x.T, grad, offs=offsets.int())
    out = x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])
    for expert, (i, j) in enumerate(_groups(offsets, x.shape[0])):
        torch.mm(x[i:j].T, grad[i:j], out=out[expert])
    return out


_weight_grad_op = torch.library.custom_op("memforge::grouped_linear_weight_grad", weight_grad, mutates_args=())


@_weight_grad_op.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, offsets = ctx.saved_tensors
    d_x = d_weights = None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.memforge.grouped_linear(grad, weights.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        d_weights = torch.ops.memforge.grouped_linear_weight_grad(x, grad, offsets)
    return d_x, d_weights, None


_op.register_autograd(_backward, setup_context=_setup_context)
