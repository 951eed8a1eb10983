"""Grouped-query causal self-attention with rotary positions."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from memforge.blocks.base import (
    Kind,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    Site,
    linear,
    matmul_cost,
    norm,
    normal,
)
from memforge.errors import Problem

Heads = Annotated[int, Field(ge=1, le=1024)]


class AttentionSpec(KindSpec):
    """Causal self-attention, the mixer of every layer unless a [[place]] rule says otherwise."""

    kind: Literal["attention"] = "attention"
    num_heads: Heads = Field(description="query heads")
    num_kv_heads: Heads | None = Field(None, description="key and value heads; num_heads when absent")
    head_dim: Annotated[int, Field(ge=2, le=4096)] | None = Field(
        None, description="width of a head; dim / num_heads when absent"
    )
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = Field(500_000.0, description="base of the rotary angles")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys, per head, before the rotation")

    def check(self, site: Site) -> Iterator[Problem]:
        if self.head_dim is None and site.dim % self.num_heads:
            yield Problem(
                ("num_heads",),
                f"num_heads = {self.num_heads} does not divide model.dim = {site.dim}",
                "choose a divisor, or set head_dim",
                ((("model", "dim"), "dim is set here"),),
                siblings=("head_dim",),
            )
        elif (self.head_dim or site.dim // self.num_heads) % 2:
            width = self.head_dim or site.dim // self.num_heads
            key = "head_dim" if self.head_dim else "num_heads"
            message = f"the head width {width} is odd; rotary positions turn pairs of channels"
            yield Problem((key,), message, siblings=("head_dim",), depends=(("model", "dim"),))
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            yield Problem(
                ("num_kv_heads",),
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}",
                siblings=("num_heads",),
            )

    def plan(self, site: Site, path: str) -> "AttentionPlan":
        kv_heads, head_dim = self.num_kv_heads or self.num_heads, self.head_dim or site.dim // self.num_heads
        return AttentionPlan(**self.resolved(site, path, num_kv_heads=kv_heads, head_dim=head_dim))


class AttentionPlan(KindPlan):
    kind: Literal["attention"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool

    def params(self) -> tuple[Param, ...]:
        d, q_dim, kv_dim = self.dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = normal(d**-0.5)
        # Residual outputs shrink with depth so that the stream keeps unit variance (Radford et al. 2019, 2.3).
        outer = normal((2 * self.num_layers * q_dim) ** -0.5)
        norms = (norm("q_norm", self.head_dim), norm("k_norm", self.head_dim)) if self.qk_norm else ()
        return (
            *linear("wq", d, q_dim, inner),
            *linear("wk", d, kv_dim, inner),
            *linear("wv", d, kv_dim, inner),
            *linear("wo", q_dim, d, outer),
            *norms,
        )

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, q_dim, kv_dim = batch * seq_len, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        # Scores and mixing, each 2*t*t per channel; the executed matrices are full, a causal model needs half.
        scores = 4 * batch * seq_len * seq_len * q_dim
        return (
            matmul_cost("wq", n, self.dim, q_dim),
            matmul_cost("wk", n, self.dim, kv_dim),
            matmul_cost("wv", n, self.dim, kv_dim),
            OpCost("attention", scores, 2 * scores, scores // 2, scores),
            matmul_cost("wo", n, q_dim, self.dim),
        )


KIND = Kind(
    name="attention",
    role="mixer",
    spec=AttentionSpec,
    plan=AttentionPlan,
    module="memforge.blocks.attention.module:Attention",
    examples=(
        {"num_heads": 4},
        {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 10000.0},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "qk_norm": True},
    ),
    summary="causal self-attention with grouped queries and rotary positions",
)
