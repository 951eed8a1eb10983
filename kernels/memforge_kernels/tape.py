"""Reads of tables, done or recorded: what a row-sparse optimizer needs instead of a dense gradient."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memforge_kernels.gather_dot import gather_dot
from memforge_kernels.row_update.gradient import Read
from memforge_kernels.weighted_gather import weighted_gather


class Gathered(NamedTuple):
    """A weighted_gather that was made; `rows`, its gradient, meets the weights."""

    slots: Tensor
    weights: Tensor

    def read(self, rows: Tensor) -> Read:
        return Read(self.slots, self.weights, rows)


class Dotted(NamedTuple):
    """A gather_dot that was made; `weights`, its gradient, meets the vectors."""

    slots: Tensor
    x: Tensor

    def read(self, weights: Tensor) -> Read:
        return Read(self.slots, weights, self.x)


Record = Gathered | Dotted


class Reader:
    """Reads tables by the ops and records nothing; gradients of tables are autograd's, dense."""

    records: Sequence[Record] = ()

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

    A tap, a zero that is added to what a read returns, receives the gradient there as its `.grad`; `record.read(grad)`
    is the read as a RowOptimizer takes it. A tape makes its own taps; where the forward pass is compiled they must come
    from outside, in the order of the reads and of the shapes of their outputs.
    """

    def __init__(self, taps: Sequence[Tensor] | None = None) -> None:
        self.given = taps
        self.taps: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.records: list[Record] = []

    def weighted_gather(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return self._tapped(table, Gathered(slots, weights.detach()), weighted_gather(table.detach(), slots, weights))

    def gather_dot(self, x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        return self._tapped(table, Dotted(slots, x.detach()), gather_dot(x, table.detach(), slots))

    def _tapped(self, table: Tensor, record: Record, out: Tensor) -> Tensor:
        tap = new_tap(out.shape, out) if self.given is None else self.given[len(self.records)]
        self.taps.append(tap)
        self.tables.append(table)
        self.records.append(record)
        return out + tap


def new_tap(shape: Sequence[int], like: Tensor) -> Tensor:
    """A leaf of zeros that takes no memory until it has a gradient."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()
