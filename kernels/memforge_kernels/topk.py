"""Top-k with one answer: ties go to the lowest index, NaN counts as the largest score."""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def topk_ties_low(scores: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores along the last dimension, descending, and their `index`; equal scores, lowest index first.

    Shape: scores [..., s], index [..., s] int64 in 0..2**32-1 (broadcast), k <= s -> two of [..., k].
    Unlike torch.topk, which picks any of several equal scores, the result does not depend on the device. fp32
    scores cost one topk over 64-bit keys: order-preserving bits of the score above, inverted index below.
    """
    if scores.dtype != torch.float32:
        index = index.expand(scores.shape)
        by_index = index.argsort(dim=-1, stable=True)
        scores, index = scores.gather(-1, by_index), index.gather(-1, by_index)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return scores.gather(-1, best), index.gather(-1, best)
    keys = (_ordered_bits(scores) << 32) | (_LOW_32 - index)
    best = keys.topk(k, dim=-1, sorted=True).values
    return _from_ordered_bits(best >> 32), _LOW_32 - (best & _LOW_32)


def _ordered_bits(scores: Tensor) -> Tensor:
    """int64 in int32's range that order as the fp32 scores do; -0 equals +0, and every NaN is the largest."""
    bits = (scores + 0.0).contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.masked_fill(scores.isnan(), 0x7FFFFFFF).to(torch.int64)


def _from_ordered_bits(ordered: Tensor) -> Tensor:
    bits = ordered.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
