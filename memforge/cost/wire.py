"""Bytes on the wire: every collective of one training step, as one rank of a mesh takes part in it.

`payload` is what the rank hands in: of an all-gather its part, of the others all of their input, padding included.
`sent` is what it sends, where nothing is sent twice: of n ranks each sends its part of a gather n-1 times, of a sum
that is scattered (n-1)/n of the payload, of one that all get twice that, of an exchange all but what is its own.
Ref: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations": no algorithm sends
less, and a ring sends no more. nccl-tests, doc/PERFORMANCE.md, has the same factors.

A step is that of memforge.training.optimizer.Stepper, in fp32 or under autocast, which leaves these tensors in fp32.
What the training loop adds, whether to stop and what it logs and saves, is not in it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from memforge.blocks.base import KindPlan, TableRead
from memforge.mesh import Mesh, Split, SplitChoice, part_of_pool, shard_dim, sizes
from memforge.plan import LAZY, LayerPlan, ModelPlan, ParamRow, PoolUpdate, split_of

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
Group = Literal["shards", "dp_replicate", "memory", "copies", "world"]
FP32, FP64, INT32, INT64 = 4, 8, 4, 8


class Collective(NamedTuple):
    """One collective. `size` are the ranks of its group; bytes are those of one rank.

    `expected`: they follow from the slots that are read, and are those of slots that fall on all ranks alike.
    """

    what: str
    op: Op
    group: Group
    size: int
    payload: int
    sent: int
    expected: bool = False


class Total(NamedTuple):
    """Collectives of one kind, how many there are, and their bytes together."""

    what: str
    op: Op
    group: Group
    size: int
    number: int
    payload: int
    sent: int
    expected: bool


def totals(rows: Iterable[Collective]) -> list[Total]:
    """By what they are for, in the order in which the first of each kind comes."""
    found: dict[tuple[str, str, str], Total] = {}
    for row in rows:
        key = (row.what, row.op, row.group)
        known = found.get(key, Total(row.what, row.op, row.group, row.size, 0, 0, 0, False))
        found[key] = known._replace(
            number=known.number + 1,
            payload=known.payload + row.payload,
            sent=known.sent + row.sent,
            expected=known.expected or row.expected,
        )
    return list(found.values())


def sent_bytes(op: Op, size: int, payload: int, own: int | None = None) -> int:
    """Bytes that one of `size` ranks sends, rounded up; `own` is what stays of an exchange that is not even.

    A broadcast counts where it is received, once on every rank but the first; here on all of them.
    """
    if op == "all_gather":
        return (size - 1) * payload
    if op == "all_reduce":
        return -(-2 * (size - 1) * payload // size)
    if op == "broadcast":
        return payload if size > 1 else 0
    return payload - (payload // size if own is None else own)


def ranks_of(group: Group, mesh: Mesh, rank: int) -> range:
    """The ranks of the group that a rank belongs to."""
    if group in ("shards", "memory"):
        size = mesh.shards if group == "shards" else mesh.memory
        first = rank - rank % size
        return range(first, first + size)
    stride = {"dp_replicate": mesh.shards, "copies": mesh.memory, "world": 1}[group]
    return range(rank % stride, mesh.ranks, stride)


def dense_groups(plan: ModelPlan) -> list[list[ParamRow]]:
    """Dense parameters that are gathered together: those outside of the layers, then those of each layer."""
    groups: list[list[ParamRow]] = [[] for _ in range(plan.num_layers + 1)]
    for row in plan.params:
        if row.group == "dense":
            parts = row.path.split(".")
            groups[int(parts[1]) + 1 if parts[0] == "layers" else 0].append(row)
    return groups


def shard_numel(row: ParamRow, shards: int) -> int:
    """Elements of the largest shard of a dense parameter, to which the others are padded."""
    most = row.shape[shard_dim(row.shape, shards)]
    return row.numel // most * -(-most // shards)


def slot_bytes(num_slots: int) -> int:
    """Bytes of a slot on the wire: see TokenGroup.gather_slots."""
    return INT32 if num_slots <= 2**31 else INT64


@dataclass(frozen=True)
class StepOnWire:
    """A training step as a rank sees it. `batches` are the sequences of every pass of every rank: [ranks][passes].

    `pools` says how they are shared out; `element` are the bytes of a number.
    """

    plan: ModelPlan
    mesh: Mesh
    rank: int
    batches: Sequence[Sequence[int]]
    seq_len: int
    pools: SplitChoice = "auto"
    update: PoolUpdate = LAZY
    checkpoint_layers: bool = False
    dropout: bool = False
    element: int = FP32

    def collectives(self) -> Iterator[Collective]:
        """All of them, pass by pass, and then those of the update."""
        if self.mesh.ranks == 1:
            return
        by_rows = not self.update.dense and any(block.table_reads() for _, block in self._blocks)
        for idx in range(len(self.batches[0])):
            yield from self._dense()
            if self.mesh.memory > 1:
                yield from self._reads(self._tokens(ranks_of("memory", self.mesh, self.rank), idx))
            if by_rows and self.mesh.copies > 1:
                yield from self._to_copies(idx)
        if not by_rows and self.mesh.copies > 1:
            for table in self._tables.values():
                payload = math.prod(self.part(table)) * self.element
                yield self.made("pool gradients", "all_reduce", "copies", payload)
        yield self.made("loss and norm", "all_reduce", "world", 3 * FP64)

    def made(
        self, what: str, op: Op, group: Group, payload: int, own: int | None = None, *, expected: bool = False
    ) -> Collective:
        size = len(ranks_of(group, self.mesh, self.rank))
        return Collective(what, op, group, size, payload, sent_bytes(op, size, payload, own), expected)

    @cached_property
    def _splits(self) -> Mapping[str, Split]:
        return split_of(self.plan, self.pools, self.mesh)

    @cached_property
    def _tables(self) -> dict[str, ParamRow]:
        return {row.path: row for row in self.plan.params if row.group == "values"}

    @cached_property
    def _blocks(self) -> list[tuple[LayerPlan, KindPlan]]:
        return [(layer, block) for layer in self.plan.layers for block in layer.blocks]

    def _table(self, block: KindPlan, read: TableRead) -> ParamRow:
        return self._tables[f"{block.pool_path()}.{read.table}"]

    def part(self, table: ParamRow) -> tuple[int, ...]:
        """The shape of what this rank has of a table."""
        return part_of_pool(table.shape, self.mesh, self.rank, self._splits[table.owner]).shape(table.shape)

    def _tokens(self, ranks: range, idx: int) -> list[int]:
        """Tokens of these ranks in a pass."""
        return [self.batches[rank][idx] * self.seq_len for rank in ranks]

    def _dense(self) -> Iterator[Collective]:
        """What FSDP2 does for the dense parameters in one pass.

        A layer is gathered for its forward and again for its backward pass, where it may run again; what is outside of
        the layers stays. A group of one rank does nothing.
        """
        shards = self.mesh.shards
        for idx, rows in enumerate(dense_groups(self.plan)):
            part = sum(shard_numel(row, shards) for row in rows) * self.element
            if shards > 1:
                for _ in range(2 if idx else 1):
                    yield self.made("parameters", "all_gather", "shards", part)
                yield self.made("gradients", "reduce_scatter", "shards", shards * part)
            if self.mesh.dp_replicate > 1:
                yield self.made("gradients of replicas", "all_reduce", "dp_replicate", part)

    def _reads(self, counts: list[int]) -> Iterator[Collective]:
        """What the reads of tables ask of the memory group in one pass, where its ranks have so many tokens."""
        for layer, block in self._blocks:
            for read in block.table_reads():
                table = self._table(block, read)
                ways = _ByRows if self._splits[table.owner] == "rows" else _ByColumns
                way = ways(self, read, table, counts)
                forward = list(way.forward())
                yield from forward
                if self.checkpoint_layers:
                    last = block is layer.blocks[-1] and not self.dropout
                    yield from forward[:-1] if last and not read.kept else forward
                yield from way.backward()

    def _to_copies(self, idx: int) -> Iterator[Collective]:
        """The reads of one pass, each with its factors of the gradient, to the ranks that have the same part."""
        size, ranks = self.mesh.memory, self.mesh.ranks
        most = max(sum(self._tokens(range(first, first + size), idx)) for first in range(0, ranks, size))
        for _, block in self._blocks:
            for read in block.table_reads():
                table = self._table(block, read)
                slots, width = self.part(table)
                bags, entries, by_rows = most, read.rows, size > 1 and self._splits[table.owner] == "rows"
                if by_rows:
                    yield self.made("sizes of copies", "all_gather", "copies", 2 * INT64)
                    bags, entries = expected_bags(most, read.rows, size, self.mesh.copies)
                    if not bags:
                        continue
                for what, wide in (
                    ("slots of copies", entries * slot_bytes(slots)),
                    ("weights of copies", entries * self.element),
                    ("rows of copies", width * self.element),
                ):
                    yield self.made(what, "all_gather", "copies", bags * wide, expected=by_rows)


def expected_bags(tokens: int, reads: int, ranks: int, copies: int = 1) -> tuple[int, int]:
    """How many of so many tokens read a row of one of `ranks` at all, and the most that one of them reads there.

    The mean, and for the most what half of all draws stay below, for slots that fall on all ranks alike.
    """
    if not tokens:
        return 0, 0
    chance, beyond = (1 - 1 / ranks) ** reads, 1.0
    for longest in range(reads):
        # Binomial terms in logarithms: factorials of a thousand reads are no floats.
        term = math.lgamma(reads + 1) - math.lgamma(longest + 1) - math.lgamma(reads - longest + 1)
        beyond -= math.exp(term - longest * math.log(ranks) + (reads - longest) * math.log1p(-1 / ranks))
        if (1 - max(0.0, min(1.0, beyond))) ** (tokens * copies) >= 0.5:
            return round(tokens * (1 - chance)), max(1, longest)
    return round(tokens * (1 - chance)), reads


@dataclass(frozen=True)
class _Way:
    """How one read of a table, shared out among a memory group, is made by all of it: see memforge_kernels.shared_out.

    `counts` are the tokens of its ranks.
    """

    step: StepOnWire
    read: TableRead
    table: ParamRow
    counts: list[int]

    @property
    def place(self) -> int:
        return self.step.rank % self.step.mesh.memory

    @property
    def own(self) -> int:
        """Tokens of this rank."""
        return self.counts[self.place]

    def gathered(self, what: str, width: int) -> Collective:
        """Of all ranks, padded to the most tokens, so many bytes for each of theirs."""
        return self.step.made(what, "all_gather", "memory", max(self.counts) * width)

    def summed(self, what: str, width: int) -> Collective:
        """What all ranks have for the tokens of each."""
        return self.step.made(what, "reduce_scatter", "memory", len(self.counts) * max(self.counts) * width)

    def exchanged(self, what: str, payload: int, own: int, *, expected: bool = False) -> Collective:
        return self.step.made(what, "all_to_all", "memory", payload, own, expected=expected)


class _ByColumns(_Way):
    """Slots and weights to all ranks, columns back; and the adjoints of both."""

    @property
    def entries(self) -> int:
        return self.read.rows * self.step.element

    def forward(self) -> Iterator[Collective]:
        if not self.read.same_slots:
            yield self.gathered("slots", self.read.rows * slot_bytes(self.table.shape[0]))
        if self.read.op == "weighted_gather":
            yield self.gathered("weights", self.entries)
            yield self._from_columns("columns")
        else:
            yield self._to_columns("columns")
            yield self.summed("weights", self.entries)

    def backward(self) -> Iterator[Collective]:
        if self.read.op == "weighted_gather":
            yield self._to_columns("gradients of columns")
            yield self.summed("weights", self.entries)
        else:
            yield self.gathered("weights", self.entries)
            yield self._from_columns("gradients of columns")

    def _from_columns(self, what: str) -> Collective:
        """This rank's columns for all tokens of the group."""
        width = self.step.part(self.table)[1] * self.step.element
        return self.exchanged(what, sum(self.counts) * width, self.own * width)

    def _to_columns(self, what: str) -> Collective:
        """All columns for the tokens of this rank."""
        token = self.own * self.step.element
        return self.exchanged(what, token * self.table.shape[1], token * self.step.part(self.table)[1])


class _ByRows(_Way):
    """Slots and weights to the ranks that have the rows, what they sum up back; and the adjoints of both."""

    @property
    def vector(self) -> int:
        return self.table.shape[1] * self.step.element

    def forward(self) -> Iterator[Collective]:
        if not self.read.same_slots:
            # How many slots of each token each rank has, and which.
            size = 1 if self.read.rows < 2**8 else INT32
            yield self.exchanged("slots", len(self.counts) * self.own * size, self.own * size)
            yield self._to_owners("slots", INT32)
        if self.read.op == "weighted_gather":
            yield self._to_owners("weights", self.step.element)
            yield self.summed("sums", self.vector)
        else:
            yield self.gathered("vectors", self.vector)
            yield self._from_owners("weights", self.step.element)

    def backward(self) -> Iterator[Collective]:
        if self.read.op == "weighted_gather":
            yield self.gathered("gradients of sums", self.vector)
            yield self._from_owners("weights", self.step.element)
        else:
            yield self._to_owners("weights", self.step.element)
            yield self.summed("gradients of vectors", self.vector)

    def _entries(self, tokens: int) -> int:
        """Those of so many tokens that fall on this rank."""
        return sizes(tokens * self.read.rows, len(self.counts))[self.place]

    def _to_owners(self, what: str, size: int) -> Collective:
        own = self._entries(self.own)
        return self.exchanged(what, self.own * self.read.rows * size, own * size, expected=True)

    def _from_owners(self, what: str, size: int) -> Collective:
        received = sum(map(self._entries, self.counts))
        return self.exchanged(what, received * size, self._entries(self.own) * size, expected=True)
