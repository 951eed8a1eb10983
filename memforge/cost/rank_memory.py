"""Bytes that one rank of a mesh holds during a training step, and the most of them at once.

The step is that of memforge.cost.memory on the rank's own tokens. To it comes what ranks do for each other: FSDP2
gathers the dense parameters of a layer while it runs and scatters their gradients, the ranks of a memory group serve
all its tokens, and copies of the pools gather the reads of all tokens for the update. Eager, in fp32, on a CPU: on a
GPU other kernels make other temporaries.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from memforge.blocks.base import BYTES_PER_ELEMENT, TableRead
from memforge.cost.memory import (
    FP32,
    INT64,
    chosen_bytes,
    frame_saved,
    kept_twice,
    layer_saved,
    state_bytes,
    updated_by_rows,
)
from memforge.cost.wire import dense_groups, expected_bags, shard_numel
from memforge.mesh import Mesh, Split, SplitChoice, part_of_pool
from memforge.plan import LAZY, ModelPlan, ParamRow, PoolUpdate, split_of

Phases = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank, each the most of its kind. `peak_in` names the phase in which most is alive.

    `gathered`: whole dense parameters; `scattered`: their gradients, and the buffers that these are sent from;
    `served`: reads of pools of the memory group, and those of all copies that the update is made of.
    """

    activations: int
    activations_checkpointed: int
    gathered: int
    scattered: int
    served: int
    peak: int
    peak_in: str
    peak_checkpointed: int
    peak_checkpointed_in: str


@dataclass(frozen=True)
class _Group:
    """Bytes of dense parameters that are gathered together: a rank's part, all parts, both padded, and the gradients.

    `aside`: of parameters that are not cut along their first dimension, which are put together elsewhere.
    """

    part: int
    whole: int
    gradients: int
    aside: int


@dataclass(frozen=True)
class _Served:
    """Bytes of the reads of a layer, or of one of them. `asked` is there from the forward pass on, `gradients` come
    with the backward pass, `own` is what is left of the rank's own after it; `forward` and `backward` are temporaries.
    """

    asked: int = 0
    own: int = 0
    gradients: int = 0
    forward: int = 0
    backward: int = 0

    @property
    def left(self) -> int:
        return self.asked + self.own + self.gradients


@dataclass(frozen=True)
class _Reads:
    """So many reads of one table, with what they read: entries, and bytes of the vectors that they meet."""

    number: int
    entries: int
    vectors: int

    def with_one(self, other: "_Reads") -> "_Reads":
        return _Reads(self.number + 1, self.entries + other.entries, self.vectors + other.vectors)

    @property
    def bytes(self) -> int:
        return (INT64 + FP32) * self.entries + self.vectors

    def sorting(self, touched: int) -> int:
        """Bytes that it takes at the most to sort them by slot: see memforge_kernels.row_update.gradient."""
        joined = self.bytes if self.number > 1 else 0
        # Sorted slots and their order, the token of each entry as it came and as sorted; where slots change.
        return joined + 4 * INT64 * self.entries + 3 * INT64 * touched

    def sorted(self, touched: int) -> int:
        """Bytes of what comes out."""
        joined = self.vectors if self.number > 1 else 0
        return joined + (INT64 + FP32) * self.entries + 2 * INT64 * touched


@dataclass(frozen=True)
class RankStep:
    """A step of one pass over `batch` sequences on every rank, as the rank sees it that has most of the pools."""

    plan: ModelPlan
    mesh: Mesh
    batch: int
    seq_len: int
    pools: SplitChoice = "auto"
    update: PoolUpdate = LAZY

    def memory(self) -> RankMemory:
        frame = sum(tensor.bytes for _, tensor in frame_saved(self.plan, self.batch, self.seq_len))
        peak, checkpointed = (max(self.timeline(checkpointed=again)) for again in (False, True))
        root, *layers = self._groups
        return RankMemory(
            activations=frame + sum(self._saved),
            activations_checkpointed=frame + sum(self._inputs),
            gathered=root.whole + (2 if self._sharded else 1) * max(layer.whole for layer in layers),
            scattered=root.gradients + max(layer.gradients + layer.whole for layer in layers),
            served=sum(served.asked for served in self._served) + sum(reads.bytes for _, reads in self._everyones),
            peak=peak[0],
            peak_in=peak[1],
            peak_checkpointed=checkpointed[0],
            peak_checkpointed_in=checkpointed[1],
        )

    def timeline(self, *, checkpointed: bool) -> Phases:
        """Bytes alive, and the phase, through one step that is not the first."""
        scratch = (part.scratch(self.batch, self.seq_len) for layer in self.plan.layers for part in layer.parts)
        always = self._held + max(block.kept for block in scratch)
        for phases in (self._forward(checkpointed), self._backward(checkpointed), self._update()):
            for alive, phase in phases:
                yield always + alive, phase

    @property
    def _tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def _stream(self) -> int:
        return FP32 * self._tokens * self.plan.dim

    @property
    def _window(self) -> int:
        """The tokens and the targets."""
        return 2 * INT64 * self.batch * (self.seq_len + 1)

    @property
    def _sharded(self) -> bool:
        return self.mesh.shards > 1

    @cached_property
    def _splits(self) -> Mapping[str, Split]:
        return split_of(self.plan, self.pools, self.mesh)

    @cached_property
    def _tables(self) -> dict[str, ParamRow]:
        return {row.path: row for row in self.plan.params if row.group == "values"}

    def _part(self, table: ParamRow) -> tuple[int, ...]:
        """The largest part that a rank has of a table: of columns the last, of rows the first."""
        split = self._splits[table.owner]
        rank = 0 if split == "rows" else self.mesh.memory - 1
        return part_of_pool(table.shape, self.mesh, rank, split).shape(table.shape)

    @cached_property
    def _held(self) -> int:
        """Weights and optimizer state."""
        dense = [row for row in self.plan.params if row.group == "dense"]
        parts: list[tuple[ParamRow, tuple[int, ...]]]
        parts = [(row, (shard_numel(row, self.mesh.shards),)) for row in dense]
        parts += [(row, self._part(row)) for row in self._tables.values()]
        return sum(
            math.prod(shape) * BYTES_PER_ELEMENT[row.dtype] + state_bytes(row, shape, self.update)
            for row, shape in parts
        )

    @cached_property
    def _groups(self) -> list[_Group]:
        """What is outside of the layers, and each layer."""
        shards, found = self.mesh.shards, []
        for rows in dense_groups(self.plan):
            part = FP32 * sum(shard_numel(row, shards) for row in rows)
            # Where the first dimension does not divide and another does.
            cut = [row for row in rows if row.shape[0] % shards and shard_numel(row, shards) * shards == row.numel]
            gradients, aside = (FP32 * sum(row.numel for row in some) for some in (rows, cut))
            found.append(_Group(part, shards * part, gradients, aside))
        return found

    @cached_property
    def _saved(self) -> list[int]:
        shape = (self.plan.dim, self.batch, self.seq_len)
        return [sum(tensor.bytes for _, tensor in layer_saved(layer, *shape)) for layer in self.plan.layers]

    @cached_property
    def _inputs(self) -> list[int]:
        """What a layer keeps that runs again."""
        return [self._stream + chosen_bytes(layer, self.batch, self.seq_len) for layer in self.plan.layers]

    def _kept(self, checkpointed: bool) -> list[int]:
        """What the layers up to each have kept for the backward pass."""
        kept = self._inputs if checkpointed else self._saved
        return list(accumulate(one + served.asked for one, served in zip(kept, self._served, strict=True)))

    # Reads of pools.

    def _reads_of(self, layer_idx: int) -> Iterator[tuple[TableRead, ParamRow]]:
        for block in self.plan.layers[layer_idx].blocks:
            for read in block.table_reads():
                yield read, self._tables[f"{block.pool_path()}.{read.table}"]

    @cached_property
    def _served(self) -> list[_Served]:
        found = []
        for idx in range(self.plan.num_layers):
            reads = [self._served_read(read, table) for read, table in self._reads_of(idx)]
            sums = {name: sum(getattr(read, name) for read in reads) for name in ("asked", "own", "gradients")}
            most = {name: max((getattr(read, name) for read in reads), default=0) for name in ("forward", "backward")}
            found.append(_Served(**sums, **most))
        return found

    def _served_read(self, read: TableRead, table: ParamRow) -> _Served:
        """One read, as a rank makes it and serves those of its group."""
        n, gathers = self._tokens, read.op == "weighted_gather"
        entries, vectors = FP32 * n * read.rows, FP32 * n * table.shape[1]
        own = (0 if read.same_slots else INT64 * n * read.rows) + (entries if gathers else vectors)
        bags, longest, columns = self._bags(read, table)
        asked_entries, asked_vectors = FP32 * bags * longest, FP32 * bags * columns
        gradients = 0 if self.update.dense else asked_vectors if gathers else asked_entries
        if self.mesh.memory == 1:
            return _Served(0, own, gradients)
        slots = 0 if read.same_slots else INT64 * bags * longest
        asked = slots + (asked_entries if gathers else asked_vectors)
        if self._splits[table.owner] == "columns":
            # Slots in their short form; what is read and the same with its tap; what is received beside what was
            # served; and put together.
            forward = max(asked_entries, 2 * asked_vectors, asked_vectors + vectors, 2 * vectors)
            backward = max(2 * vectors + asked_vectors, vectors + 2 * asked_vectors + asked_entries)
            return _Served(asked, own, gradients, forward, backward)
        # The order of the rank's own entries, how many of each token there are, and where each has its place.
        if not read.same_slots:
            asked += INT64 * (n * read.rows + n * self.mesh.memory + bags + n * read.rows)
        everyones = vectors * self.mesh.memory
        return _Served(asked, own, gradients, everyones + 2 * asked_vectors, everyones + 2 * asked_vectors + vectors)

    def _bags(self, read: TableRead, table: ParamRow) -> tuple[int, int, int]:
        """Tokens that a rank serves in its group, entries of each, and the columns that it has."""
        tokens, columns = self._tokens * self.mesh.memory, self._part(table)[1]
        if self.mesh.memory == 1 or self._splits[table.owner] == "columns":
            return tokens, read.rows, columns
        return *expected_bags(tokens, read.rows, self.mesh.memory, self.mesh.copies), columns

    @cached_property
    def _everyones(self) -> list[tuple[ParamRow, _Reads]]:
        """The reads that tables are updated by, in their order, each for the tokens of all copies."""
        found = []
        for idx in range(self.plan.num_layers):
            for read, table in self._reads_of(idx):
                bags, longest, columns = self._bags(read, table)
                everyones = bags * self.mesh.copies
                found.append((table, _Reads(1, everyones * longest, FP32 * everyones * columns)))
        return [] if self.update.dense else found

    # The phases of a step, each with the bytes alive beside weights and optimizer state.

    def _forward(self, checkpointed: bool) -> Phases:
        """A layer is gathered flat and then laid out; the flat one is there until the next is laid out."""
        root, *groups = self._groups
        kept, logits = self._kept(checkpointed), FP32 * self._tokens * self.plan.vocab_size
        flat = [group.whole if self._sharded else 0 for group in self._groups]
        before = self._window + root.whole
        yield before + flat[0] + root.aside, "gathering of what is outside of the layers"
        for idx, group in enumerate(groups):
            laid_out = max(flat[idx], group.whole + group.aside)
            yield (
                before + (kept[idx - 1] if idx else self._stream) + flat[idx + 1] + laid_out,
                f"gathering of layer {idx}",
            )
            yield before + kept[idx] + flat[idx + 1] + group.whole + self._working(idx), f"forward of layer {idx}"
        frame = sum(tensor.bytes for _, tensor in frame_saved(self.plan, self.batch, self.seq_len))
        # The gradients of the log-probabilities and of the logits, while the log-probabilities are still there.
        yield root.whole + frame + kept[-1] + 2 * logits, "backward of the loss"

    def _working(self, layer_idx: int) -> int:
        parts = self.plan.layers[layer_idx].parts
        scratch = (part.scratch(self.batch, self.seq_len).forward for part in parts)
        return max(self._served[layer_idx].forward, *scratch)

    def _backward(self, checkpointed: bool) -> Phases:
        """A layer is gathered while the one after it runs; its gradients go into one buffer that is scattered."""
        root, *groups = self._groups
        kept, plan = self._kept(checkpointed), self.plan
        table = FP32 * plan.vocab_size * plan.dim
        done = self._window + root.whole + FP32 * plan.dim + table  # the gradients of the last norm and the head
        pools, begun = self._pool_gradients, set[str]()
        for idx in reversed(range(plan.num_layers)):
            group, served = groups[idx], self._served[idx]
            read = {path for block in plan.layers[idx].blocks if (path := block.pool_path()) in pools}
            added = sum(pools[path] for path in read & begun)
            done, begun = done + sum(pools[path] for path in read - begun), begun | read
            ahead = groups[idx - 1].whole if self._sharded and idx else 0
            scattered = groups[idx + 1].whole if idx + 1 < plan.num_layers else 0
            here = done + added + ahead + scattered + group.whole + kept[idx]
            if checkpointed:  # the layer runs again, from the input that was kept
                twice = kept_twice(plan.layers[idx], self.batch, self.seq_len)
                here += self._saved[idx] - self._stream - twice + served.asked
                yield here + self._working(idx) + self._stream, f"second forward of layer {idx}"
            yield here + 3 * self._stream + self._worst(idx), f"backward of layer {idx}"
            done += served.left
            rest = done + ahead + self._stream + (kept[idx - 1] if idx else 0)
            yield rest + group.gradients + group.whole + group.part, f"reduction of layer {idx}"
            done += group.part
        # Where the embedding is the head as well, autograd adds its two gradients out of place.
        looked_up = table * (2 if plan.tie_embeddings else 1)
        yield done + self._stream + groups[0].whole + looked_up, "backward of the embedding"
        rest = done - root.whole - FP32 * plan.dim - table
        yield rest + root.gradients + root.whole + root.part, "reduction of what is outside of the layers"

    def _worst(self, layer_idx: int) -> int:
        """Bytes at the worst moment of a layer's backward pass, beside what was kept for it.

        Of the gradients of a part one is there when its temporaries are at their most, and all of them at its end; the
        mixer comes when what the blocks have kept is gone.
        """
        served, shape = self._served[layer_idx], (self.batch, self.seq_len)
        most = alive = 0
        for part in reversed(self.plan.layers[layer_idx].parts):
            sizes = [FP32 * param.numel for param in part.params() if param.group == "dense"]
            scratch = part.scratch(*shape).backward
            if part.table_reads():
                scratch = max(scratch, served.backward) + served.gradients
            most = max(most, alive + max(max(sizes, default=0) + scratch, sum(sizes)))
            alive += sum(sizes) - sum(tensor.bytes for tensor in part.saved(*shape))
        return most

    @cached_property
    def _pool_gradients(self) -> dict[str, int]:
        """Of pools that are updated as a whole."""
        found: dict[str, int] = defaultdict(int)
        for row in self._tables.values():
            if not updated_by_rows(row, self.update):
                found[row.owner] += math.prod(self._part(row)) * BYTES_PER_ELEMENT[row.dtype]
        return dict(found)

    def _update(self) -> Phases:
        """The reads of all copies are gathered, summed where that is less, sorted for the norm and for the update."""
        left = sum(served.left for served in self._served)
        done = sum(group.part for group in self._groups) + sum(self._pool_gradients.values())
        if self._pool_gradients:
            largest = max(math.prod(self._part(row)) for row in self._tables.values())
            if self.mesh.copies > 1:
                yield done + FP32 * largest, "sum over copies"
            yield done + 2 * 8 * largest, "norm"  # in fp64, and squared
        reads, new = dict[str, _Reads](), 0
        for table, one in self._everyones:
            made = reads.get(table.path, _Reads(0, 0, 0)).with_one(one)
            # Without copies a read is what its layer has left.
            new += one.bytes if self.mesh.copies > 1 else 0
            yield done + left + new, "reads of copies"
            rows, columns = self._part(table)
            touched = min(rows, made.entries)
            summed = _Reads(1, touched, touched * FP32 * columns)
            if made.number > 1 and made.bytes > summed.bytes:
                most = max(made.sorting(touched), made.sorted(touched) + summed.bytes)
                yield done + left + new + most, "sum of reads"
                new += summed.bytes - (made.bytes if self.mesh.copies > 1 else 0)
                made = summed
            reads[table.path] = made
        done += sum(made.bytes for made in reads.values())
        for path, made in reads.items():
            touched = min(self._part(self._tables[path])[0], made.entries)
            yield done + made.sorting(touched), "norm"
            done += made.sorted(touched)
        yield done, "update"
