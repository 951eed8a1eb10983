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
    Saved,
    Scratch,
    Site,
    SpecModel,
    Traffic,
    linear,
    matmul_cost,
    norm,
    norm_saved,
    normal,
)
from memforge.errors import Problem

Heads = Annotated[int, Field(ge=1, le=1024)]


Factor = Annotated[float, Field(ge=1, le=1e6)]
Positions = Annotated[int, Field(ge=1, le=2**24)]


class LinearScaling(SpecModel):
    """Positions divided by `factor` (Chen et al. 2023, 2306.15595)."""

    kind: Literal["linear"]
    factor: Factor = Field(description="how much longer the context became")


class Llama3Scaling(SpecModel):
    """Long wavelengths stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""

    kind: Literal["llama3"]
    factor: Factor = Field(8.0, description="how much longer the context became")
    low_freq_factor: Factor = Field(1.0, description="wavelengths over original / this are stretched in full")
    high_freq_factor: Factor = Field(4.0, description="wavelengths under original / this are kept")
    original_max_seq_len: Positions = Field(description="context before the extension")


class YarnScaling(SpecModel):
    """Interpolation by how often a channel turns within the original context (Peng et al. 2023, 2309.00071)."""

    kind: Literal["yarn"]
    factor: Factor = Field(description="how much longer the context became")
    original_max_seq_len: Positions = Field(description="context before the extension")
    beta_fast: Factor = Field(32.0, description="channels that turn more often are kept")
    beta_slow: Factor = Field(1.0, description="channels that turn less often are stretched in full")


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class AttentionSpec(KindSpec):
    """Causal self-attention, the mixer of every layer unless a [[place]] rule says otherwise."""

    kind: Literal["attention"] = "attention"
    num_heads: Heads = Field(description="query heads")
    num_kv_heads: Heads | None = Field(None, description="key and value heads; num_heads when absent")
    head_dim: Annotated[int, Field(ge=2, le=4096)] | None = Field(
        None, description="width of a head; dim / num_heads when absent"
    )
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] = Field(500_000.0, description="base of the rotary angles")
    rope_scaling: RopeScaling | None = Field(
        None, description='longer contexts: { kind = "linear" | "llama3" | "yarn", factor = .. }'
    )
    window: Positions | None = Field(
        None, description="a token sees itself and the window - 1 tokens before it; all before it when absent"
    )
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
        scaling = self.rope_scaling
        if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
            yield Problem(
                ("rope_scaling", "high_freq_factor"),
                f"high_freq_factor = {scaling.high_freq_factor:g} is not above low_freq_factor = "
                f"{scaling.low_freq_factor:g}",
                siblings=("rope_scaling.low_freq_factor",),
            )
        if isinstance(scaling, YarnScaling) and scaling.beta_fast <= scaling.beta_slow:
            yield Problem(
                ("rope_scaling", "beta_fast"),
                f"beta_fast = {scaling.beta_fast:g} is not above beta_slow = {scaling.beta_slow:g}",
                siblings=("rope_scaling.beta_slow",),
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
    rope_scaling: RopeScaling | None
    window: int | None
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
        # Scores and mixing, each 2*t*t per channel as executed, in full matrices. A causal model needs half of that;
        # with a window of w only the band below the diagonal: w*t - w*w/2 pairs, which is t*t/2 at w = t.
        scores, w = 4 * batch * seq_len * seq_len * q_dim, min(self.window or seq_len, seq_len)
        needed = 2 * batch * w * (2 * seq_len - w) * q_dim
        moved = 2 * n * (q_dim + kv_dim)  # queries, keys, values and outputs; scores stay on the chip
        return (
            matmul_cost("wq", n, self.dim, q_dim),
            matmul_cost("wk", n, self.dim, kv_dim),
            matmul_cost("wv", n, self.dim, kv_dim),
            OpCost(
                "attention",
                scores,
                2 * scores,
                needed,
                2 * needed,
                Traffic(0, moved, 0, 2 * moved),
                engine="attention",
                shape=(batch, seq_len, self.num_heads, self.head_dim),
            ),
            matmul_cost("wo", n, q_dim, self.dim),
        )

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """As fused attention keeps it: no scores but one logarithm per query, the mask as it is added to scores."""
        n, h, kv, width = batch * seq_len, self.num_heads, self.num_kv_heads, self.head_dim
        norms = (*norm_saved("q_norm", n * h, width), *norm_saved("k_norm", n * kv, width)) if self.qk_norm else ()
        mask = () if self.window is None else (Saved("mask", seq_len * seq_len),)
        return (
            *norms,
            Saved("cos", seq_len * width // 2),
            Saved("sin", seq_len * width // 2),
            Saved("queries", n * h * width),
            Saved("keys", n * kv * width),
            Saved("values", n * kv * width),
            *mask,
            Saved("log_sum_exp", n * h),
            Saved("mixed", n * h * width),
        )

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        """Rotation holds the halves and their products; backward the gradients of queries, keys and values."""
        n, q_dim, kv_dim = batch * seq_len, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return Scratch(4 * n * 2 * (q_dim + kv_dim), 4 * n * 2 * (q_dim + 2 * kv_dim))


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
        {"num_heads": 4, "window": 3, "rope_scaling": {"kind": "linear", "factor": 2.0}},
        {"num_heads": 1, "window": 99, "rope_scaling": {"kind": "llama3", "original_max_seq_len": 8}},
        {"num_heads": 2, "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 4}},
    ),
    summary="causal self-attention with grouped queries and rotary positions",
)
