"""A mixture of feed-forward experts with token-choice routing."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from memforge.blocks.base import (
    Dim,
    Kind,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    Site,
    linear,
    matmul_cost,
    normal,
)
from memforge.blocks.ffn.spec import Activation
from memforge.errors import Problem

Experts = Annotated[int, Field(ge=1, le=65_536)]


class MoeSpec(KindSpec):
    """Each token goes to its top_k experts, without capacity limits: no token is dropped."""

    kind: Literal["moe"] = "moe"
    num_experts: Experts = Field(description="experts in the block")
    top_k: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="experts per token")
    hidden_dim: Dim = Field(description="hidden width of one expert")
    activation: Activation = Field("swiglu", description="as in ffn")
    router: Literal["token_choice"] = Field("token_choice", description="tokens choose experts")
    normalize_top_k: bool = Field(False, description="rescale the weights of the chosen experts to sum to one")
    load_balance_coef: Annotated[float, Field(ge=0, le=10)] = Field(
        0.01, description="weight of the load-balance loss (Fedus et al. 2021, eq. 4-6)"
    )

    def check(self, site: Site) -> Iterator[Problem]:
        if self.top_k > self.num_experts:
            message = f"top_k = {self.top_k} is more than num_experts = {self.num_experts}"
            yield Problem(("top_k",), message, siblings=("num_experts",))
        if self.normalize_top_k and self.top_k == 1 and self.num_experts > 1:
            yield Problem(
                ("normalize_top_k",),
                "with top_k = 1 the rescaled weight is always 1, so the router would get no gradient",
                siblings=("top_k", "num_experts"),
            )

    def plan(self, site: Site, path: str) -> "MoePlan":
        return MoePlan(**self.resolved(site, path))


class MoePlan(KindPlan):
    kind: Literal["moe"]
    num_experts: int
    top_k: int
    hidden_dim: int
    activation: Activation
    router: Literal["token_choice"]
    normalize_top_k: bool
    load_balance_coef: float

    def params(self) -> tuple[Param, ...]:
        d, e, f, k = self.dim, self.num_experts, self.hidden_dim, self.top_k
        inner, outer = normal(d**-0.5), normal((2 * self.num_layers * f) ** -0.5)
        up = (Param("w3", (e, d, f), inner, active=k * d * f),) if self.activation == "swiglu" else ()
        return (
            *linear("router", d, e, normal(d**-0.5)),
            Param("w1", (e, d, f), inner, active=k * d * f),
            Param("w2", (e, f, d), outer, active=k * d * f),
            *up,
        )

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, d, f = batch * seq_len, self.dim, self.hidden_dim
        rows = n * self.top_k
        up = (matmul_cost("w3", rows, d, f),) if self.activation == "swiglu" else ()
        return (
            matmul_cost("router", n, d, self.num_experts),
            matmul_cost("w1", rows, d, f),
            *up,
            matmul_cost("w2", rows, f, d),
        )


KIND = Kind(
    name="moe",
    role="block",
    spec=MoeSpec,
    plan=MoePlan,
    module="memforge.blocks.moe.module:Moe",
    examples=(
        {"num_experts": 4, "hidden_dim": 24},
        {"num_experts": 5, "top_k": 3, "hidden_dim": 17, "activation": "gelu", "normalize_top_k": True},
        {"num_experts": 1, "top_k": 1, "hidden_dim": 8, "load_balance_coef": 0.0},
    ),
    summary="token-choice mixture of experts, dropless",
)
