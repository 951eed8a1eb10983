"""Reads of tables that are shared out among ranks: every rank serves its part to all of a group.

By columns: slots and weights are gathered in the group, each rank sums its columns of the rows for all of the group's
tokens, and every rank receives the columns of its own tokens. By rows: slots and weights are sent to the ranks that
have the rows, and what these sum up for a token is summed again where the token is. Either way the gradient of a rank's
part is made of all tokens of the group, and needs no reduction.
Ref: Berges et al. 2024 (2412.09764), section 3.2, for columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memforge_kernels.shared_out.groups import MemoryGroup, done
from memforge_kernels.shared_out.requests import Requests
from memforge_kernels.tape import Dotted, Gathered, Reader, Record


class _Linear(torch.autograd.Function):
    """A linear map between ranks and its adjoint, through which gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return done(there(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return done(ctx.back(grad)), None, None


class _Taken(torch.autograd.Function):
    """Rows of x at distinct places. Places are kept as autograd keeps tensors, so that a layer that runs again has none
    of them in between; and the gradient is written, not added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, places, grad), None


class _Placed(torch.autograd.Function):
    """Rows of x put at distinct places among `size`, the others 0: the adjoint of taking them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return grad[places], None, None


def _linear(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return _Linear.apply(x, there, back)  # type: ignore[no-any-return]


def _taken(x: Tensor, places: Tensor) -> Tensor:
    return _Taken.apply(x, places)  # type: ignore[no-any-return]


def _placed(x: Tensor, places: Tensor, size: int) -> Tensor:
    return _Placed.apply(x, places, size)  # type: ignore[no-any-return]


class _Served(Reader):
    """Reads by another reader what this rank has of tables, for the tokens of its group.

    Slots, weights, x and results are of this rank's own tokens and of whole width, as if the table were whole.
    """

    def __init__(self, inner: Reader, group: MemoryGroup) -> None:
        self.inner, self.group = inner, group
        self.records: list[Record] = []

    def _record(self, own: Record) -> None:
        """What was asked for, with the read that was made for the group, if the inner reader keeps any."""
        if self.inner.records:
            self.records.append(own._replace(served=self.inner.records[-1]))


class ColumnReader(_Served):
    """Reads tables of which this rank has some columns."""

    def __init__(self, inner: Reader, group: MemoryGroup) -> None:
        super().__init__(inner, group)
        self._announced: dict[int, tuple[Tensor, Tensor]] = {}

    def announce(self, slots: Tensor, num_slots: int) -> None:
        found = self.group.gather_slots(slots, self.group.counts(len(slots)), num_slots)
        self._announced[id(slots)] = slots, found

    def _of_group(self, slots: Tensor, num_slots: int) -> Tensor:
        if id(slots) not in self._announced:
            self.announce(slots, num_slots)
        known, found = self._announced[id(slots)]
        found = done(found).long()
        self._announced[id(slots)] = known, found  # PEER reads two tables by the same slots
        return found

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        group, counts, columns = self.group, self.group.counts(len(slots)), self.group.part(table).columns
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
        group, counts, columns = self.group, self.group.counts(len(slots)), self.group.part(table).columns
        everyones = _linear(
            x, lambda own: group.to_columns(own, counts), lambda grad: group.from_columns(grad, counts, columns)
        )
        part = self.inner.gather_dot(everyones, table, self._of_group(slots, len(table)))
        self._record(Dotted(slots, x.detach()))
        return _linear(part, lambda dots: group.sum_for_own(dots, counts), lambda grad: group.gather(grad, counts))


class RowReader(_Served):
    """Reads tables of which this rank has every size-th row."""

    def __init__(self, inner: Reader, group: MemoryGroup) -> None:
        super().__init__(inner, group)
        self._announced: dict[int, tuple[Tensor, Requests]] = {}

    def announce(self, slots: Tensor, num_slots: int) -> None:
        self._announced[id(slots)] = slots, Requests(self.group, slots, self.group.counts(len(slots)))

    def _requests(self, slots: Tensor, table: Tensor) -> Requests:
        if id(slots) not in self._announced:
            self.announce(slots, self.group.part(table).slots)
        return self._announced[id(slots)][1]

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        group, counts = self.group, self.group.counts(len(slots))
        asked = self._requests(slots, table)
        sent = self._to_owners(_taken(weights.reshape(-1), asked.order), asked)
        bags = asked.bags
        by_bag = _placed(sent, bags.places, bags.slots.numel()).view(bags.slots.shape)
        part = self.inner.weighted_gather(table, bags.slots, by_bag)
        self._record(Gathered(slots, weights.detach()))
        # A token whose rows are all elsewhere has no bag here, and nothing is read for it.
        everyones = _placed(part, bags.tokens, len(asked.held))
        return _linear(everyones, lambda sums: group.sum_for_own(sums, counts), lambda grad: group.gather(grad, counts))

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        group, counts = self.group, self.group.counts(len(slots))
        asked = self._requests(slots, table)
        everyones = _linear(x, lambda own: group.gather(own, counts), lambda grad: group.sum_for_own(grad, counts))
        bags = asked.bags
        by_bag = self.inner.gather_dot(_taken(everyones, bags.tokens), table, bags.slots)
        self._record(Dotted(slots, x.detach()))
        dots = self._from_owners(_taken(by_bag.reshape(-1), bags.places), asked)
        return _placed(dots, asked.order, slots.numel()).view(slots.shape)

    def _to_owners(self, entries: Tensor, asked: Requests) -> Tensor:
        group, sent, received = self.group, asked.sent, asked.received
        return _linear(
            entries, lambda own: group.exchange(own, sent, received), lambda grad: group.exchange(grad, received, sent)
        )

    def _from_owners(self, entries: Tensor, asked: Requests) -> Tensor:
        group, sent, received = self.group, asked.sent, asked.received
        return _linear(
            entries, lambda own: group.exchange(own, received, sent), lambda grad: group.exchange(grad, sent, received)
        )


class PartReader(Reader):
    """Reads each table as it is shared out, by columns or by rows."""

    def __init__(self, inner: Reader, group: MemoryGroup) -> None:
        self.group = group
        self.by: dict[str, _Served] = {"columns": ColumnReader(inner, group), "rows": RowReader(inner, group)}
        self.records: list[Record] = []
        for reader in self.by.values():
            reader.records = self.records  # of all reads in their order

    def announce(self, slots: Tensor, num_slots: int) -> None:
        """Where tables of so many slots are shared out in both ways, slots are fetched when one of them is read."""
        if (split := self.group.split_of(num_slots)) is not None:
            self.by[split].announce(slots, num_slots)

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return self.by[self.group.part(table).split].weighted_gather(table, slots, weights)

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        return self.by[self.group.part(table).split].gather_dot(x, table, slots)
