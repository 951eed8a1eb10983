"""Reads of tables, done or recorded: what a row-sparse optimizer needs instead of a dense gradient."""

from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

from memforge_kernels.gather_dot import gather_dot
from memforge_kernels.row_update.gradient import Read
from memforge_kernels.weighted_gather import weighted_gather


class Gathered(NamedTuple):
    """A weighted_gather that was made. `tap` receives its gradient, rows, which meet the weights.

    Where a table is shared out among ranks, slots and weights are those that this rank asked for, and `served` is the
    read that it made of its part, for all of them.
    """

    slots: Tensor
    weights: Tensor
    tap: Tensor | None = None
    served: Union["Record", None] = None

    def read(self) -> Read | None:
        """The read as a RowOptimizer takes it; None where no gradient came back."""
        if self.served is not None:
            return self.served.read()
        rows = None if self.tap is None else self.tap.grad
        return None if rows is None else Read(self.slots, self.weights, rows)


class Dotted(NamedTuple):
    """A gather_dot that was made. `tap` receives its gradient, weights, which meet the vectors; `served` as above."""

    slots: Tensor
    x: Tensor
    tap: Tensor | None = None
    served: Union["Record", None] = None

    def read(self) -> Read | None:
        """The read as a RowOptimizer takes it; None where no gradient came back."""
        if self.served is not None:
            return self.served.read()
        weights = None if self.tap is None else self.tap.grad
        return None if weights is None else Read(self.slots, weights, self.x)


Record = Gathered | Dotted


class Reader:
    """Reads tables by the ops and records nothing; gradients of tables are autograd's, dense."""

    records: Sequence[Record] = ()

    def announce(self, slots: Tensor, num_slots: int) -> None:
        """Slots of a table of `num_slots` rows that are about to be read: a reader may fetch them from now on."""

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return weighted_gather(table, slots, weights)

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        return gather_dot(x, table, slots)


class Recorder(Reader):
    """Records how tables are read, and leaves their gradients to autograd."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        self.records.append(Gathered(slots, weights.detach()))
        return super().weighted_gather(table, slots, weights)

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        self.records.append(Dotted(slots, x.detach()))
        return super().gather_dot(x, table, slots)


class Tape(Reader):
    """Reads tables outside of autograd and records how: the gradient of a table stays in the factors it is made of.

    A tap, a zero that is added to what a read returns, receives the gradient there as its `.grad`. A tape makes its own
    taps; where the forward pass is compiled they must come from outside, in the order of the reads and of the shapes of
    their outputs.
    """

    def __init__(self, taps: Sequence[Tensor] | None = None) -> None:
        self.given = taps
        self.tables: list[Tensor] = []
        self.records: list[Record] = []

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = weighted_gather(table.detach(), slots, weights)
        tap = self._tap(out)
        self._record(table, Gathered(slots, weights.detach(), tap))
        return out + tap

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        out = gather_dot(x, table.detach(), slots)
        tap = self._tap(out)
        self._record(table, Dotted(slots, x.detach(), tap))
        return out + tap

    def _tap(self, out: Tensor) -> Tensor:
        return new_tap(out.shape, out) if self.given is None else self.given[len(self.records)]

    def _record(self, table: Tensor, record: Record) -> None:
        self.tables.append(table)
        self.records.append(record)


def new_tap(shape: Sequence[int], like: Tensor) -> Tensor:
    """A leaf of zeros that takes no memory until it has a gradient."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()
