"""product_key_topk: the best k of s*s slots per head without scoring them all."""

import torch
from torch import Tensor

from memforge_kernels.product_key_topk.pairs import candidate_pairs
from memforge_kernels.topk import topk_ties_low


def product_key_topk(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k slots of each head; the score of slot i*s + j is <q1, K1_i> + <q2, K2_j>.

    Shape: query [n, h, q], sub_keys [h, 2, s, q/2] -> scores [n, h, k] in fp32 (fp64 for fp64 inputs), descending,
    and slots [n, h, k] int64. Ties within a half go to the lowest sub-key, ties of sums to the lowest slot among the
    candidates below; a NaN query gives slots 0..k-1 with NaN scores.
    Cost: 2*n*h*s*q FLOPs forward, 4*n*h*k*q backward (only the selected sub-keys have a gradient).
    Raises: ValueError for shapes that do not fit or k outside 1..s.
    Ref: Lample et al. 2019 (1907.05242), section 3.2. Of the pairs of the two sorted halves only those with
    (i + 1)(j + 1) <= k are needed, since every pair (i' <= i, j' <= j) scores at least as high: the scores are those of
    all s*s slots, and so are the slots unless rounded sums tie where the halves did not.
    """
    if query.dim() != 3 or sub_keys.dim() != 4 or sub_keys.shape[1] != 2:
        raise ValueError(
            f"product_key_topk needs query [n, h, q] and sub_keys [h, 2, s, q/2]; got {list(query.shape)} and "
            f"{list(sub_keys.shape)}"
        )
    if query.shape[1] != sub_keys.shape[0] or query.shape[2] != 2 * sub_keys.shape[3]:
        raise ValueError(
            f"query [n, h={query.shape[1]}, q={query.shape[2]}] does not fit sub_keys "
            f"[h={sub_keys.shape[0]}, 2, s, q/2={sub_keys.shape[3]}]"
        )
    if not 1 <= k <= sub_keys.shape[2]:
        raise ValueError(f"k = {k} must be 1 to s = {sub_keys.shape[2]}")
    return torch.ops.memforge.product_key_topk(query, sub_keys, k)


def forward(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if torch.promote_types(query.dtype, sub_keys.dtype) != torch.float64:
        if query.is_cuda:
            from memforge_kernels.product_key_topk import kernel

            return kernel.product_key_topk(query, sub_keys, k)
        from memforge_kernels.product_key_topk import cpu

        return cpu.product_key_topk(query, sub_keys, k)
    return composed(query, sub_keys, k)


def composed(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The op in torch's own, for fp64: the halves' scores are held as a whole."""
    n, h, q = query.shape
    s = sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    halves = query.reshape(n, h, 2, q // 2).to(dtype)
    half_scores = torch.einsum("nhcd,hcsd->nhcs", halves, sub_keys.to(dtype))
    best, idx = topk_ties_low(half_scores, torch.arange(s, device=query.device), k)
    i, j = (torch.tensor(ranks, device=query.device) for ranks in candidate_pairs(k))
    scores = best[:, :, 0, i] + best[:, :, 1, j]
    slots = idx[:, :, 0, i] * s + idx[:, :, 1, j]
    return topk_ties_low(scores, slots, k)


_op = torch.library.custom_op("memforge::product_key_topk", forward, mutates_args=())


@_op.register_fake
def _(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, int],
    output: tuple[Tensor, Tensor],
) -> None:
    query, sub_keys, _ = inputs
    _, slots = output
    ctx.mark_non_differentiable(slots)
    ctx.save_for_backward(query, sub_keys, slots)


def gradients(grad: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Of query and sub_keys, in their types: grad and slots [n, h, k]. Only the chosen sub-keys take part."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu":
        from memforge_kernels.product_key_topk import cpu

        d_query, d_keys = cpu.gradients(grad, query.to(dtype), sub_keys.to(dtype), slots)
        return d_query.to(query.dtype), d_keys.to(sub_keys.dtype)
    # A bag over the selected sub-keys for the query, and the gradient of that bag for the sub-keys.
    (n, h, q), (s, k) = query.shape, (sub_keys.shape[2], slots.shape[2])
    # Row ((head * 2 + half) * s + index) of the sub-keys laid out flat.
    first = torch.arange(2 * h, device=slots.device).view(1, h, 2, 1) * s
    rows = torch.stack((slots // s, slots % s), dim=2).add_(first).view(n * h * 2, k)
    weights = grad.unsqueeze(2).expand(n, h, 2, k).reshape(n * h * 2, k)
    d_query = torch.ops.memforge.weighted_gather(sub_keys.reshape(h * 2 * s, q // 2), rows, weights)
    halves = query.reshape(n * h * 2, q // 2).to(grad.dtype)
    d_keys = torch.ops.memforge.weighted_scatter(halves, rows, weights, h * 2 * s)
    return d_query.view(n, h, q).to(query.dtype), d_keys.view(sub_keys.shape).to(sub_keys.dtype)


_gradients_op = torch.library.custom_op("memforge::product_key_topk_grad", gradients, mutates_args=())


@_gradients_op.register_fake
def _(grad: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), sub_keys.new_empty(sub_keys.shape)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    query, sub_keys, slots = ctx.saved_tensors
    d_query, d_keys = torch.ops.memforge.product_key_topk_grad(grad, query, sub_keys, slots)
    return d_query, d_keys, None


_op.register_autograd(_backward, setup_context=_setup_context)
