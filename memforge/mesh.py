"""The ranks of a run as a mesh, and what part of a tensor each of them holds; no torch."""

import re
from dataclasses import dataclass
from itertools import pairwise

from memforge.errors import UsageError, printable
from memforge.pieces import Piece

MESH_AXES = ("dp_replicate", "dp_shard", "memory")
MAX_RANKS = 2**20


@dataclass(frozen=True)
class Mesh:
    """dp_replicate x dp_shard x memory ranks, the last counted first, each with tokens of its own.

    Dense parameters are sharded over the dp_shard x memory ranks of a replica, as FSDP2 does it. Value pools are shared
    out by columns among the `memory` ranks of a group, and every group has a copy.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    memory: int = 1

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.memory

    @property
    def shards(self) -> int:
        """Ranks that a dense parameter is sharded over."""
        return self.dp_shard * self.memory

    @property
    def copies(self) -> int:
        """Memory groups, each of which has all pools."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return ", ".join(f"{axis}={getattr(self, axis)}" for axis in MESH_AXES)


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


def bounds(total: int, parts: int) -> list[int]:
    """Where each of so many nearly equal parts starts, and the end of the last: [parts + 1]."""
    return [total * part // parts for part in range(parts + 1)]


def sizes(total: int, parts: int) -> list[int]:
    """How large each of them is."""
    return [stop - start for start, stop in pairwise(bounds(total, parts))]


def columns_of(shape: tuple[int, ...], mesh: Mesh, rank: int) -> Piece:
    """The columns of a pool on a rank of a mesh."""
    edges = bounds(shape[-1], mesh.memory)
    part = rank % mesh.memory
    return Piece(len(shape) - 1, edges[part], edges[part + 1] - edges[part])


def shard_dim(shape: tuple[int, ...], shards: int) -> int:
    """The dimension along which a dense parameter is sharded: the first that divides, or else the first.

    Shards that are not even are padded to the largest on the wire: 4 heads over 64 ranks would send 16 times the bytes.
    """
    return next((dim for dim, size in enumerate(shape) if size and size % shards == 0), 0)


def shard_of(shape: tuple[int, ...], mesh: Mesh, rank: int) -> Piece:
    """The shard of a dense parameter on a rank: along its dimension cut as torch.chunk does it, the last one short."""
    dim, part = shard_dim(shape, mesh.shards), rank % mesh.shards
    most = -(-shape[dim] // mesh.shards)
    start = min(part * most, shape[dim])
    return Piece(dim, start, min(most, shape[dim] - start))


def shares(batch: int, mesh: Mesh, micro_batch: int) -> list[list[int]]:
    """Sequences of every pass of every rank: [ranks][passes]. All ranks make as many passes; some may be empty."""
    parts = sizes(batch, mesh.ranks)
    passes = -(-max(parts) // micro_batch)
    return [[max(0, min(micro_batch, part - i * micro_batch)) for i in range(passes)] for part in parts]
