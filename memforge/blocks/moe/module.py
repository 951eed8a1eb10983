"""A token-choice mixture of experts in torch."""

import torch
from torch import Tensor, nn

from memforge.blocks.ffn.module import activate
from memforge.blocks.moe.spec import MoePlan
from memforge_kernels import grouped_linear


class Moe(nn.Module):
    """Sum over each token's top_k experts of router probability * expert(x). No token is dropped.

    Shape: x [b, t, d] -> [b, t, d]. In training mode the load-balance loss is returned beside it.
    """

    def __init__(self, plan: MoePlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.activation = plan.num_experts, plan.top_k, plan.activation
        self.normalize_top_k, self.load_balance_coef = plan.normalize_top_k, plan.load_balance_coef
        e, d, f = plan.num_experts, plan.dim, plan.hidden_dim
        self.router = nn.Linear(d, e, bias=False)
        self.w1 = nn.Parameter(torch.empty(e, d, f))
        self.w2 = nn.Parameter(torch.empty(e, f, d))
        if plan.activation == "swiglu":
            self.w3 = nn.Parameter(torch.empty(e, d, f))
        else:
            self.register_parameter("w3", None)

    def forward(self, x: Tensor, pools: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        logits = self.router(flat)
        probs = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probs.topk(self.top_k, dim=-1)
        if self.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = self.dispatch(flat, experts)
        y = (y * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)
        losses = {"load_balance": self.load_balance(probs, experts)} if self.training else {}
        return y.view(b, t, d), losses

    def dispatch(self, flat: Tensor, experts: Tensor) -> Tensor:
        """Each token through each of its experts: flat [n, d], experts [n, k] -> [n, k, d].

        Rows are sorted by expert and put back by gathers, so no sum depends on the order of threads.
        """
        n, k = experts.shape
        by_expert, order = experts.reshape(-1).sort(stable=True)
        offsets = torch.searchsorted(by_expert, torch.arange(self.num_experts, device=flat.device), right=True)
        rows = flat[order // k]
        up = grouped_linear(rows, self.w3, offsets) if self.w3 is not None else None
        hidden = activate(self.activation, grouped_linear(rows, self.w1, offsets), up)
        out = grouped_linear(hidden, self.w2, offsets)
        return out[order.argsort()].view(n, k, -1)

    def load_balance(self, probs: Tensor, experts: Tensor) -> Tensor:
        """coef * e * sum_i f_i P_i: share of assignments times mean router probability, 1 * coef when even.

        Ref: Fedus et al. 2021 (2101.03961), equations 4 to 6.
        """
        ones = torch.ones_like(experts, dtype=probs.dtype).reshape(-1)
        counts = probs.new_zeros(self.num_experts).scatter_add(0, experts.reshape(-1), ones)
        share = counts / experts.numel()
        return self.load_balance_coef * self.num_experts * (share * probs.mean(dim=0)).sum()
