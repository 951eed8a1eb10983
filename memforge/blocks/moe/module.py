"""A mixture of experts in torch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memforge.blocks.ffn.module import Ffn, activate
from memforge.blocks.moe.spec import MoePlan
from memforge_kernels import grouped_linear


class Route(NamedTuple):
    """Which tokens each expert works on: row i is token[i] times weight[i]; expert j has the rows up to offsets[j]."""

    token: Tensor  # [r] int64
    weight: Tensor  # [r]
    offsets: Tensor  # [e] int64


class Moe(nn.Module):
    """Sum over a token's experts of router probability * expert(x), beside the shared experts.

    Shape: x [b, t, d] -> [b, t, d]. In training mode the router's losses are returned beside it. In evaluation mode
    every token visits its top_k experts: nothing is dropped and nothing depends on the rest of the batch.
    """

    def __init__(self, plan: MoePlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.plan = plan
        e, d, f = plan.num_experts, plan.dim, plan.hidden_dim
        self.router = nn.Linear(d, e, bias=False)
        self.w1 = nn.Parameter(torch.empty(e, d, f))
        self.w2 = nn.Parameter(torch.empty(e, f, d))
        if plan.activation == "swiglu":
            self.w3 = nn.Parameter(torch.empty(e, d, f))
        else:
            self.register_parameter("w3", None)
        shared = plan.shared()
        self.shared = Ffn(shared, norm_eps) if shared is not None else None

    def forward(self, x: Tensor, pools: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        logits = self.router(flat)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs = logits.softmax(dim=-1)
        y = self.experts(flat, self.route(probs))
        if self.shared is not None:
            y = y + self.shared(flat, pools)[0]
        return y.view(b, t, d), self.losses(logits, probs) if self.training else {}

    def route(self, probs: Tensor) -> Route:
        rows = self.plan.rows_per_expert(probs.shape[0]) if self.training else None
        if rows is None:
            return self.tokens_choose(probs)
        return self.experts_choose(probs, rows) if self.plan.router == "expert_choice" else self.limited(probs, rows)

    def experts(self, flat: Tensor, route: Route) -> Tensor:
        """The weighted sum of the experts' outputs: flat [n, d] -> [n, d]."""
        rows = flat[route.token]
        up = grouped_linear(rows, self.w3, route.offsets) if self.w3 is not None else None
        hidden = activate(self.plan.activation, grouped_linear(rows, self.w1, route.offsets), up)
        out = grouped_linear(hidden, self.w2, route.offsets)
        return torch.zeros_like(flat).index_add(0, route.token, out * route.weight.to(out.dtype).unsqueeze(1))

    def tokens_choose(self, probs: Tensor) -> Route:
        """Every token with each of its top_k experts: probs [n, e] -> a route of n * top_k rows, by expert."""
        weights, experts = probs.topk(self.plan.top_k, dim=-1)
        if self.plan.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        by_expert, order = experts.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(self.plan.num_experts, device=probs.device), right=True)
        return Route(order // self.plan.top_k, weights.reshape(-1)[order], ends)

    def limited(self, probs: Tensor, capacity: int) -> Route:
        """As tokens choose, but the first `capacity` tokens of each expert only; free rows hold token 0, weight 0.

        Tokens come first in the order of the batch, so that none loses its place to a later token of its sequence.
        """
        choice, e = self.tokens_choose(probs), self.plan.num_experts
        row = torch.arange(choice.token.shape[0], device=probs.device)
        expert = torch.searchsorted(choice.offsets, row, right=True)
        starts = torch.cat((choice.offsets.new_zeros(1), choice.offsets[:-1]))
        rank = row - starts[expert]
        # One row more takes all that are dropped.
        target = torch.where(rank < capacity, expert * capacity + rank, e * capacity)
        token = choice.token.new_zeros(e * capacity + 1).scatter(0, target, choice.token)[:-1]
        weight = choice.weight.new_zeros(e * capacity + 1).scatter(0, target, choice.weight)[:-1]
        return Route(token, weight, self.even_offsets(capacity, probs))

    def experts_choose(self, probs: Tensor, capacity: int) -> Route:
        """Every expert with the `capacity` tokens that give it most: probs [n, e] -> a route of e * capacity rows.

        Ref: Zhou et al. 2022 (2202.09368), section 3.2.
        """
        weights, tokens = probs.T.topk(capacity, dim=-1)
        return Route(tokens.reshape(-1), weights.reshape(-1), self.even_offsets(capacity, probs))

    def even_offsets(self, rows: int, like: Tensor) -> Tensor:
        return torch.arange(1, self.plan.num_experts + 1, device=like.device) * rows

    def losses(self, logits: Tensor, probs: Tensor) -> dict[str, Tensor]:
        """Named scalars, each with its coefficient applied; those with a coefficient of zero are left out."""
        losses = {}
        if self.plan.load_balance_coef:
            losses["load_balance"] = self.plan.load_balance_coef * self.load_balance(probs)
        if self.plan.z_loss_coef:
            losses["router_z"] = self.plan.z_loss_coef * logits.logsumexp(dim=-1).square().mean()
        return losses

    def load_balance(self, probs: Tensor) -> Tensor:
        """e * sum_i f_i P_i: share of the choices times mean router probability, 1 when even.

        Ref: Fedus et al. 2021 (2101.03961), equations 4 to 6.
        """
        experts = probs.topk(self.plan.top_k, dim=-1).indices.reshape(-1)
        counts = probs.new_zeros(self.plan.num_experts).scatter_add(
            0, experts, torch.ones_like(experts).to(probs.dtype)
        )
        return self.plan.num_experts * (counts / experts.numel() * probs.mean(dim=0)).sum()
