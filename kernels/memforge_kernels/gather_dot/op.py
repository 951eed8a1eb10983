"""gather_dot: the scalar products of each token with the rows it names; the weight gradient of weighted_gather."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memforge_kernels.checks import require_slots
from memforge_kernels.chunks import rows_at_a_time


def gather_dot(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Dot of each row of x with each of the rows it names; one token may name a row twice.

    Shape: x [n, v], values [m, v], slots [n, k] int64 -> [n, k] in the dtype of x.
    Cost: 2*n*k*v FLOPs, n*k rows read; the backward costs twice that and writes a dense [m, v] gradient.
    Raises: ValueError for shapes or dtypes that do not fit and for a slot outside 0..m-1; on a GPU slots are looked at
    in checked mode only (MEMFORGE_CHECKED=1).
    """
    if x.dim() != 2 or values.dim() != 2 or slots.dim() != 2:
        raise ValueError(_misfit(x, values, slots))
    if x.shape[1] != values.shape[1] or x.shape[0] != slots.shape[0]:
        raise ValueError(_misfit(x, values, slots))
    if slots.dtype != torch.int64:
        raise ValueError(f"gather_dot needs int64 slots, got {slots.dtype}")
    return torch.ops.memforge.gather_dot(x, values, slots)


def _misfit(x: Tensor, values: Tensor, slots: Tensor) -> str:
    shapes = ", ".join(str(list(t.shape)) for t in (x, values, slots))
    return f"gather_dot needs x [n, v], values [m, v], slots [n, k]; got {shapes}"


def forward(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    n, k = slots.shape
    require_slots(slots, values.shape[0])
    if values.is_cuda and x.dtype != torch.float64:
        # Triton is needed where it runs, and only there.
        from memforge_kernels.gather_dot import kernel

        return kernel.gather_dot(x, values, slots)
    if values.dtype == x.dtype and x.dtype in (torch.float32, torch.float64) and values.device.type == "cpu" and n * k:
        from memforge_kernels.gather_dot import cpu

        return cpu.gather_dot(x, values, slots)
    rows = rows_at_a_time(slots, values)
    parts = [
        torch.einsum("nv,nkv->nk", one, F.embedding(s, values).to(one.dtype))
        for one, s in zip(x.split(rows), slots.split(rows), strict=True)
    ]
    return torch.cat(parts)


_op = torch.library.custom_op("memforge::gather_dot", forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(slots.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, values, slots = ctx.saved_tensors
    d_x = d_values = None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.memforge.weighted_gather(values, slots, grad)
    if ctx.needs_input_grad[1]:
        d_values = torch.ops.memforge.weighted_scatter(x, slots, grad, values.shape[0]).to(values.dtype)
    return d_x, d_values, None


_op.register_autograd(_backward, setup_context=_setup_context)
