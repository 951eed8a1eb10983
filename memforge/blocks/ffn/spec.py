"""The dense feed-forward block."""

from typing import Literal

from pydantic import Field

from memforge.blocks.base import (
    Dim,
    Kind,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    Saved,
    Scratch,
    Site,
    linear,
    matmul_cost,
    normal,
)

Activation = Literal["swiglu", "gelu", "relu2"]


class FfnSpec(KindSpec):
    """A feed-forward network, the default block of every layer."""

    kind: Literal["ffn"] = "ffn"
    hidden_dim: Dim = Field(description="hidden width")
    activation: Activation = Field("swiglu", description="swiglu has a third matrix; relu2 is the squared ReLU")

    def plan(self, site: Site, path: str) -> "FfnPlan":
        return FfnPlan(**self.resolved(site, path))


class FfnPlan(KindPlan):
    kind: Literal["ffn"]
    hidden_dim: int
    activation: Activation

    def params(self) -> tuple[Param, ...]:
        d, f = self.dim, self.hidden_dim
        up = linear("w3", d, f, normal(d**-0.5)) if self.activation == "swiglu" else ()
        return (
            *linear("w1", d, f, normal(d**-0.5)),
            *linear("w2", f, d, normal((2 * self.num_layers * f) ** -0.5)),
            *up,
        )

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, d, f = batch * seq_len, self.dim, self.hidden_dim
        up = (matmul_cost("w3", n, d, f),) if self.activation == "swiglu" else ()
        return (matmul_cost("w1", n, d, f), *up, matmul_cost("w2", n, f, d))

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return hidden_saved(self.activation, batch * seq_len * self.hidden_dim)

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        return Scratch(0, hidden_scratch(self.activation, batch * seq_len * self.hidden_dim))


def hidden_saved(activation: Activation, numel: int) -> tuple[Saved, ...]:
    """What the hidden layer keeps, `numel` elements each: before the activation and after; swiglu both its factors."""
    factors = ("up", "silu") if activation == "swiglu" else ()
    return tuple(Saved(what, numel) for what in ("hidden", *factors, "activated"))


def hidden_scratch(activation: Activation, numel: int) -> int:
    """Bytes of the gradients of the hidden layer beside what is kept; the kept product is freed before its factors'."""
    return 4 * numel * (2 if activation == "swiglu" else 1)


KIND = Kind(
    name="ffn",
    role="block",
    spec=FfnSpec,
    plan=FfnPlan,
    module="memforge.blocks.ffn.module:Ffn",
    examples=(
        {"hidden_dim": 48},
        {"hidden_dim": 33, "activation": "gelu"},
        {"hidden_dim": 1, "activation": "relu2"},
    ),
    summary="dense feed-forward network",
)
