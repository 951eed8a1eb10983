"""The definition of product_key_topk, in plain torch: score every slot, take the best k."""

import torch
from torch import Tensor

from memforge_kernels.topk import topk_ties_low


def product_key_topk(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k slots of each head by the sum of two half scores, over all s*s pairs.

    Shape: query [n, h, q], sub_keys [h, 2, s, q/2] -> scores, slots [n, h, k].
    Materialises [n, h, s*s]: for tests.
    """
    n, h, q = query.shape
    s = sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    halves = query.reshape(n, h, 2, q // 2).to(dtype)
    half_scores = torch.einsum("nhcd,hcsd->nhcs", halves, sub_keys.to(dtype))
    scores = (half_scores[:, :, 0, :, None] + half_scores[:, :, 1, None, :]).flatten(2)
    return topk_ties_low(scores, torch.arange(s * s, device=query.device), k)
