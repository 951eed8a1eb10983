"""The ranks of a run as a mesh, and what part of a tensor each of them holds; no torch."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from memforge.errors import UsageError, printable
from memforge.pieces import Piece

MESH_AXES = ("dp_replicate", "dp_shard", "memory")
MAX_RANKS = 2**20
Split = Literal["columns", "rows"]
SplitChoice = Literal["auto", "columns", "rows"]


@dataclass(frozen=True)
class Mesh:
    """dp_replicate x dp_shard x memory ranks, the last counted first, each with tokens of its own.

    Dense parameters are sharded over the dp_shard x memory ranks of a replica, as FSDP2 does it. Value pools are shared
    out by columns or by rows among the `memory` ranks of a group, and every group has a copy.
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


def rows_of(shape: tuple[int, ...], mesh: Mesh, rank: int) -> Piece:
    """The rows of a pool on a rank of a mesh: every memory-th, since product keys make neighbours about as busy."""
    part = rank % mesh.memory
    return Piece(0, part, len(range(part, shape[0], mesh.memory)), mesh.memory)


def part_of_pool(shape: tuple[int, ...], mesh: Mesh, rank: int, split: Split) -> Piece:
    """What a rank of a mesh has of a pool."""
    return (rows_of if split == "rows" else columns_of)(shape, mesh, rank)


@dataclass(frozen=True)
class PoolReads:
    """What ranks tell each other about a pool depends on: its tables [slots, v], of widths v, that each of its readers
    reads once by the same slots, so many for a token.
    """

    slots: int
    widths: tuple[int, ...]
    reads: tuple[int, ...]

    def group_bytes(self, split: Split, ranks: int) -> int:
        """Bytes that the ranks of a memory group send each other for one token of each, forward and backward, in fp32.

        By rows it is the mean over slots that fall on all ranks alike. Not counted: a forward pass that is run again,
        padding where ranks have different numbers of tokens, and what copies of the group send each other.

        With M ranks, a reader of k slots and tables of widths v, each rank sends

                      columns                                     rows
            slots     M-1 others all k of them                    each k/M of them, and how many there are
                      4k (M-1)                                    4k (M-1)/M + c (M-1)

        and for each table, of which either the k weights go out, their sums v come back and the gradients go the other
        way (weighted_gather), or x goes out and k products come back (gather_dot), there and back

            entries   each k to all; sums over ranks              each k/M to one
                      2 * 4k (M-1)                                2 * 4k (M-1)/M
            vectors   each v/M to one                             each v to all; sums over ranks
                      2 * 4v (M-1)/M                              2 * 4v (M-1)

        All that is M(M-1)/M = M-1 times, for the group,

            columns   4k M + sum over tables of (8k M + 8v)
            rows      4k + c M + sum over tables of (8k + 8v M)

        so that a pool of values goes by rows where v < 1.5k - cM/(8(M-1)), and one of experts, with two tables, where
        v < 1.25k - cM/(16(M-1)). c is 1 byte for k < 256, else 4; slots of tables of more than 2**31 rows are 8 bytes
        by columns.
        """
        assert ranks > 1
        vectors = 8 * sum(self.widths)
        total = 0
        for k in self.reads:
            entries = 8 * k * len(self.widths)
            if split == "columns":
                total += ((4 if self.slots <= 2**31 else 8) * k + entries) * ranks + vectors
            else:
                total += 4 * k + entries + ((1 if k < 2**8 else 4) + vectors) * ranks
        return (ranks - 1) * total

    def possible(self, ranks: int) -> list[Split]:
        """How each of so many ranks can have a part of every table."""
        found: list[Split] = ["columns"] if min(self.widths) >= ranks else []
        return [*found, "rows"] if self.slots >= ranks else found

    def split(self, choice: SplitChoice, ranks: int) -> Split:
        """How it is shared out: as chosen, or in the way that is possible and moves fewer bytes, else by columns."""
        if choice != "auto":
            return choice
        ways = self.possible(ranks) or ["columns"]
        return min(ways, key=lambda way: self.group_bytes(way, ranks) if ranks > 1 else 0)


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
