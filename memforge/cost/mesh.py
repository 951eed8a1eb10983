"""What each rank of a mesh holds: parameters, gradients and optimizer state."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT
from memforge.cost.memory import state_bytes, updated_by_rows
from memforge.errors import UsageError, printable
from memforge.plan import ModelPlan, ParamRow

MESH_AXES = ("dp_replicate", "dp_shard", "memory")
MAX_RANKS = 2**20


@dataclass(frozen=True)
class Mesh:
    """dp_replicate x dp_shard x memory ranks, each with tokens of its own.

    Dense parameters are sharded by rows (dimension 0) over the dp_shard x memory ranks of a replica, as FSDP does it:
    the last shard may be short or empty. Value pools are sharded by columns over the `memory` ranks and replicated over
    the others.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    memory: int = 1

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.memory


def parse_mesh(text: str) -> Mesh:
    """The mesh of "dp_shard=8,memory=4". Raises UsageError for anything else."""
    found = re.fullmatch(r"\s*\w+\s*=\s*[0-9]{1,18}\s*(,\s*\w+\s*=\s*[0-9]{1,18}\s*)*", text)
    pairs = [(axis.strip(), int(size)) for axis, size in (part.split("=") for part in text.split(","))] if found else []
    names = [axis for axis, _ in pairs]
    if not pairs or len(set(names)) != len(names) or not set(names) <= set(MESH_AXES) or min(s for _, s in pairs) < 1:
        raise UsageError(f"--mesh {printable(text)}: expected AXIS=N,.. with AXIS in {', '.join(MESH_AXES)}")
    mesh = Mesh(**dict(pairs))
    if mesh.ranks > MAX_RANKS:
        raise UsageError(f"--mesh {printable(text)}: {mesh.ranks:,} ranks are more than {MAX_RANKS:,}")
    return mesh


def per_rank(plan: ModelPlan, mesh: Mesh, *, dense_values: bool = False) -> dict[str, Any]:
    """The largest share that any rank holds. Raises UsageError where columns do not divide over the memory ranks."""
    for row in plan.params:
        if row.group == "values" and row.shape[-1] % mesh.memory:
            raise UsageError(f"--mesh: memory={mesh.memory} does not divide the {row.shape[-1]} columns of {row.path}")
    shares = list(_shares(plan, mesh))
    weights = sum(numel * BYTES_PER_ELEMENT[row.dtype] for row, numel in shares)
    return {
        "axes": {axis: getattr(mesh, axis) for axis in MESH_AXES},
        "ranks": mesh.ranks,
        "params_per_rank": sum(numel for _, numel in shares),
        "dense_params_per_rank": sum(numel for row, numel in shares if row.group == "dense"),
        "pool_params_per_rank": sum(numel for row, numel in shares if row.group == "values"),
        "weight_bytes_per_rank": weights,
        # That of a pool stays in factors, which follow the tokens of a step and not its size.
        "gradient_bytes_per_rank": sum(
            numel * BYTES_PER_ELEMENT[row.dtype] for row, numel in shares if dense_values or not updated_by_rows(row)
        ),
        "optimizer_bytes_per_rank": sum(numel * state_bytes(row) for row, numel in shares),
    }


def _shares(plan: ModelPlan, mesh: Mesh) -> Iterator[tuple[ParamRow, int]]:
    """Elements of each parameter on the rank that has most of it: the first."""
    shards = mesh.dp_shard * mesh.memory
    for row in plan.params:
        if row.group == "values":
            yield row, row.numel // mesh.memory
        else:
            rows = -(-row.shape[0] // shards)
            yield row, rows * (row.numel // row.shape[0])
