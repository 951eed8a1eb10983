"""The least time that a training step can take on a device: each op at the rate of its scarcer resource.

Ref: Williams, Waterman & Patterson 2009, "Roofline".
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT, OpCost
from memforge.cost.devices import Device

# AdamW with fp32 weights and moments: read weight, gradient and two moments; write weight and moments.
UPDATE_READ, UPDATE_WRITTEN = 16, 12


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step. `update` writes every parameter, `update_rows` only what the batch touches.

    `by_kind` is forward and backward together, `memory_bound` the share of them that bandwidth limits.
    """

    device: Device
    forward: float
    backward: float
    update: float
    update_rows: float
    by_kind: dict[str, float]
    memory_bound: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "dtype": self.device.dtype,
            "source": self.device.source,
            "memory_bytes": self.device.memory_bytes,
            "seconds": {
                "forward": self.forward,
                "backward": self.backward,
                "update": self.update,
                "update_rows": self.update_rows,
                "total": self.total,
            },
            "by_kind": self.by_kind,
            "memory_bound": self.memory_bound,
        }


def roofline(costs: Iterable[tuple[str, OpCost]], num_params: int, num_touched: int, device: Device) -> Roofline:
    """Seconds of a step of ops, each with the kind of its block, and of the update of all parameters or those touched.

    FLOPs are the counted ones, since fused attention skips what is masked. Element-wise work is taken to be fused.
    """
    forward = backward = limited = 0.0
    by_kind: dict[str, float] = defaultdict(float)
    for kind, cost in costs:
        moved = cost.traffic
        weight_bytes = BYTES_PER_ELEMENT[moved.dtype or device.dtype]
        other_bytes = BYTES_PER_ELEMENT[device.dtype]
        both = []
        for flops, weights, activations in zip(
            cost.counted,
            (moved.weights, moved.backward_weights),
            (moved.activations, moved.backward_activations),
            strict=True,
        ):
            computing = flops / device.flops_per_second
            moving = (weights * weight_bytes + activations * other_bytes) / device.bytes_per_second
            both.append(max(computing, moving))
            limited += moving if moving > computing else 0.0
        forward, backward = forward + both[0], backward + both[1]
        by_kind[kind] += sum(both)
    seconds_per_param = (UPDATE_READ + UPDATE_WRITTEN) / device.bytes_per_second
    return Roofline(
        device=device,
        forward=forward,
        backward=backward,
        update=num_params * seconds_per_param,
        update_rows=num_touched * seconds_per_param,
        by_kind=dict(by_kind),
        memory_bound=limited / (forward + backward),
    )
