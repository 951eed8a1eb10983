"""A pool of value rows that one or many memory blocks read."""

from typing import Literal

from pydantic import Field

from memforge.blocks.base import Dim, DType, Kind, KindPlan, OpCost, Param, Saved, Site, normal
from memforge.blocks.product_keys.spec import ProductKeyPoolSpec


class ValuesSpec(ProductKeyPoolSpec):
    """A pool of num_sub_keys ** 2 trainable rows, owned by the model and read by memory blocks."""

    kind: Literal["values"] = "values"
    value_dim: Literal["model"] | Dim = Field("model", description='width of a row; "model" is model.dim')

    def width(self, site: Site) -> int:
        return site.dim if self.value_dim == "model" else self.value_dim

    def plan(self, site: Site, path: str) -> "ValuesPlan":
        return ValuesPlan(**self.resolved(site, path, value_dim=self.width(site)))


class ValuesPlan(KindPlan):
    kind: Literal["values"]
    num_sub_keys: int
    value_dim: int
    dtype: DType

    def params(self) -> tuple[Param, ...]:
        shape, start = (self.num_sub_keys**2, self.value_dim), normal(self.value_dim**-0.5)
        # No decay: rows that are not read would shrink without ever seeing a gradient.
        return (Param("values", shape, start, group="values", decay=False, dtype=self.dtype),)

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        """Nothing of its own: reading rows is the cost of the block that reads them."""
        return ()

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        return ()


KIND = Kind(
    name="values",
    role="pool",
    spec=ValuesSpec,
    plan=ValuesPlan,
    module="memforge.blocks.values.module:Values",
    examples=({"num_sub_keys": 8}, {"num_sub_keys": 5, "value_dim": 12}),
    summary="value rows read by memory blocks",
    reader={"kind": "memory", "pool": "example", "num_heads": 2, "top_k": 3, "key_dim": 8},
)
