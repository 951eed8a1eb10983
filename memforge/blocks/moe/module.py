"""A mixture of experts in torch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memforge.blocks.ffn.module import Ffn, activate
from memforge.blocks.moe.spec import MoePlan, part_of
from memforge.blocks.pools import Pools
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
        self.plan, self.share = plan, plan.share()
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

    def forward(self, x: Tensor, pools: Pools) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        logits = self.router(flat)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs = logits.softmax(dim=-1)
        rows = part_of(b * t, self.share) if self.training and self.share is not None else None
        if rows is not None and self.plan.router == "expert_choice":
            route, chosen = self.experts_choose(probs, rows), None
        else:
            weights, chosen = probs.topk(self.plan.top_k, dim=-1)
            route = self.tokens_choose(weights, chosen)
            if self.training:  # before any is dropped
                pools.observed["load"] = route.offsets.diff(prepend=route.offsets.new_zeros(1)) / chosen.numel()
            route = route if rows is None else self.limited(route, rows)
        y = self.experts(flat, route)
        if self.shared is not None:
            y = y + self.shared(flat, pools)[0]
        return y.view(b, t, d), self.losses(logits, probs, chosen) if self.training else {}

    def experts(self, flat: Tensor, route: Route) -> Tensor:
        """The weighted sum of the experts' outputs: flat [n, d] -> [n, d]."""
        rows = flat[route.token]
        up = grouped_linear(rows, self.w3, route.offsets) if self.w3 is not None else None
        hidden = activate(self.plan.activation, grouped_linear(rows, self.w1, route.offsets), up)
        out = grouped_linear(hidden, self.w2, route.offsets)
        out = out * route.weight.to(out.dtype).unsqueeze(1)
        # Not index_add, which keeps its source for a backward pass that needs only the index.
        return torch.zeros_like(flat).index_put((route.token,), out, accumulate=True)

    def tokens_choose(self, weights: Tensor, experts: Tensor) -> Route:
        """Every token with each of its experts: weights and experts [n, k] -> a route of n * k rows, by expert."""
        if self.plan.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        by_expert, order = experts.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(self.plan.num_experts, device=experts.device), right=True)
        return Route(order // self.plan.top_k, weights.reshape(-1)[order], ends)

    def limited(self, route: Route, capacity: int) -> Route:
        """The first `capacity` tokens of each expert; places that stay free hold token 0 with weight 0.

        Tokens come in the order of the batch, so that none loses its place to a later token of its sequence.
        """
        e, device = self.plan.num_experts, route.token.device
        row = torch.arange(route.token.shape[0], device=device)
        expert = torch.searchsorted(route.offsets, row, right=True)
        starts = torch.cat((route.offsets.new_zeros(1), route.offsets[:-1]))
        rank = row - starts[expert]
        # One place more takes all that are dropped.
        place = torch.where(rank < capacity, expert * capacity + rank, e * capacity)
        token = route.token.new_zeros(e * capacity + 1).scatter(0, place, route.token)[:-1]
        weight = route.weight.new_zeros(e * capacity + 1).scatter(0, place, route.weight)[:-1]
        return Route(token, weight, self.even_offsets(capacity, device))

    def experts_choose(self, probs: Tensor, capacity: int) -> Route:
        """Every expert with the `capacity` tokens that give it most: probs [n, e] -> a route of e * capacity rows.

        Ref: Zhou et al. 2022 (2202.09368), section 3.2.
        """
        weights, tokens = probs.T.topk(capacity, dim=-1)
        return Route(tokens.reshape(-1), weights.reshape(-1), self.even_offsets(capacity, probs.device))

    def even_offsets(self, rows: int, device: torch.device) -> Tensor:
        return torch.arange(1, self.plan.num_experts + 1, device=device) * rows

    def losses(self, logits: Tensor, probs: Tensor, chosen: Tensor | None) -> dict[str, Tensor]:
        """Named scalars, each times its coefficient; those with a coefficient of zero are left out."""
        losses = {}
        if self.plan.load_balance_coef and chosen is not None:
            losses["load_balance"] = self.plan.load_balance_coef * self.load_balance(probs, chosen)
        if self.plan.z_loss_coef:
            losses["router_z"] = self.plan.z_loss_coef * logits.logsumexp(dim=-1).square().mean()
        return losses

    def load_balance(self, probs: Tensor, chosen: Tensor) -> Tensor:
        """e * sum_i f_i P_i: share of the choices times mean router probability, 1 when even.

        Ref: Fedus et al. 2021 (2101.03961), equations 4 to 6.
        """
        ones = torch.ones_like(chosen, dtype=probs.dtype).reshape(-1)
        counts = probs.new_zeros(self.plan.num_experts).scatter_add(0, chosen.reshape(-1), ones)
        return self.plan.num_experts * (counts / chosen.numel() * probs.mean(dim=0)).sum()
