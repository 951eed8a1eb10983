"""What each rank of a mesh holds: parameters, gradients and optimizer state."""

from collections.abc import Iterator
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT
from memforge.cost.memory import state_bytes, updated_by_rows
from memforge.errors import UsageError
from memforge.mesh import MESH_AXES, Mesh, columns_of, shard_of
from memforge.plan import ModelPlan, ParamRow


def per_rank(plan: ModelPlan, mesh: Mesh, *, dense_values: bool = False) -> dict[str, Any]:
    """The largest share that any rank holds. Raises UsageError where a pool has fewer columns than memory ranks."""
    for row in plan.params:
        if row.group == "values" and row.shape[-1] < mesh.memory:
            raise UsageError(f"--mesh: memory={mesh.memory} is more than the {row.shape[-1]} columns of {row.path}")
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
    """Elements of each parameter on the rank that has most of it: of dense ones the first, of pools the last."""
    for row in plan.params:
        of_rank, rank = (columns_of, mesh.memory - 1) if row.group == "values" else (shard_of, 0)
        piece = of_rank(row.shape, mesh, rank)
        yield row, row.numel // row.shape[piece.dim] * piece.length
