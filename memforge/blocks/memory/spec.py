"""The product-key memory layer (Berges et al. 2024, section 3.1; Lample et al. 2019)."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from memforge.blocks.base import (
    Dim,
    DType,
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
    uniform,
    unknown,
)
from memforge.blocks.values.spec import SubKeys, ValuesSpec
from memforge.errors import Problem

Gate = Literal["none", "sigmoid", "swilu"]


class MemorySpec(KindSpec):
    """Product-key lookup: top_k of num_sub_keys ** 2 slots per head, their rows summed by softmax weight."""

    kind: Literal["memory"] = "memory"
    pool: str | None = Field(None, description="the [pool.NAME] to read; without it the block owns a pool")
    num_heads: Annotated[int, Field(ge=1, le=256)] = Field(description="independent lookups per token")
    top_k: Annotated[int, Field(ge=1, le=1024)] = Field(description="slots read per head")
    key_dim: Annotated[int, Field(ge=2, le=2**16)] = Field(description="width of a query, both halves together")
    gate: Gate = Field("none", description="swilu: W2(y * silu(W1 x)); sigmoid: one scalar per token")
    qk_norm: bool = Field(False, description="RMSNorm on query halves and sub-keys")
    num_sub_keys: SubKeys | None = Field(None, description="of the block's own pool, when it names none")
    value_dim: Literal["model"] | Dim | None = Field(None, description="of the block's own pool")
    dtype: DType | None = Field(None, description="of the block's own pool")

    def reads(self) -> str | None:
        return self.pool

    def own_pool(self) -> ValuesSpec | None:
        if self.pool is not None or self.num_sub_keys is None:
            return None
        return ValuesSpec(
            num_sub_keys=self.num_sub_keys, value_dim=self.value_dim or "model", dtype=self.dtype or "float32"
        )

    def check(self, site: Site) -> Iterator[Problem]:
        if self.key_dim % 2:
            yield Problem(("key_dim",), f"key_dim = {self.key_dim} is odd; a query is split into two halves")
        if self.top_k == 1:
            yield Problem(
                ("top_k",),
                "with top_k = 1 the softmax weight is always 1, so the query and the sub-keys would get no gradient",
            )
        if self.pool is None:
            if self.num_sub_keys is None:
                yield Problem((), "a memory block needs `pool` or its own `num_sub_keys`", at_key=True)
        else:
            yield from self._check_reader(site)
        if (pool := self._pool(site)) and self.top_k > pool.num_sub_keys:
            where = () if self.pool is None else ((("pool", self.pool, "num_sub_keys"), "num_sub_keys is set here"),)
            yield Problem(
                ("top_k",),
                f"top_k = {self.top_k} is more than num_sub_keys = {pool.num_sub_keys}",
                f"each half offers {pool.num_sub_keys} sub-keys to choose from",
                where,
                siblings=("num_sub_keys", "pool"),
            )

    def _check_reader(self, site: Site) -> Iterator[Problem]:
        assert self.pool is not None
        if self.pool not in site.pools:
            yield unknown(("pool",), "pool", self.pool, sorted(site.pools))
            return
        if not isinstance(site.pools[self.pool], ValuesSpec):
            kind = site.pools[self.pool].kind
            yield Problem(("pool",), f"pool `{self.pool}` holds {kind}; a memory block reads values")
        for key in ("num_sub_keys", "value_dim", "dtype"):
            if getattr(self, key) is not None:
                yield Problem(
                    (key,),
                    f"`{key}` belongs to the pool that all its readers share",
                    f"set it in [pool.{self.pool}]",
                    ((("pool", self.pool), "the pool is defined here"),),
                    at_key=True,
                )

    def _pool(self, site: Site) -> ValuesSpec | None:
        pool = self.own_pool() if self.pool is None else site.pools.get(self.pool)
        return pool if isinstance(pool, ValuesSpec) else None

    def plan(self, site: Site, path: str) -> "MemoryPlan":
        pool = self._pool(site)
        assert pool is not None
        where = f"{path}.pool" if self.pool is None else f"pool.{self.pool}"
        sizes = {"num_sub_keys": pool.num_sub_keys, "value_dim": pool.width(site), "dtype": pool.dtype}
        return MemoryPlan(**self.resolved(site, path, pool=where, **sizes))


class MemoryPlan(KindPlan):
    kind: Literal["memory"]
    pool: str
    num_heads: int
    top_k: int
    key_dim: int
    gate: Gate
    qk_norm: bool
    num_sub_keys: int
    value_dim: int
    dtype: DType

    def pool_path(self) -> str:
        return self.pool

    def pool_rows_per_token(self) -> int:
        return self.num_heads * self.top_k

    @property
    def has_value_proj(self) -> bool:
        """swilu's W2 maps back to the model width by itself; other gates need a projection for that."""
        return self.gate != "swilu" and self.value_dim != self.dim

    def params(self) -> tuple[Param, ...]:
        d, v, query_dim = self.dim, self.value_dim, self.num_heads * self.key_dim
        rows = [
            # Xavier uniform: sqrt(6 / (fan_in + fan_out)); the bias as torch starts it, 1 / sqrt(fan_in).
            *linear("query", d, query_dim, uniform((6 / (d + query_dim)) ** 0.5), bias=uniform(d**-0.5)),
            Param(
                "sub_keys",
                (self.num_heads, 2, self.num_sub_keys, self.key_dim // 2),
                uniform(self.key_dim**-0.5),
            ),
        ]
        if self.qk_norm:
            rows += [norm("query_norm", self.key_dim // 2), norm("key_norm", self.key_dim // 2)]
        if self.gate == "swilu":
            rows += [*linear("w1", d, v, normal(d**-0.5)), *linear("w2", v, d, normal(d**-0.5))]
        if self.gate == "sigmoid":
            rows += linear("gate_proj", d, 1, normal(d**-0.5))
        if self.has_value_proj:
            rows += linear("value_proj", v, d, normal(v**-0.5))
        return tuple(rows)

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n, d, v, h, k = batch * seq_len, self.dim, self.value_dim, self.num_heads, self.top_k
        gather = 2 * n * h * k * v
        costs = [
            matmul_cost("query", n, d, h * self.key_dim),
            # Both halves score s sub-keys of key_dim / 2 channels. Only the k selected rows of each half have a
            # gradient, for the query and for the sub-keys.
            OpCost("product_key_topk", 2 * n * h * self.num_sub_keys * self.key_dim, 4 * n * h * k * self.key_dim),
            OpCost("weighted_gather", gather, 2 * gather),
        ]
        if self.gate == "swilu":
            costs += [matmul_cost("w1", n, d, v), matmul_cost("w2", n, v, d)]
        if self.gate == "sigmoid":
            costs.append(matmul_cost("gate_proj", n, d, 1))
        if self.has_value_proj:
            costs.append(matmul_cost("value_proj", n, v, d))
        return tuple(costs)


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
