"""A block that scales each channel and mixes them once: the smallest kind with parameters and a cost."""

from typing import Literal

from pydantic import Field

from memforge.blocks.base import (
    Kind,
    KindPlan,
    KindSpec,
    OpCost,
    Param,
    Saved,
    Site,
    constant,
    linear,
    matmul_cost,
    normal,
)


class ScaleSpec(KindSpec):
    """y = W (scale * x)."""

    kind: Literal["scale"] = "scale"
    start: float = Field(1.0, ge=0, le=10, description="initial scale")

    def plan(self, site: Site, path: str) -> "ScalePlan":
        return ScalePlan(**self.resolved(site, path))


class ScalePlan(KindPlan):
    kind: Literal["scale"]
    start: float

    def params(self) -> tuple[Param, ...]:
        scale = Param("scale", (self.dim,), constant(self.start), decay=False)
        return (scale, *linear("mix", self.dim, self.dim, normal(self.dim**-0.5)))

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        return (matmul_cost("mix", batch * seq_len, self.dim, self.dim),)

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return (Saved("scaled", batch * seq_len * self.dim),)


KIND = Kind(
    name="scale",
    role="block",
    spec=ScaleSpec,
    plan=ScalePlan,
    module="toy_kind.module:Scale",
    examples=({}, {"start": 0.5}),
    summary="scaled channels, mixed once",
)
