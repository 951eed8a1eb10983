"""What share of what a device can do a run gets out of it."""

from dataclasses import dataclass

import torch

from memforge.blocks.base import BYTES_PER_ELEMENT
from memforge.cost.calibration import read_calibration
from memforge.cost.devices import DEVICES
from memforge.cost.ledger import touched
from memforge.cost.roofline import update_bytes
from memforge.plan import Plan


@dataclass(frozen=True)
class Peak:
    """What a device can do at most; None where that is not known."""

    flops_per_second: float | None
    bytes_per_second: float | None


def peak_of(device: str) -> Peak:
    """By the maker's datasheet of a GPU, or the calibration of this machine's CPU (memforge doctor --calibrate)."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        found = next((d for key, d in DEVICES.items() if key in name.replace(" ", "")), None)
        return Peak(None, None) if found is None else Peak(found.flops_per_second, found.bytes_per_second)
    machine = read_calibration()
    if machine is None or not machine.is_of_this_machine():
        return Peak(None, None)
    return Peak(1 / min(seconds for _, seconds in machine.matmul.forward), 1 / machine.stream)


class MachineUse:
    """Turns the time of steps into shares of the peak of so many devices.

    `flops` and `pool_bytes` are those of a step on each of them.
    """

    def __init__(self, plan: Plan, flops_per_token: float, peak: Peak, devices: int = 1) -> None:
        train = plan.run.train
        assert train is not None
        self.peak, tokens = peak, train.batch_size * train.seq_len
        self.flops, self.pool_bytes = tokens * flops_per_token / devices, _pool_bytes(plan, tokens) / devices

    def shares(self, steps: int, seconds: float) -> dict[str, float]:
        """mfu: counted FLOPs over the peak; memory_bandwidth: bytes of pool rows that were moved over the peak."""
        found = {}
        if self.peak.flops_per_second is not None:
            found["mfu"] = steps * self.flops / seconds / self.peak.flops_per_second
        if self.peak.bytes_per_second is not None and self.pool_bytes:
            found["memory_bandwidth"] = steps * self.pool_bytes / seconds / self.peak.bytes_per_second
        return {name: round(value, 4) for name, value in found.items()}


def _pool_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of pools that a step moves: rows read forward and backward, and the expected rows of an update."""
    total = 0
    for row in plan.model.params:
        if row.group != "values":
            continue
        width = row.numel // row.shape[0]
        reads = sum(read.draws * read.rows for read in row.reads) * tokens
        updated = row.shape[0] if plan.run.pool_update.dense else touched(row, tokens)["uniform"]
        total += width * (2 * reads * BYTES_PER_ELEMENT[row.dtype] + updated * sum(update_bytes(row.dtype)))
    return total
