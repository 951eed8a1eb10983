"""What each rank of a mesh holds, what it sends, and the least time that its step takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT
from memforge.cost.access import distinct_uniform
from memforge.cost.links import rank_roofline
from memforge.cost.memory import state_bytes, step_memory, updated_by_rows
from memforge.cost.rank_memory import RankMemory, RankStep
from memforge.cost.roofline import Roofline, update_bytes
from memforge.cost.wire import StepOnWire, Total, totals
from memforge.mesh import MESH_AXES, Mesh, Split, SplitChoice, part_of_pool, shard_of
from memforge.plan import LAZY, ModelPlan, ParamRow, PoolUpdate, require_parts, split_of


@dataclass(frozen=True)
class RankShare:
    """A step of one pass over `batch` sequences on every rank of a mesh, as the rank sees it that has most to hold.

    `pools` says how they are shared out, `update` how they are updated. Raises UsageError where a rank would have
    nothing of a pool.
    """

    plan: ModelPlan
    mesh: Mesh
    batch: int
    seq_len: int
    pools: SplitChoice = "auto"
    update: PoolUpdate = LAZY
    dropout: bool = False

    def __post_init__(self) -> None:
        require_parts(self.plan, self.pools, self.mesh)

    @cached_property
    def splits(self) -> dict[str, Split]:
        return dict(split_of(self.plan, self.pools, self.mesh))

    def _by_rows(self, row: ParamRow) -> bool:
        return self.splits[row.owner] == "rows"

    @cached_property
    def held(self) -> list[tuple[ParamRow, tuple[int, ...]]]:
        """The shape of each parameter on the rank that has most: the last of a group by columns, else the first."""
        found = []
        for row in self.plan.params:
            if row.group == "dense":
                piece = shard_of(row.shape, self.mesh, 0)
            else:
                rank = 0 if self._by_rows(row) else self.mesh.memory - 1
                piece = part_of_pool(row.shape, self.mesh, rank, self.splits[row.owner])
            found.append((row, piece.shape(row.shape)))
        return found

    @property
    def update_traffic(self) -> int:
        """Bytes that the update moves: of pools those of the rows that the tokens of all ranks are expected to read."""
        moved, tokens = 0, self.batch * self.seq_len * self.mesh.ranks
        for row, shape in self.held:
            numel = math.prod(shape)
            if updated_by_rows(row, self.update):
                numel = numel * distinct_uniform(row.reads, tokens, row.shape[0]) // row.shape[0]
            moved += numel * sum(update_bytes(row.dtype))
        return moved

    @cached_property
    def memory(self) -> RankMemory:
        if self.mesh.ranks == 1:
            step = step_memory(self.plan, self.batch, self.seq_len, update=self.update)
            peaks = (step.peak, step.peak_in, step.peak_checkpointed, step.peak_checkpointed_in)
            return RankMemory(step.activations, step.activations_checkpointed, 0, 0, 0, *peaks)
        return RankStep(self.plan, self.mesh, self.batch, self.seq_len, self.pools, self.update).memory()

    def sent(self, *, checkpoint_layers: bool = False) -> list[Total]:
        """The collectives of the last rank of a memory group, which serves most columns."""
        step = StepOnWire(
            self.plan,
            self.mesh,
            self.mesh.memory - 1,
            [[self.batch]] * self.mesh.ranks,
            self.seq_len,
            pools=self.pools,
            update=self.update,
            checkpoint_layers=checkpoint_layers,
            dropout=self.dropout,
        )
        return totals(step.collectives())


def per_rank(
    plan: ModelPlan,
    mesh: Mesh,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    pools: SplitChoice = "auto",
    update: PoolUpdate = LAZY,
    dropout: bool = False,
    computing: Iterable[Roofline] = (),
) -> dict[str, Any]:
    """The record of a mesh, by the figures of the rank that has most: see RankShare, which may raise UsageError.

    `computing` are the times that devices need for the tokens of one rank: as many others serve it as it serves, so
    that they are those of its forward and backward pass.
    """
    t = plan.max_seq_len if seq_len is None else seq_len
    share = RankShare(plan, mesh, batch, t, pools, update, dropout)
    memory = share.memory
    held = [(row, math.prod(shape)) for row, shape in share.held]
    once, again = share.sent(), share.sent(checkpoint_layers=True)
    lines = []
    for line in computing:
        own = (line.forward, line.backward, share.update_traffic / line.device.bytes_per_second)
        lines.append(rank_roofline(own, once, mesh, line.device).as_dict(memory.peak, memory.peak_checkpointed))
    return {
        "axes": {axis: getattr(mesh, axis) for axis in MESH_AXES},
        "ranks": mesh.ranks,
        "pools": share.splits if mesh.memory > 1 else {},
        "params_per_rank": sum(numel for _, numel in held),
        "dense_params_per_rank": sum(numel for row, numel in held if row.group == "dense"),
        "pool_params_per_rank": sum(numel for row, numel in held if row.group == "values"),
        "weight_bytes_per_rank": sum(numel * BYTES_PER_ELEMENT[row.dtype] for row, numel in held),
        # That of a pool stays in factors, which follow the tokens of a step and not its size.
        "gradient_bytes_per_rank": sum(
            numel * BYTES_PER_ELEMENT[row.dtype] for row, numel in held if not updated_by_rows(row, update)
        ),
        "optimizer_bytes_per_rank": sum(state_bytes(row, shape, update) for row, shape in share.held),
        "activation_bytes_per_rank": memory.activations,
        "activation_bytes_checkpointed_per_rank": memory.activations_checkpointed,
        "gathered_bytes_per_rank": memory.gathered,
        "scattered_bytes_per_rank": memory.scattered,
        "served_bytes_per_rank": memory.served,
        "peak_bytes_per_rank": memory.peak,
        "peak_in": memory.peak_in,
        "peak_bytes_checkpointed_per_rank": memory.peak_checkpointed,
        "peak_checkpointed_in": memory.peak_checkpointed_in,
        "wire": {
            "rows": [_row(total) for total in once],
            "sent_bytes": sum(total.sent for total in once),
            "sent_bytes_checkpointed": sum(total.sent for total in again),
        },
        "roofline": lines,
    }


def _row(total: Total) -> dict[str, Any]:
    return {
        "what": total.what,
        "op": total.op,
        "group": total.group,
        "ranks": total.size,
        "count": total.number,
        "payload_bytes": total.payload,
        "sent_bytes": total.sent,
        "expected": total.expected,
    }
