"""Parameter-efficient expert retrieval: product keys choose single-neuron experts (He 2024, 2407.04153)."""

from typing import ClassVar, Literal

from pydantic import Field

from memforge.blocks.base import Kind, OpCost, Param, Site
from memforge.blocks.experts.spec import ExpertsSpec
from memforge.blocks.product_keys.spec import ProductKeyPlan, ProductKeyPoolSpec, ProductKeySpec

Activation = Literal["gelu", "relu", "silu"]


class PeerSpec(ProductKeySpec):
    """Product-key lookup of experts with one hidden neuron: top_k of num_sub_keys ** 2 per head."""

    POOL: ClassVar[type[ProductKeyPoolSpec]] = ExpertsSpec

    kind: Literal["peer"] = "peer"
    activation: Activation = Field("gelu", description="of the single neuron")

    def plan(self, site: Site, path: str) -> "PeerPlan":
        pool = self.pool_spec(site)
        assert pool is not None
        sizes = {"num_sub_keys": pool.num_sub_keys, "dtype": pool.dtype}
        return PeerPlan(**self.resolved(site, path, pool=self.pool_at(path), **sizes))


class PeerPlan(ProductKeyPlan):
    kind: Literal["peer"]
    activation: Activation

    def params(self) -> tuple[Param, ...]:
        return self.key_params()

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        n = batch * seq_len
        rows = 2 * n * self.num_heads * self.top_k * self.dim
        return (*self.key_costs(n), OpCost("gather_dot", rows, 2 * rows), OpCost("weighted_gather", rows, 2 * rows))


KIND = Kind(
    name="peer",
    role="block",
    spec=PeerSpec,
    plan=PeerPlan,
    module="memforge.blocks.peer.module:Peer",
    examples=(
        {"num_sub_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 16},
        {"num_sub_keys": 5, "num_heads": 3, "top_k": 5, "key_dim": 6, "activation": "relu", "qk_norm": True},
        {"num_sub_keys": 7, "num_heads": 1, "top_k": 2, "key_dim": 2, "activation": "silu"},
    ),
    summary="retrieval of single-neuron experts by product keys",
)
