"""Parameter-efficient expert retrieval in torch."""

from torch import Tensor, nn

from memforge.blocks.peer.spec import PeerPlan
from memforge.blocks.pools import Pools
from memforge.blocks.product_keys.module import ProductKeys


class Peer(ProductKeys):
    """out = sum over heads and selected experts of softmax(score) * activation(<down, x>) * up.

    Shape: x [b, t, d] -> [b, t, d].
    Ref: He 2024 (2407.04153), section 2.
    """

    def __init__(self, plan: PeerPlan, norm_eps: float, pool: nn.Module | None = None) -> None:
        super().__init__(plan, norm_eps, pool)
        self.activation = plan.activation

    def forward(self, x: Tensor, pools: Pools) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, d = x.shape
        flat = x.reshape(b * t, d)
        slots, weights = self.lookup(flat, pools.reader)
        y = self.pool_among(pools)(flat, slots, weights.to(x.dtype), self.activation, pools.reader)
        return y.view(b, t, d), {}
