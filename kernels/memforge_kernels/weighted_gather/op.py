"""weighted_gather: a bag of value rows per token, summed by weight; the memory layer's read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memforge_kernels.checks import require_slots
from memforge_kernels.chunks import rows_at_a_time


def weighted_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows each bag names; one bag may name a row twice.

    Shape: values [m, v], slots [n, k] int64, weights [n, k] -> [n, v] in the dtype of weights.
    Cost: 2*n*k*v FLOPs, n*k rows read; the backward costs twice that and writes a dense [m, v] gradient, summed
    in the order of the tokens, without atomics.
    Raises: ValueError for shapes or dtypes that do not fit and for a slot outside 0..m-1; on a GPU slots are looked at
    in checked mode only (MEMFORGE_CHECKED=1).
    """
    if values.dim() != 2 or slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(
            f"weighted_gather needs values [m, v] and slots, weights [n, k]; got values {list(values.shape)}, "
            f"slots {list(slots.shape)}, weights {list(weights.shape)}"
        )
    if slots.dtype != torch.int64:
        raise ValueError(f"weighted_gather needs int64 slots, got {slots.dtype}")
    return torch.ops.memforge.weighted_gather(values, slots, weights)


def forward(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if values.is_cuda:
        require_slots(slots, values.shape[0])
    if values.is_cuda and weights.dtype != torch.float64:
        # Triton is needed where it runs, and only there.
        from memforge_kernels.weighted_gather import kernel

        return kernel.weighted_gather(values, slots, weights)
    try:
        return _composed(values, slots, weights)
    except (IndexError, RuntimeError):
        require_slots(slots, values.shape[0])  # torch has looked at every slot; this says which is wrong
        raise


def _composed(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if values.dtype == weights.dtype:
        return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
    rows = rows_at_a_time(slots, values)
    parts = [
        torch.einsum("nk,nkv->nv", w, F.embedding(s, values).to(w.dtype))
        for s, w in zip(slots.split(rows), weights.split(rows), strict=True)
    ]
    return torch.cat(parts)


_op = torch.library.custom_op("memforge::weighted_gather", forward, mutates_args=())


@_op.register_fake
def _(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(slots.shape[0], values.shape[1])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    values, slots, weights = ctx.saved_tensors
    d_values = d_weights = None
    if ctx.needs_input_grad[0]:
        d_values = torch.ops.memforge.weighted_scatter(grad, slots, weights, values.shape[0])
        d_values = d_values.to(values.dtype)
    if ctx.needs_input_grad[2]:
        d_weights = torch.ops.memforge.gather_dot(grad, values, slots)
    return d_values, None, d_weights


_op.register_autograd(_backward, setup_context=_setup_context)
