"""What memory and PEER blocks share: product-key retrieval over a pool (Lample et al. 2019, 1907.05242)."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from memforge.blocks.base import (
    DType,
    Init,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    RowReads,
    Saved,
    Scratch,
    Site,
    Traffic,
    linear,
    matmul_cost,
    norm,
    norm_saved,
    sphere,
    uniform,
    unknown,
)
from memforge.errors import Problem

# At most 2**32 slots, so that a slot and an fp32 score share one 64-bit sorting key (memforge_kernels.topk); with the
# widest row, 2**17, element offsets stay below 2**49.
SubKeys = Annotated[int, Field(ge=1, le=2**16)]


# What memforge_kernels.product_key_topk.cpu holds of them.
SCORES_AT_A_TIME = 2**22


KeyInit = Literal["uniform", "sphere"]


class ProductKeyPoolSpec(KindSpec):
    """A pool of num_sub_keys ** 2 slots."""

    num_sub_keys: SubKeys = Field(description="sub-keys per half; slots = num_sub_keys ** 2")
    dtype: DType = Field("float32", description="storage type of the rows")


class ProductKeySpec(KindSpec):
    """The keys of a block that picks top_k of num_sub_keys ** 2 slots per head."""

    POOL: ClassVar[type[ProductKeyPoolSpec]]
    POOL_KEYS: ClassVar[tuple[str, ...]] = ("num_sub_keys", "dtype")

    pool: str | None = Field(None, description="the [pool.NAME] to read; without it the block owns a pool")
    num_heads: Annotated[int, Field(ge=1, le=256)] = Field(description="independent lookups per token")
    top_k: Annotated[int, Field(ge=1, le=1024)] = Field(description="slots read per head")
    key_dim: Annotated[int, Field(ge=2, le=2**16)] = Field(description="width of a query, both halves together")
    qk_norm: bool = Field(False, description="RMSNorm on query halves and sub-keys")
    key_init: KeyInit = Field(
        "uniform", description="sub-keys of each head start uniform in a cube, or as directions of one length (sphere)"
    )
    num_sub_keys: SubKeys | None = Field(None, description="of the block's own pool, when it names none")
    dtype: DType | None = Field(None, description="of the block's own pool")

    def reads(self) -> str | None:
        return self.pool

    def own_pool(self) -> ProductKeyPoolSpec | None:
        if self.pool is not None or self.num_sub_keys is None:
            return None
        given = {key: getattr(self, key) for key in self.POOL_KEYS}
        return self.POOL(**{key: value for key, value in given.items() if value is not None})

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
                yield Problem((), f"a {self.kind} block needs `pool` or its own `num_sub_keys`", at_key=True)
        else:
            yield from self._check_reader(site)
        if (pool := self.pool_spec(site)) and self.top_k > pool.num_sub_keys:
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
        here = ((("pool", self.pool), "the pool is defined here"),)
        if not isinstance(site.pools[self.pool], self.POOL):
            held, wanted = site.pools[self.pool].kind, self.POOL.model_fields["kind"].default
            message = f"pool `{self.pool}` holds {held}; a {self.kind} block reads {wanted}"
            yield Problem(("pool",), message, f'[pool.{self.pool}] needs kind = "{wanted}"', here, at_key=False)
        for key in self.POOL_KEYS:
            if getattr(self, key) is not None:
                yield Problem(
                    (key,),
                    f"`{key}` belongs to the pool that all its readers share",
                    f"set it in [pool.{self.pool}]",
                    here,
                    at_key=True,
                )

    def pool_spec(self, site: Site) -> ProductKeyPoolSpec | None:
        """The pool this block reads, its own or a shared one; None where it is missing or of another kind."""
        pool = self.own_pool() if self.pool is None else site.pools.get(self.pool)
        return pool if isinstance(pool, self.POOL) else None

    def pool_at(self, path: str) -> str:
        return f"{path}.pool" if self.pool is None else f"pool.{self.pool}"


class ProductKeyPlan(KindPlan):
    pool: str
    num_heads: int
    top_k: int
    key_dim: int
    qk_norm: bool
    key_init: KeyInit
    num_sub_keys: int
    dtype: DType

    def pool_path(self) -> str:
        return self.pool

    def pool_reads(self) -> RowReads:
        return RowReads(draws=self.num_heads, rows=self.top_k)

    def key_params(self) -> tuple[Param, ...]:
        """Query projection, sub-keys [h, 2, s, q/2], and the gains of their norms."""
        d, query_dim, half = self.dim, self.num_heads * self.key_dim, self.key_dim // 2
        norms = (norm("query_norm", half), norm("key_norm", half)) if self.qk_norm else ()
        return (
            # Xavier uniform: sqrt(6 / (fan_in + fan_out)); the bias as torch starts it, 1 / sqrt(fan_in).
            *linear("query", d, query_dim, uniform((6 / (d + query_dim)) ** 0.5), bias=uniform(d**-0.5)),
            Param("sub_keys", (self.num_heads, 2, self.num_sub_keys, half), self._key_start()),
            *norms,
        )

    def _key_start(self) -> Init:
        """Of equal root mean square either way: sqrt(3) below the bound of a uniform distribution."""
        bound, half = self.key_dim**-0.5, self.key_dim // 2
        return uniform(bound) if self.key_init == "uniform" else sphere(bound / 3**0.5, half)

    def key_costs(self, n: int) -> tuple[OpCost, ...]:
        """Both halves score s sub-keys of key_dim / 2 channels. Only the k selected rows of each half have a gradient,
        for the query and for the sub-keys.
        """
        h, s, q, k = self.num_heads, self.num_sub_keys, self.key_dim, self.top_k
        # A score and an int64 slot are three elements. Backward reads the selected halves and writes all gradients.
        chosen = 3 * n * h * k
        moved = Traffic(h * s * q, n * h * q + chosen, 2 * h * s * q, 2 * n * h * q + n * h * k * q + chosen)
        return (
            matmul_cost("query", n, self.dim, h * q),
            OpCost(
                "product_key_topk",
                2 * n * h * s * q,
                4 * n * h * k * q,
                traffic=moved,
                engine="scoring",
                shape=(n, h, s, q, k),
            ),
        )

    def key_saved(self, n: int) -> tuple[Saved, ...]:
        """Queries, slots and weights; with qk_norm the norms of query halves and sub-keys as well."""
        h, s, q, k = self.num_heads, self.num_sub_keys, self.key_dim, self.top_k
        norms: tuple[Saved, ...] = ()
        if self.qk_norm:
            # The input of key_norm is a parameter, its output is kept for the scores.
            keys = norm_saved("key_norm", 2 * h * s, q // 2)[1:]
            norms = (*norm_saved("query_norm", 2 * n * h, q // 2), *keys, Saved("keys", h * s * q))
        return (*norms, Saved("queries", n * h * q), Saved("slots", n * h * k, "int64"), Saved("weights", n * h * k))

    def chosen(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """The slots of all heads and their scores."""
        reads = batch * seq_len * self.num_heads * self.top_k
        return (Saved("slots", reads, "int64"), Saved("scores", reads))

    def read_scratch(self, n: int) -> Scratch:
        """Forward: the best of both halves, scores and slots, those that were chosen. The room for the scores of some
        tokens is kept.

        Backward: the gradients of weights and scores, and of the queries.
        """
        h, s, q, k = self.num_heads, self.num_sub_keys, self.key_dim, self.top_k
        reads, scores = n * h * k, min(n * 2 * h * s, SCORES_AT_A_TIME)
        return Scratch(2 * reads * 12 + reads * 4, reads * (4 + 4) + n * h * q * 4, kept=scores * 4)
