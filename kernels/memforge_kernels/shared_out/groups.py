"""Groups of ranks that have tokens of their own, and what they tell each other of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, get_group_rank, get_rank

from memforge_kernels.row_update.gradient import Read

# As torch 2.13 names them, and as those before it do.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor

Split = Literal["columns", "rows"]


def done(x: Tensor) -> Tensor:
    """What was launched, when it is there."""
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x


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
        """The reads of all ranks as one, which is their sum; `counts` are the bags of each rank."""
        slots = self.gather_slots(read.slots, counts, num_slots)
        weights, rows = self.gather(read.weights, counts), self.gather(read.rows, counts)
        return Read(done(slots).long(), done(weights), done(rows))

    def gather_bags(self, read: Read, num_slots: int) -> Read:
        """The same for reads whose sizes follow from the data: they are told first, and bags are filled up to the
        longest of any rank, as `filled_bags` are. Each has room for a slot at least.
        """
        own = torch.tensor([read.slots.shape], device=read.slots.device)
        counts, lengths = done(_all_gather(own, 0, self.group)).T.tolist()
        if not max(counts):
            return read
        missing = max(lengths) - read.slots.shape[1]
        slots = torch.cat((read.slots, read.slots[:, :1].expand(-1, missing)), dim=1)
        return self.gather_read(Read(slots, F.pad(read.weights, (0, missing)), read.rows), num_slots, counts)

    def exchange(self, x: Tensor, to: Sequence[int], from_: Sequence[int]) -> Tensor:
        """To each rank so many of x [r, ..], in order, and so many from each. Launched, not waited for."""
        return functional.all_to_all_single(x.contiguous(), list(from_), list(to), self.group)


class Part(NamedTuple):
    """How a table is shared out, and the size of the whole of which a rank has a part."""

    split: Split
    slots: int
    columns: int


class MemoryGroup(TokenGroup):
    """Ranks that share out tables among them: each has some columns of a table, or every size-th row of it.

    `widths` tells how many columns of a table with so many each rank has; rank r has the rows r, r + size, .. `tokens`
    are those of each rank in a forward pass; by default every rank has as many as this one.
    """

    def __init__(self, group: ProcessGroup, widths: Callable[[int], list[int]]) -> None:
        super().__init__(group)
        self.widths = widths
        self._parts: dict[Tensor, Part] = {}
        self.given: Sequence[int] | None = None

    def share_out(self, table: Tensor, split: Split, whole: Sequence[int]) -> None:
        """Say that a table is a part of one of shape [m, v]."""
        self._parts[table] = Part(split, *whole)

    def part(self, table: Tensor) -> Part:
        return self._parts[table]

    def split_of(self, num_slots: int) -> Split | None:
        """How tables of so many slots are shared out; None where some are in one way and some in the other."""
        found = {part.split for part in self._parts.values() if part.slots == num_slots}
        return found.pop() if len(found) == 1 else None

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
        return done(_reduce_scatter(x.contiguous(), "sum", 0, self.group))[: counts[self.rank]]

    def to_columns(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's columns of what all ranks have: [n, v] -> [sum of n, columns]."""
        widths = self.widths(x.shape[1])
        own, sent = widths[self.rank], torch.cat([part.reshape(-1) for part in x.split(widths, dim=1)])
        received = done(self.exchange(sent, [len(x) * width for width in widths], [n * own for n in counts]))
        return received.view(sum(counts), own)

    def from_columns(self, x: Tensor, counts: Sequence[int], columns: int) -> Tensor:
        """All columns for the tokens of this rank: [sum of n, own columns] -> [n, v]."""
        widths, n = self.widths(columns), counts[self.rank]
        sent = x.contiguous().view(-1)
        received = done(self.exchange(sent, [m * x.shape[1] for m in counts], [n * width for width in widths]))
        parts = received.split([n * width for width in widths])
        return torch.cat([part.view(n, width) for part, width in zip(parts, widths, strict=True)], dim=1)
