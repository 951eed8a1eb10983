import torch
from torch import Tensor, nn

from toy_kind.rows import FetchPlan, RowsPlan
from toy_kind.spec import ScalePlan


class Scale(nn.Module):
    def __init__(self, plan: ScalePlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(plan.dim))
        self.mix = nn.Linear(plan.dim, plan.dim, bias=False)

    def forward(self, x: Tensor, pools: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mix(x * self.scale), {}


class Rows(nn.Module):
    def __init__(self, plan: RowsPlan) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(plan.num_rows, plan.dim))

    def forward(self) -> Tensor:
        return self.rows.mean(dim=0)


class Fetch(nn.Module):
    def __init__(self, plan: FetchPlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.source = plan.source

    def forward(self, x: Tensor, pools: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        return x * pools[self.source](), {}
