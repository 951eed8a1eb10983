"""product_key_topk as two Triton kernels: the best k of each half, then the best k of the pairs that can win.

The [n, h, s] scores stay in registers; what passes between the kernels is [n, h, 2, k] sorted keys.
Checked against the op through Triton's interpreter and compiled offline in the tests; not measured on a GPU.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from memforge_kernels import tuning
from memforge_kernels.product_key_topk.pairs import candidate_pairs

_LOWEST = tl.constexpr(-(2**63))  # below every key, that of -inf at the last index too


@triton.jit
def _pack(scores, index):
    """int64 keys that order as the fp32 scores do: -0 equals +0, NaN is above all, equal scores by lowest index."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _scores_of(keys):
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(keys):
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit
def _best_of_halves_kernel(
    query_ptr,  # [n, h, 2, d], d = q/2
    sub_keys_ptr,  # [h, 2, s, d]
    keys_ptr,  # [n, h, 2, k] int64
    n,
    s,
    k,
    d: tl.constexpr,
    K_POW2: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_S: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
):
    """BLOCK_N tokens of one half of one head per program: scores of BLOCK_S sub-keys at a time join a running top-k."""
    half = tl.program_id(1).to(tl.int64)  # head * 2 + half
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    bags = tokens * tl.num_programs(1) + half
    best = tl.full((BLOCK_N, K_POW2), _LOWEST, tl.int64)  # descending along the second axis
    for start in range(0, s, BLOCK_S):
        idx = start + tl.arange(0, BLOCK_S)
        scores = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
        for col in range(0, d, BLOCK_D):
            cols = col + tl.arange(0, BLOCK_D)
            in_query = (tokens < n)[:, None] & (cols < d)[None, :]
            query = tl.load(query_ptr + bags[:, None] * d + cols[None, :], mask=in_query, other=0.0)
            in_keys = (idx < s)[:, None] & (cols < d)[None, :]
            sub_keys = tl.load(
                sub_keys_ptr + (half * s + idx)[:, None] * d + cols[None, :], mask=in_keys, other=0.0
            )  # [BLOCK_S, BLOCK_D]
            if query.dtype != sub_keys.dtype:
                query, sub_keys = query.to(tl.float32), sub_keys.to(tl.float32)
            scores = tl.dot(query, tl.trans(sub_keys), scores, input_precision="ieee")
        tile = tl.topk(tl.where((idx < s)[None, :], _pack(scores, idx[None, :]), _LOWEST), K_POW2)
        # The larger of one descending list and the other reversed are the best of both, as a bitonic sequence.
        best = tl.bitonic_merge(tl.maximum(best, tl.flip(tile, 1)), descending=True)
    ranks = tl.arange(0, K_POW2)
    stored = (tokens < n)[:, None] & (ranks < k)[None, :]
    tl.store(keys_ptr + bags[:, None] * k + ranks[None, :], best, mask=stored)


@triton.jit
def _best_of_pairs_kernel(
    keys_ptr,  # [n, 2, k] int64, n over tokens and heads
    ranks_ptr,  # [2, c] int32: the pairs of ranks that can win
    scores_ptr,  # [n, k] fp32
    slots_ptr,  # [n, k] int64
    n,
    s,
    k,
    c,
    K_POW2: tl.constexpr,  # noqa: N803
    C_POW2: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
):
    """Every candidate pair of BLOCK_N bags per program."""
    bags = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs = tl.arange(0, C_POW2)
    first = tl.load(ranks_ptr + pairs, mask=pairs < c, other=0)
    second = tl.load(ranks_ptr + c + pairs, mask=pairs < c, other=0)
    live = (bags < n)[:, None] & (pairs < c)[None, :]
    row_ptrs = keys_ptr + bags[:, None] * 2 * k
    keys1 = tl.load(row_ptrs + first[None, :], mask=live, other=0)  # [BLOCK_N, C_POW2]
    keys2 = tl.load(row_ptrs + k + second[None, :], mask=live, other=0)
    slots = _index_of(keys1) * s + _index_of(keys2)
    keys = tl.where(live, _pack(_scores_of(keys1) + _scores_of(keys2), slots), _LOWEST)
    best = tl.topk(keys, K_POW2)
    ranks = tl.arange(0, K_POW2)
    stored = (bags < n)[:, None] & (ranks < k)[None, :]
    offsets = bags[:, None] * k + ranks[None, :]
    tl.store(scores_ptr + offsets, _scores_of(best), mask=stored)
    tl.store(slots_ptr + offsets, _index_of(best), mask=stored)


@cache
def _ranks(k: int, device: torch.device) -> Tensor:
    """candidate_pairs on the device, copied there once: a copy in each call would wait for the host."""
    return torch.tensor(candidate_pairs(k), dtype=torch.int32, device=device)


def product_key_topk(
    query: Tensor,
    sub_keys: Tensor,
    k: int,
    *,
    halves: tuning.Config | None = None,
    pairs: tuning.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Best k slots of each head, as torch.ops.memforge.product_key_topk defines them, scored in fp32.

    Shape: query [n, h, q], sub_keys [h, 2, s, q/2] -> scores [n, h, k] fp32, descending, and slots [n, h, k] int64.
    Cost: 2*n*h*s*q FLOPs; reads all sub-keys once per BLOCK_N tokens, writes and reads [n, h, 2, k] keys.
    Raises: ValueError for s above 65,536, where a slot no longer fits 32 bits.
    """
    (n, h, q), s = query.shape, sub_keys.shape[2]
    if s > 2**16:
        raise ValueError(f"product_key_topk packs slots into 32 bits: s = {s} must be at most 65536")
    scores = torch.empty(n, h, k, dtype=torch.float32, device=query.device)
    slots = torch.empty(n, h, k, dtype=torch.int64, device=query.device)
    if not scores.numel():
        return scores, slots
    keys = torch.empty(n, h, 2, k, dtype=torch.int64, device=query.device)
    ranks = _ranks(k, query.device)
    k_pow2, c = triton.next_power_of_2(k), ranks.shape[1]
    halves = halves or tuning.config("product_key_topk.halves", tuning.Key(n, s, k, query.dtype), query.device)
    pairs = pairs or tuning.config("product_key_topk.pairs", tuning.Key(n * h, s, k, query.dtype), query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever its arguments are on
        _best_of_halves_kernel[(triton.cdiv(n, halves["BLOCK_N"]), 2 * h)](
            query.contiguous(), sub_keys.contiguous(), keys, n, s, k, q // 2, K_POW2=k_pow2, **halves.launch()
        )
        _best_of_pairs_kernel[(triton.cdiv(n * h, pairs["BLOCK_N"]),)](
            keys, ranks, scores, slots, n * h, s, k, c, k_pow2, triton.next_power_of_2(c), **pairs.launch()
        )
    return scores, slots
