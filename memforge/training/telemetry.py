"""What training tells about the memory: which slots are read, how evenly, and what their updates come to."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memforge.plan import ModelPlan
from memforge.training.ranks import ALONE, Ranks
from memforge.training.tables import ReadSite
from memforge_kernels import Record
from memforge_kernels.tape import Gathered

# Rows of a table whose updates are looked at: enough for three digits of a mean, and no cost beside a step.
SAMPLED_ROWS = 2048
TOP_SHARE = 0.01
BYTES_PER_SLOT = 4 + 1  # of SlotUsage: fp32 and bool


@dataclass
class SlotUsage:
    """The reads of a table's slots by one block.

    `weight` [m] fp32 is the sum of the weights with which this rank has read each slot since the last row of metrics,
    `ever` [m] bool whether any rank has read it at all before.
    """

    weight: Tensor
    ever: Tensor

    @classmethod
    def of(cls, slots: int, device: torch.device) -> "SlotUsage":
        return cls(torch.zeros(slots, device=device), torch.zeros(slots, dtype=torch.bool, device=device))

    def add(self, slots: Tensor, weights: Tensor) -> None:
        """Slots and weights of any one shape. The weight of an expert may be negative: its size counts."""
        weights = weights.reshape(-1).to(self.weight.dtype).abs().nan_to_num()  # of a step that will be left out
        self.weight.index_add_(0, slots.reshape(-1), weights)

    def figures(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Shares of the slots that were read, and how evenly their weight is spread; then the window starts anew.

        entropy and kl (to uniform) are in nats, top_1pct is what the most read 1% of slots take of the weight.
        Ref: Lample et al. 2019 (1907.05242), section 4.6.
        """
        m, weight = len(self.weight), ranks.total(self.weight)
        read = weight > 0
        self.ever |= read
        used = weight[read].double()
        self.weight.zero_()
        found = {"slots_used": len(used) / m, "slots_ever": int(self.ever.sum()) / m}
        if not len(used):
            return found
        share = used / used.sum()
        entropy = -float((share * share.log()).sum())
        top = share.topk(min(len(share), max(1, round(TOP_SHARE * m)))).values
        return found | {"entropy": entropy, "kl": math.log(m) - entropy, "top_1pct": float(top.sum())}


@dataclass
class Telemetry:
    """Figures of the blocks between two rows of metrics.

    `observed` are sums over `steps` of what the blocks say of themselves (memforge.blocks.pools.Pools), of a rank its
    part of the mean. What is summed up is summed over ranks only when it is asked for.
    """

    usage: dict[str, SlotUsage]
    device: torch.device | str = "cpu"
    ranks: Ranks = ALONE
    observed: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def of(cls, plan: ModelPlan, device: torch.device, ranks: Ranks = ALONE) -> "Telemetry":
        usage = {path: SlotUsage.of(slots, device) for path, slots in _slots_read(plan).items()}
        return cls(usage, device, ranks)

    def read(self, site: ReadSite, record: Record) -> None:
        """Count a read. A block that reads two tables with the same slots counts once."""
        if isinstance(record, Gathered):
            self.usage[site.reader].add(record.slots, record.weights)

    def observe(self, observed: Mapping[str, Tensor]) -> None:
        """Add the figures of one step."""
        self.steps += 1
        for name, value in observed.items():
            self.observed[name] = self.observed[name] + value if name in self.observed else value.clone()

    def figures(self) -> dict[str, float]:
        """All figures since the last call, by name."""
        found = dict(self._observed())
        for path, usage in self.usage.items():
            found |= {f"{path}.{name}": value for name, value in usage.figures(self.ranks).items()}
        self.observed, self.steps = {}, 0
        return found

    def _observed(self) -> Iterator[tuple[str, float]]:
        for name, total in self.observed.items():
            mean = self.ranks.total(total.double()) / self.steps
            if not mean.dim():
                yield name, float(mean)
                continue
            # The shares of a router's choices that went to each expert.
            yield f"{name}_max", float(mean.max()) * len(mean)
            yield f"{name}_entropy", -float(torch.special.xlogy(mean, mean).sum())

    def state(self) -> dict[str, Tensor]:
        """All of it by name, summed over ranks."""
        total = self.ranks.total
        state = {f"observed.{name}": total(value) for name, value in self.observed.items()}
        for path, usage in self.usage.items():
            state |= {f"{path}.weight": total(usage.weight), f"{path}.ever": usage.ever}
        return state | {"steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; of what is summed over ranks, the first has all and the others nothing."""
        self.steps, share = int(state["steps"]), 1 if self.ranks.is_first else 0
        for name, value in state.items():
            if name.startswith("observed."):
                self.observed[name.removeprefix("observed.")] = share * value.to(self.device)
        for path, usage in self.usage.items():
            usage.weight.copy_(share * state[f"{path}.weight"])
            usage.ever.copy_(state[f"{path}.ever"])


def _slots_read(plan: ModelPlan) -> dict[str, int]:
    """How many slots each block that reads a pool can choose from, by its path."""
    slots = {row.owner: row.shape[0] for row in plan.params if row.group == "values"}
    readers = {block.path: block.pool_path() for layer in plan.layers for block in layer.blocks}
    return {path: slots[pool] for path, pool in readers.items() if pool is not None}


def usage_bytes(plan: ModelPlan) -> int:
    """What every rank keeps of the usage of slots, which is no part of a step and so not in its ledger."""
    return BYTES_PER_SLOT * sum(_slots_read(plan).values())


def update_figures(
    tables: Mapping[str, Tensor], touched: Mapping[str, Tensor], update: Callable[[], None], ranks: Ranks = ALONE
) -> dict[str, float]:
    """Make an update, and say what it did to a sample of the touched rows [u] of each table.

    moved: the norm of the change over that of the rows; lost: for tables in 16 bits, the share of elements that a
    rounding left as they were.
    """
    sampled = {name: rows[:: max(1, len(rows) // SAMPLED_ROWS)] for name, rows in touched.items()}
    before = {name: tables[name].detach()[rows] for name, rows in sampled.items()}
    update()
    found = {}
    for name, rows in sampled.items():
        old, new = before[name].double(), tables[name].detach()[rows].double()
        parts = (
            (new - old).square().sum(),
            old.square().sum(),
            (new == old).double().sum(),
            torch.ones_like(old).sum(),
        )
        # Of several ranks each has some of the columns, or some of the rows, of which it may have read none.
        moved, size, same, numbers = ranks.total_of_group(torch.stack(parts)).tolist()
        if numbers:
            found[f"{name}.moved"] = math.sqrt(moved / max(size, 1e-300))
        if numbers and tables[name].dtype in (torch.bfloat16, torch.float16):
            found[f"{name}.lost"] = same / numbers
    return found
