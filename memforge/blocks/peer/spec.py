"""Parameter-efficient expert retrieval: product keys choose single-neuron experts (He 2024, 2407.04153)."""

from typing import ClassVar, Literal

from pydantic import Field

from memforge.blocks.base import Kind, OpCost, Param, Saved, Scratch, Site, TableRead, rows_cost
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
        ops = (
            rows_cost(op, n, self.num_heads * self.top_k, self.dim, self.num_sub_keys**2, self.dtype)
            for op in ("gather_dot", "weighted_gather")
        )
        return (*self.key_costs(n), *ops)

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """The neurons before the activation (a ReLU needs none), after it, and times their weights."""
        n = batch * seq_len
        before = () if self.activation == "relu" else ("neurons",)
        reads = n * self.num_heads * self.top_k
        return (*self.key_saved(n), *(Saved(what, reads) for what in (*before, "activated", "weighted")))

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        return self.read_scratch(batch * seq_len)

    def factors(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """Of up, weighted neurons and the gradient of the output; of down, the input and that of the neurons."""
        n, reads = batch * seq_len, batch * seq_len * self.num_heads * self.top_k
        neurons = tuple(Saved(what, reads) for what in ("weighted", "gradient of the neurons"))
        vectors = tuple(Saved(what, n * self.dim) for what in ("input", "gradient of what was read"))
        return Saved("slots", reads, "int64"), *neurons, *vectors

    def table_reads(self) -> tuple[TableRead, ...]:
        reads = self.num_heads * self.top_k
        return (
            TableRead("gather_dot", "down", reads),
            TableRead("weighted_gather", "up", reads, same_slots=True, kept=False),
        )


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
