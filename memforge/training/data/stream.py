"""Endless streams of windows whose order is a function of the seed, read without ever holding an epoch."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from memforge.spec.schema import MIXTURE_CYCLE

Tokens: TypeAlias = npt.NDArray[np.int32]
Indices: TypeAlias = npt.NDArray[np.integer]

# Windows at the end of one epoch and the start of the next are asked for together, by several threads.
MAX_ORDERS = 2
# Seeds are less than 2**63, so that keys with this bit are those of no epoch.
_MIXTURE_KEY = 1 << 127


class Units(Protocol):
    """Sequences of tokens that are shuffled whole."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def unit_tokens(self) -> int | None:
        """Tokens in each unit; None where they differ."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def take(self, indices: Indices) -> Tokens:
        """The units at `indices`, one after the other: [tokens]."""


class Windows(Protocol):
    """What a stream is to training: windows by their position."""

    epoch_tokens: int

    def windows(self, start: int, count: int) -> Tokens:
        """Windows start..start+count: [count, window]."""


@dataclass(frozen=True)
class _Order:
    """The units of one epoch in order, and where each ends in it; `ends` is None for units of one length."""

    units: Indices
    ends: npt.NDArray[np.int64] | None


class Stream:
    """An endless stream of tokens: all units in a new order each epoch, cut into windows.

    Every epoch holds the same number of tokens, so the window at any position is a pure function of
    (units, seed, position) and a run can start anywhere. Threads may share it.
    """

    def __init__(self, units: Units, *, window: int, seed: int) -> None:
        self.units, self.window, self.seed = units, window, seed
        self.epoch_tokens = units.num_tokens
        self._orders: dict[int, _Order] = {}
        self._lock = threading.Lock()

    def windows(self, start: int, count: int) -> Tokens:
        """Windows start..start+count: [count, window]."""
        position, end = start * self.window, (start + count) * self.window
        parts = [np.zeros(0, np.int32)]
        while position < end:
            epoch, offset = divmod(position, self.epoch_tokens)
            wanted = min(end - position, self.epoch_tokens - offset)
            parts.append(self._tokens(epoch, offset, offset + wanted))
            position += wanted
        return np.concatenate(parts).reshape(count, self.window)

    def _tokens(self, epoch: int, start: int, stop: int) -> Tokens:
        """Tokens start..stop of an epoch, out of the units that hold them."""
        order = self._order(epoch)
        if order.ends is None:
            size = self.units.unit_tokens
            assert size is not None
            first, last, begin = start // size, -(-stop // size), start // size * size
        else:
            first = int(np.searchsorted(order.ends, start, side="right"))
            last = int(np.searchsorted(order.ends, stop, side="left")) + 1
            begin = int(order.ends[first - 1]) if first else 0
        return self.units.take(order.units[first:last])[start - begin : stop - begin]

    def _order(self, epoch: int) -> _Order:
        with self._lock:
            found = self._orders.pop(epoch, None) or self._ordered(epoch)
            while len(self._orders) >= MAX_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = found  # the newest last
            return found

    def _ordered(self, epoch: int) -> _Order:
        order = shuffled(len(self.units), (self.seed << 64) + epoch)
        if self.units.unit_tokens is None:
            return _Order(order, np.cumsum(self.units.lengths[order]))
        # Half the memory, which matters when windows are short and many.
        return _Order(order.astype(np.uint32) if len(order) <= 2**32 else order, None)


class MixtureStream:
    """Windows of several streams, each in its exact share of every cycle, in an order that the seed decides.

    The window at any position is a pure function of (streams, seed, position). Threads may share it.
    """

    def __init__(self, streams: Sequence[Stream], counts: Sequence[int], *, seed: int) -> None:
        self.streams, self.counts, self.seed = streams, counts, seed
        self.window = streams[0].window
        self.epoch_tokens = sum(stream.epoch_tokens for stream in streams)
        self._slots = np.repeat(np.arange(len(counts)), counts)

    def windows(self, start: int, count: int) -> Tokens:
        """Windows start..start+count: [count, window]."""
        out = np.empty((count, self.window), np.int32)
        position = start
        while position < start + count:
            cycle, offset = divmod(position, len(self._slots))
            wanted = min(start + count - position, len(self._slots) - offset)
            self._fill(out[position - start :][:wanted], cycle, offset)
            position += wanted
        return out

    def _fill(self, out: Tokens, cycle: int, offset: int) -> None:
        """The windows of one cycle from `offset` on, each stream read once: its windows there follow each other."""
        order = self._slots[shuffled(len(self._slots), _MIXTURE_KEY + (self.seed << 64) + cycle)]
        before, here = order[:offset], order[offset : offset + len(out)]
        for part, stream in enumerate(self.streams):
            rows = here == part
            first = cycle * self.counts[part] + int((before == part).sum())
            if rows.any():
                out[rows] = stream.windows(first, int(rows.sum()))


def cycle_counts(weights: Sequence[float]) -> list[int]:
    """Windows of each part in a cycle, in the shares of `weights` by the largest remainder."""
    exact = [weight / sum(weights) * MIXTURE_CYCLE for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: MIXTURE_CYCLE - sum(counts)]:
        counts[i] += 1
    return counts


def shuffled(count: int, key: int) -> npt.NDArray[np.int64]:
    """0..count-1 in the order that a Philox key decides."""
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
