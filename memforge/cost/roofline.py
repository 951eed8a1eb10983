"""The least time that a training step can take on a device: each op at the rate of its scarcer resource.

Ref: Williams, Waterman & Patterson 2009, "Roofline".
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT, DType, OpCost
from memforge.cost.devices import Device


def update_bytes(dtype: DType) -> tuple[int, int]:
    """Bytes that AdamW reads and writes for one parameter: weight and gradient, in its type, and two fp32 moments."""
    size = BYTES_PER_ELEMENT[dtype]
    return 2 * size + 8, size + 8


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step. `update` moves, of pools, the rows that the batch touches; `update_dense` all of them.

    `by_kind` is forward and backward together, `memory_bound` the share of them that bandwidth limits; `work` the FLOPs
    and the bytes of each kind, forward and backward.
    """

    device: Device
    forward: float
    backward: float
    update: float
    update_dense: float
    by_kind: dict[str, float]
    work: dict[str, tuple[int, int]]
    memory_bound: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update

    def as_dict(self, peak: int, peak_checkpointed: int) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "dtype": self.device.dtype,
            "source": self.device.source,
            "flops_per_second": self.device.flops_per_second,
            "bytes_per_second": self.device.bytes_per_second,
            "memory_bytes": self.device.memory_bytes,
            "fits": peak <= self.device.memory_bytes,
            "fits_checkpointed": peak_checkpointed <= self.device.memory_bytes,
            "seconds": {
                "forward": self.forward,
                "backward": self.backward,
                "update": self.update,
                "update_dense": self.update_dense,
                "total": self.total,
            },
            "by_kind": self.by_kind,
            "work": {kind: {"flops": flops, "bytes": moved} for kind, (flops, moved) in self.work.items()},
            "memory_bound": self.memory_bound,
        }


def roofline(costs: Iterable[tuple[str, OpCost]], updated: int, updated_dense: int, device: Device) -> Roofline:
    """Seconds of a step of ops, each with the kind of its block, and of updates that move so many bytes.

    FLOPs are the counted ones, since fused attention skips what is masked. Element-wise work is taken to be fused.
    """
    forward = backward = limited = 0.0
    by_kind: dict[str, float] = defaultdict(float)
    work: dict[str, tuple[int, int]] = {}
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
            size = weights * weight_bytes + activations * other_bytes
            moving = size / device.bytes_per_second
            known = work.get(kind, (0, 0))
            work[kind] = (known[0] + flops, known[1] + size)
            both.append(max(computing, moving))
            limited += moving if moving > computing else 0.0
        forward, backward = forward + both[0], backward + both[1]
        by_kind[kind] += sum(both)
    return Roofline(
        device=device,
        forward=forward,
        backward=backward,
        update=updated / device.bytes_per_second,
        update_dense=updated_dense / device.bytes_per_second,
        by_kind=dict(by_kind),
        work=work,
        memory_bound=min(1.0, limited / (forward + backward)),
    )
