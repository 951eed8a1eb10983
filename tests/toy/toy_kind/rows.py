"""A second kind of pool, and the block that reads it."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from memforge.blocks.base import Kind, KindPlan, KindSpec, OpCost, Param, Saved, Site, normal, unknown
from memforge.errors import Problem


class RowsSpec(KindSpec):
    """num_rows rows of the model's width."""

    kind: Literal["rows"] = "rows"
    num_rows: int = Field(ge=1, le=1000, description="rows in the pool")

    def plan(self, site: Site, path: str) -> "RowsPlan":
        return RowsPlan(**self.resolved(site, path))


class RowsPlan(KindPlan):
    kind: Literal["rows"]
    num_rows: int

    def params(self) -> tuple[Param, ...]:
        return (Param("rows", (self.num_rows, self.dim), normal(1.0), group="values", decay=False),)

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        return ()

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return ()


class FetchSpec(KindSpec):
    """y = x * mean of the pool's rows."""

    kind: Literal["fetch"] = "fetch"
    source: str = Field(description="the pool to read")

    def reads(self) -> str:
        return self.source

    def check(self, site: Site) -> Iterator[Problem]:
        if self.source not in site.pools:
            yield unknown(("source",), "pool", self.source, sorted(site.pools))

    def plan(self, site: Site, path: str) -> "FetchPlan":
        return FetchPlan(**self.resolved(site, path))


class FetchPlan(KindPlan):
    kind: Literal["fetch"]
    source: str

    def pool_path(self) -> str:
        return f"pool.{self.source}"

    def params(self) -> tuple[Param, ...]:
        return ()

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        return (OpCost("mean", 0, 0),)

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return (Saved("mean", self.dim),)


ROWS = Kind(
    name="rows",
    role="pool",
    spec=RowsSpec,
    plan=RowsPlan,
    module="toy_kind.module:Rows",
    examples=({"num_rows": 3},),
    summary="rows",
    reader={"kind": "fetch", "source": "example"},
)
FETCH = Kind(
    name="fetch",
    role="block",
    spec=FetchSpec,
    plan=FetchPlan,
    module="toy_kind.module:Fetch",
    examples=(),
    summary="reads rows",
)
