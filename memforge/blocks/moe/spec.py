"""A mixture of feed-forward experts: token choice, dropless or with a capacity, or expert choice."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from memforge.blocks.base import (
    Dim,
    Kind,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    RowReads,
    Saved,
    Scratch,
    Site,
    linear,
    matmul_cost,
    normal,
)
from memforge.blocks.ffn.spec import Activation, FfnPlan, hidden_saved, hidden_scratch
from memforge.errors import Problem

Experts = Annotated[int, Field(ge=1, le=65_536)]
Router = Literal["token_choice", "expert_choice"]
Coefficient = Annotated[float, Field(ge=0, le=10)]

DEFAULT_LOAD_BALANCE = 0.01


class MoeSpec(KindSpec):
    """Several feed-forward networks, of which a token visits top_k.

    In evaluation every token visits its own top_k and none is dropped, whatever the router and the capacity: an answer
    does not depend on the batch it is computed in.
    """

    kind: Literal["moe"] = "moe"
    num_experts: Experts = Field(description="experts in the block")
    top_k: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="experts per token; on average, if they choose")
    hidden_dim: Dim = Field(description="hidden width of one expert")
    activation: Activation = Field("swiglu", description="as in ffn")
    router: Router = Field(
        "token_choice", description="who chooses in training; expert_choice lets a token see those after it"
    )
    capacity_factor: Annotated[float, Field(gt=0, le=1024)] | None = Field(
        None, description="largest load of an expert over the even one, more is dropped; no limit when absent"
    )
    num_shared_experts: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="experts that every token visits, as one feed-forward network of their joint width"
    )
    normalize_top_k: bool = Field(False, description="rescale the weights of the chosen experts to sum to one")
    load_balance_coef: Coefficient | None = Field(
        None,
        description=f"weight of the load-balance loss (Fedus et al. 2021, eq. 4-6); {DEFAULT_LOAD_BALANCE} when absent",
    )
    z_loss_coef: Coefficient = Field(0.0, description="weight of the router z loss (Zoph et al. 2022, eq. 5)")

    def check(self, site: Site) -> Iterator[Problem]:
        if self.top_k > self.num_experts:
            message = f"top_k = {self.top_k} is more than num_experts = {self.num_experts}"
            yield Problem(("top_k",), message, siblings=("num_experts",))
        if self.normalize_top_k and self.top_k == 1 < self.num_experts and self.router == "token_choice":
            yield Problem(
                ("normalize_top_k",),
                "with top_k = 1 the rescaled weight is always 1, so the router would get no gradient",
                siblings=("top_k", "num_experts"),
            )
        if self.num_shared_experts * self.hidden_dim > 2**17:
            wide = f"{self.num_shared_experts} shared experts of width {self.hidden_dim} are wider than 131,072"
            yield Problem(("num_shared_experts",), wide, siblings=("hidden_dim",))
        if self.router == "expert_choice":
            yield from self._check_expert_choice()

    def _check_expert_choice(self) -> Iterator[Problem]:
        for key, given, why in (
            ("capacity_factor", self.capacity_factor, "experts that choose are always full; top_k sets their size"),
            ("load_balance_coef", self.load_balance_coef, "experts that choose are in balance by themselves"),
            ("normalize_top_k", self.normalize_top_k, "a token may be chosen by any number of experts"),
        ):
            if given:
                yield Problem((key,), why, f"remove `{key}`, or let the tokens choose", siblings=("router",))

    def plan(self, site: Site, path: str) -> "MoePlan":
        default = DEFAULT_LOAD_BALANCE if self.router == "token_choice" else 0.0
        coef = default if self.load_balance_coef is None else self.load_balance_coef
        return MoePlan(**self.resolved(site, path, load_balance_coef=coef))


def part_of(n: int, share: tuple[int, int]) -> int:
    """A fraction of n, rounded up. It is traced as well, with n a symbol."""
    numerator, denominator = share
    return -(-n * numerator // denominator)


class MoePlan(KindPlan):
    kind: Literal["moe"]
    num_experts: int
    top_k: int
    hidden_dim: int
    activation: Activation
    router: Router
    capacity_factor: float | None
    num_shared_experts: int
    normalize_top_k: bool
    load_balance_coef: float
    z_loss_coef: float

    def looks_ahead(self) -> str | None:
        if self.router == "token_choice":
            return None
        return (
            "expert choice is not causal: in training an expert picks among all tokens of the batch, later ones "
            "included; evaluation is by token choice"
        )

    def share(self) -> tuple[int, int] | None:
        """The share of all tokens that each expert takes in training, a fraction; None where the routing decides."""
        if self.router == "token_choice" and self.capacity_factor is None:
            return None
        factor = 1 if self.capacity_factor is None else Fraction(str(self.capacity_factor))
        return min(Fraction(factor * self.top_k, self.num_experts), Fraction(1)).as_integer_ratio()

    def rows_per_expert(self, n: int) -> int | None:
        """Rows of every expert for n tokens in training, rounded up; None where the routing decides."""
        return None if (share := self.share()) is None else part_of(n, share)

    def shared(self) -> FfnPlan | None:
        """The shared experts side by side: a feed-forward network of their joint width."""
        if not self.num_shared_experts:
            return None
        return FfnPlan(
            kind="ffn",
            path=f"{self.path}.shared",
            dim=self.dim,
            num_layers=self.num_layers,
            hidden_dim=self.num_shared_experts * self.hidden_dim,
            activation=self.activation,
        )

    def params(self) -> tuple[Param, ...]:
        d, e, f = self.dim, self.num_experts, self.hidden_dim
        # Experts that choose are always full: none of them rests, whatever the tokens are.
        read = RowReads(draws=1, rows=self.top_k, whole_per_batch=self.router == "expert_choice")
        inner, outer = normal(d**-0.5), normal((2 * self.num_layers * f) ** -0.5)
        up = (Param("w3", (e, d, f), inner, reads=read),) if self.activation == "swiglu" else ()
        shared = self.shared()
        return (
            *linear("router", d, e, normal(d**-0.5)),
            Param("w1", (e, d, f), inner, reads=read),
            Param("w2", (e, f, d), outer, reads=read),
            *up,
            *(replace(p, name=f"shared.{p.name}") for p in (shared.params() if shared else ())),
        )

    def rows(self, n: int) -> int:
        """Rows that all experts together run on for n tokens in training, those that hold no token included."""
        limited = self.rows_per_expert(n)
        return n * self.top_k if limited is None else self.num_experts * limited

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, d, f, e = batch * seq_len, self.dim, self.hidden_dim, self.num_experts
        executed = self.rows(n)
        # Experts with a capacity run on all of it; rows that hold no token are no work of the model.
        counted = executed if self.router == "expert_choice" else min(n * self.top_k, executed)

        def expert(op: str, a: int, b: int) -> OpCost:
            ran, asked = (matmul_cost(op, rows, a, b, num_matrices=e) for rows in (executed, counted))
            return replace(ran, counted_forward=asked.forward, counted_backward=asked.backward)

        shared = self.shared()
        return (
            matmul_cost("router", n, d, e),
            expert("w1", d, f),
            *((expert("w3", d, f),) if self.activation == "swiglu" else ()),
            expert("w2", f, d),
            *(replace(cost, op=f"shared.{cost.op}") for cost in (shared.costs(batch, seq_len) if shared else ())),
        )

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        n, rows, shared = batch * seq_len, self.rows(batch * seq_len), self.shared()
        return (
            *self._routing_saved(n, rows),
            Saved("offsets", self.num_experts, "int64"),
            Saved("dispatched", rows * self.dim),
            Saved("returned", rows * self.dim),
            *hidden_saved(self.activation, rows * self.hidden_dim),
            *(shared.saved(batch, seq_len) if shared else ()),
        )

    def _routing_saved(self, n: int, rows: int) -> Iterator[Saved]:
        """What is kept of who goes where, and of the losses of the router."""
        e, k, limited = self.num_experts, self.top_k, self.capacity_factor is not None
        yield Saved("probabilities", n * e)
        if self.router == "token_choice":
            yield from (Saved("chosen", n * k, "int64"), Saved("order", n * k, "int64"))
            if self.normalize_top_k:
                yield from (Saved("weights", n * k), Saved("weight_sums", n))
            if self.load_balance_coef:
                yield Saved("shares", e)
        if limited:
            yield Saved("places", n * k, "int64")
        # With a capacity, one place more than there are takes all that are dropped.
        places = rows + 1 if limited else rows
        yield from (Saved("tokens", places, "int64"), Saved("row_weights", places))
        if self.z_loss_coef:
            yield from (Saved("logits", n * e), Saved("log_sum_exp", n))

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        """Backward holds the gradients of the hidden layer and of the dispatched rows."""
        rows = self.rows(batch * seq_len)
        return Scratch(0, hidden_scratch(self.activation, rows * self.hidden_dim) + 4 * rows * self.dim)


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
        {"num_experts": 4, "top_k": 2, "hidden_dim": 12, "capacity_factor": 1.25, "num_shared_experts": 2},
        {"num_experts": 3, "hidden_dim": 16, "capacity_factor": 0.5, "z_loss_coef": 0.001},
        {"num_experts": 3, "hidden_dim": 16, "router": "expert_choice", "z_loss_coef": 0.001},
        {"num_experts": 4, "top_k": 2, "hidden_dim": 9, "router": "expert_choice", "activation": "relu2"},
    ),
    summary="mixture of experts: token choice, dropless or with a capacity, or expert choice",
)
