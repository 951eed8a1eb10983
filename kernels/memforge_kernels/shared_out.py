"""Reads of tables that are shared out among ranks by columns: every rank serves its columns to all of a group.

Slots and weights are gathered in the group, each rank sums its columns of the rows for all of the group's tokens, and
every rank receives the columns of its own tokens. The gradient of a rank's columns is then made of all tokens of the
group, and needs no reduction; that of the weights is partial over columns and is summed.
Ref: Berges et al. 2024 (2412.09764), section 3.2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, get_group_rank, get_rank

from memforge_kernels.row_update.gradient import Read
from memforge_kernels.tape import Dotted, Gathered, Reader, Record

# As torch 2.13 names them, and as those before it do.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


class TokenGroup:
    """Ranks, each with tokens of its own, that tell each other what they have of them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), get_group_rank(group, get_rank())

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """What all ranks have, one after the other: [n, k] -> [sum of n, k]. Launched, not waited for."""
        most = max(counts)
        both = _all_gather(F.pad(x, (0, 0, 0, most - len(x))).contiguous(), 0, self.group)
        if min(counts) == most:
            return both
        return torch.cat([part[:n] for part, n in zip(both.split(most), counts, strict=True)])

    def gather_slots(self, slots: Tensor, counts: Sequence[int], num_slots: int) -> Tensor:
        """The same for slots of a table of `num_slots` rows: on the way as int32, half the bytes, where they fit."""
        return self.gather(slots.to(torch.int32) if num_slots <= 2**31 else slots, counts)

    def gather_read(self, read: Read, num_slots: int, counts: Sequence[int]) -> Read:
        """The reads of all ranks as one, which is their sum."""
        slots = self.gather_slots(read.slots, counts, num_slots)
        weights, rows = self.gather(read.weights, counts), self.gather(read.rows, counts)
        return Read(_done(slots).long(), _done(weights), _done(rows))


class MemoryGroup(TokenGroup):
    """Ranks that share out tables among them.

    `widths` tells how many columns of a table with so many each rank has. `tokens` are those of each rank in a forward
    pass; by default every rank has as many as this one.
    """

    def __init__(self, group: ProcessGroup, widths: Callable[[int], list[int]]) -> None:
        super().__init__(group)
        self.widths = widths
        self._columns: dict[Tensor, int] = {}
        self.given: Sequence[int] | None = None

    def share_out(self, table: Tensor, columns: int) -> None:
        """Say how many columns the whole table has of which this one is a part."""
        self._columns[table] = columns

    def columns_of(self, table: Tensor) -> int:
        return self._columns[table]

    @contextmanager
    def tokens(self, of_ranks: Sequence[int]) -> Iterator[None]:
        """Inside, so many tokens are read for by each rank of the group, in forward and backward passes alike."""
        before, self.given = self.given, of_ranks
        try:
            yield
        finally:
            self.given = before

    def counts(self, own: int) -> Sequence[int]:
        counts = self.given if self.given is not None else [own] * self.size
        assert counts[self.rank] == own, f"rank {self.rank} of a memory group has {own} tokens, not {counts[self.rank]}"
        return counts

    def sum_for_own(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum over all ranks of what each has for the tokens of this one: [sum of n, k] -> [n, k]."""
        most = max(counts)
        if min(counts) < most:
            x = torch.cat([F.pad(part, (0, 0, 0, most - len(part))) for part in x.split(list(counts))])
        return _done(_reduce_scatter(x.contiguous(), "sum", 0, self.group))[: counts[self.rank]]

    def to_columns(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's columns of what all ranks have: [n, v] -> [sum of n, columns]."""
        widths = self.widths(x.shape[1])
        own, sent = widths[self.rank], torch.cat([part.reshape(-1) for part in x.split(widths, dim=1)])
        received = self._exchange(sent, [len(x) * width for width in widths], [n * own for n in counts])
        return received.view(sum(counts), own)

    def from_columns(self, x: Tensor, counts: Sequence[int], columns: int) -> Tensor:
        """All columns for the tokens of this rank: [sum of n, own columns] -> [n, v]."""
        widths, n = self.widths(columns), counts[self.rank]
        sent = x.contiguous().view(-1)
        received = self._exchange(sent, [m * x.shape[1] for m in counts], [n * width for width in widths])
        parts = received.split([n * width for width in widths])
        return torch.cat([part.view(n, width) for part, width in zip(parts, widths, strict=True)], dim=1)

    def _exchange(self, sent: Tensor, to: list[int], from_: list[int]) -> Tensor:
        return _done(functional.all_to_all_single(sent, from_, to, self.group))


def _done(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x


class _Linear(torch.autograd.Function):
    """A linear map between ranks and its adjoint, through which gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return _done(there(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _done(ctx.back(grad)), None, None


class ColumnReader(Reader):
    """Reads tables of which this rank has some columns, for the tokens of its group, by another reader.

    Slots, weights, x and results are of this rank's own tokens and of whole width, as if the table were whole.
    """

    def __init__(self, inner: Reader, group: MemoryGroup) -> None:
        self.inner, self.group = inner, group
        self.records: list[Record] = []
        self._announced: dict[int, tuple[Tensor, Tensor]] = {}

    def announce(self, slots: Tensor, num_slots: int) -> None:
        found = self.group.gather_slots(slots, self.group.counts(len(slots)), num_slots)
        self._announced[id(slots)] = slots, found

    def _of_group(self, slots: Tensor, num_slots: int) -> Tensor:
        if id(slots) not in self._announced:
            self.announce(slots, num_slots)
        known, found = self._announced[id(slots)]
        found = _done(found).long()
        self._announced[id(slots)] = known, found  # PEER reads two tables by the same slots
        return found

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        group, counts, columns = self.group, self.group.counts(len(slots)), self.group.columns_of(table)
        everyones = _linear(
            weights, lambda own: group.gather(own, counts), lambda grad: group.sum_for_own(grad, counts)
        )
        part = self.inner.weighted_gather(table, self._of_group(slots, len(table)), everyones)
        self._record(Gathered(slots, weights.detach()))
        return _linear(
            part,
            lambda summed: group.from_columns(summed, counts, columns),
            lambda grad: group.to_columns(grad, counts),
        )

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        group, counts, columns = self.group, self.group.counts(len(slots)), self.group.columns_of(table)
        everyones = _linear(
            x, lambda own: group.to_columns(own, counts), lambda grad: group.from_columns(grad, counts, columns)
        )
        part = self.inner.gather_dot(everyones, table, self._of_group(slots, len(table)))
        self._record(Dotted(slots, x.detach()))
        return _linear(part, lambda dots: group.sum_for_own(dots, counts), lambda grad: group.gather(grad, counts))

    def _record(self, own: Record) -> None:
        """What was asked for, with the read that was made for the group, if the inner reader keeps any."""
        if self.inner.records:
            self.records.append(own._replace(served=self.inner.records[-1]))


def _linear(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return _Linear.apply(x, there, back)  # type: ignore[no-any-return]
