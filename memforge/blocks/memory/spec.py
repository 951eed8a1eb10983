"""The product-key memory layer (Berges et al. 2024, section 3.1; Lample et al. 2019)."""

from typing import ClassVar, Literal

from pydantic import Field

from memforge.blocks.base import (
    Dim,
    Kind,
    OpCost,
    Param,
    Saved,
    Scratch,
    Site,
    TableRead,
    linear,
    matmul_cost,
    normal,
    rows_cost,
)
from memforge.blocks.product_keys.spec import ProductKeyPlan, ProductKeyPoolSpec, ProductKeySpec
from memforge.blocks.values.spec import ValuesSpec

Gate = Literal["none", "sigmoid", "swilu"]


class MemorySpec(ProductKeySpec):
    """Product-key lookup: top_k of num_sub_keys ** 2 slots per head, their rows summed by softmax weight."""

    POOL: ClassVar[type[ProductKeyPoolSpec]] = ValuesSpec
    POOL_KEYS: ClassVar[tuple[str, ...]] = ("num_sub_keys", "value_dim", "dtype")

    kind: Literal["memory"] = "memory"
    gate: Gate = Field("none", description="swilu: W2(y * silu(W1 x)); sigmoid: one scalar per token")
    value_dim: Literal["model"] | Dim | None = Field(None, description="of the block's own pool")

    def plan(self, site: Site, path: str) -> "MemoryPlan":
        pool = self.pool_spec(site)
        assert isinstance(pool, ValuesSpec)
        sizes = {"num_sub_keys": pool.num_sub_keys, "value_dim": pool.width(site), "dtype": pool.dtype}
        return MemoryPlan(**self.resolved(site, path, pool=self.pool_at(path), **sizes))


class MemoryPlan(ProductKeyPlan):
    kind: Literal["memory"]
    gate: Gate
    value_dim: int

    @property
    def has_value_proj(self) -> bool:
        """swilu's W2 maps back to the model width by itself; other gates need a projection for that."""
        return self.gate != "swilu" and self.value_dim != self.dim

    def params(self) -> tuple[Param, ...]:
        d, v = self.dim, self.value_dim
        rows = [*self.key_params()]
        if self.gate == "swilu":
            rows += [*linear("w1", d, v, normal(d**-0.5)), *linear("w2", v, d, normal(d**-0.5))]
        if self.gate == "sigmoid":
            rows += linear("gate_proj", d, 1, normal(d**-0.5))
        if self.has_value_proj:
            rows += linear("value_proj", v, d, normal(v**-0.5))
        return tuple(rows)

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, d, v = batch * seq_len, self.dim, self.value_dim
        gather = rows_cost("weighted_gather", n, self.num_heads * self.top_k, v, self.num_sub_keys**2, self.dtype)
        costs = [*self.key_costs(n), gather]
        if self.gate == "swilu":
            costs += [matmul_cost("w1", n, d, v), matmul_cost("w2", n, v, d)]
        if self.gate == "sigmoid":
            costs.append(matmul_cost("gate_proj", n, d, 1))
        if self.has_value_proj:
            costs.append(matmul_cost("value_proj", n, v, d))
        return tuple(costs)

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        n, v = batch * seq_len, self.value_dim
        rows = [*self.key_saved(n)]
        if self.gate == "swilu":
            rows += [Saved(what, n * v) for what in ("read", "gate", "silu", "gated")]
        if self.gate == "sigmoid":
            rows += [Saved("read", n * v), Saved("gate", n)]
        if self.has_value_proj:
            rows.append(Saved("projected", n * v))
        return tuple(rows)

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        return self.read_scratch(batch * seq_len)

    def factors(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        n, reads = batch * seq_len, batch * seq_len * self.num_heads * self.top_k
        return (
            Saved("slots", reads, "int64"),
            Saved("weights", reads),
            Saved("gradient of what was read", n * self.value_dim),
        )

    def table_reads(self) -> tuple[TableRead, ...]:
        """Without a gate and a projection the rows are the output of the block, which only adds them."""
        kept = self.gate != "none" or self.has_value_proj
        return (TableRead("weighted_gather", "values", self.num_heads * self.top_k, kept=kept),)


KIND = Kind(
    name="memory",
    role="block",
    spec=MemorySpec,
    plan=MemoryPlan,
    module="memforge.blocks.memory.module:Memory",
    examples=(
        {"num_sub_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 16},
        {"num_sub_keys": 8, "num_heads": 2, "top_k": 8, "key_dim": 16, "gate": "swilu", "qk_norm": True},
        {"num_sub_keys": 5, "num_heads": 1, "top_k": 2, "key_dim": 6, "gate": "sigmoid", "value_dim": 12},
        {"num_sub_keys": 6, "num_heads": 3, "top_k": 2, "key_dim": 2, "gate": "swilu", "value_dim": 20},
    ),
    summary="product-key memory over a pool of values",
)
