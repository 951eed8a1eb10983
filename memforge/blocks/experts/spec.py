"""A pool of single-neuron experts that PEER blocks read."""

from typing import Literal

from memforge.blocks.base import DType, Kind, KindPlan, OpCost, Param, Saved, Site, normal
from memforge.blocks.product_keys.spec import ProductKeyPoolSpec


class ExpertsSpec(ProductKeyPoolSpec):
    """A pool of num_sub_keys ** 2 single-neuron experts: one vector down to the neuron, one up from it."""

    kind: Literal["experts"] = "experts"

    def plan(self, site: Site, path: str) -> "ExpertsPlan":
        return ExpertsPlan(**self.resolved(site, path))


class ExpertsPlan(KindPlan):
    kind: Literal["experts"]
    num_sub_keys: int
    dtype: DType

    def params(self) -> tuple[Param, ...]:
        """down and up [m, d]. Both start as a row of a feed-forward matrix of width d does; neither decays, since rows
        that are not read would shrink without ever seeing a gradient.
        """
        shape, start = (self.num_sub_keys**2, self.dim), normal(self.dim**-0.5)
        return tuple(
            Param(name, shape, start, group="values", decay=False, dtype=self.dtype) for name in ("down", "up")
        )

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        """Nothing of its own: reading rows is the cost of the block that reads them."""
        return ()

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return ()


KIND = Kind(
    name="experts",
    role="pool",
    spec=ExpertsSpec,
    plan=ExpertsPlan,
    module="memforge.blocks.experts.module:Experts",
    examples=({"num_sub_keys": 8}, {"num_sub_keys": 5}),
    summary="single-neuron experts read by peer blocks",
    reader={"kind": "peer", "pool": "example", "num_heads": 2, "top_k": 3, "key_dim": 8},
)
