"""The dense feed-forward block in torch."""

import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks.ffn.spec import Activation, FfnPlan
from memforge.blocks.pools import Pools


def activate(kind: Activation, hidden: Tensor, up: Tensor | None) -> Tensor:
    """silu(hidden) * up, gelu(hidden), or relu(hidden) squared (So et al. 2021, 2109.08668)."""
    if kind == "swiglu":
        assert up is not None
        return F.silu(hidden) * up
    return F.gelu(hidden) if kind == "gelu" else F.relu(hidden).square()


class Ffn(nn.Module):
    """Shape: x [b, t, d] -> [b, t, d]."""

    def __init__(self, plan: FfnPlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = plan.activation
        self.w1 = nn.Linear(plan.dim, plan.hidden_dim, bias=False)
        self.w2 = nn.Linear(plan.hidden_dim, plan.dim, bias=False)
        self.w3 = nn.Linear(plan.dim, plan.hidden_dim, bias=False) if plan.activation == "swiglu" else None

    def forward(self, x: Tensor, pools: Pools) -> tuple[Tensor, dict[str, Tensor]]:
        up = self.w3(x) if self.w3 is not None else None
        return self.w2(activate(self.activation, self.w1(x), up)), {}
