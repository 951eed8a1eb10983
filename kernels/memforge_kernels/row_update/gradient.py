"""The gradient of a table that a few rows of each batch are read from, without forming the table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """One read of a table, backward: row slots[i, j] has the gradient weights[i, j] * rows[i], summed over (i, j).

    Shape: slots [n, k] int64, weights [n, k], rows [n, v].
    """

    slots: Tensor
    weights: Tensor
    rows: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.slots, self.weights, self.rows))


@dataclass(frozen=True)
class RowGradient:
    """The gradient of the rows that were read, sorted by slot and still in factors.

    Row touched[i] has the gradient sum over e in starts[i]..starts[i + 1] of weights[e] * rows[row_idx[e]].
    Shape: touched [u] int64, ascending; starts [u + 1] int64; row_idx [r] int64; weights [r] fp32; rows [n, v] fp32
    (fp64 if the reads are).
    """

    touched: Tensor
    starts: Tensor
    row_idx: Tensor
    weights: Tensor
    rows: Tensor


def sorted_gradient(reads: Sequence[Read]) -> RowGradient:
    """The sum of several reads of one table, by readers and micro-batches alike; at least one.

    A stable sort fixes the order of every sum, so that the result is the same bit for bit from run to run.
    """
    dtype = torch.promote_types(reads[0].rows.dtype, torch.float32)
    slots = joined([read.slots.reshape(-1) for read in reads])
    weights = joined([read.weights.reshape(-1).to(dtype) for read in reads])
    rows = joined([read.rows.to(dtype) for read in reads]).contiguous()
    by_slot, order = stable_sort(slots)
    # Not unique_consecutive, whose results keep the memory of one number for each entry.
    changes = (by_slot[1:] != by_slot[:-1]).nonzero().squeeze(1) + 1
    starts = torch.cat((changes.new_zeros(1), changes, changes.new_full((1,), len(by_slot))))
    touched = by_slot[starts[:-1]]
    return RowGradient(touched, starts, _rows_of_entries(reads, slots.device)[order], weights[order], rows)


def stable_sort(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots ascending, and which entry each comes from: equal slots keep the order of their entries.

    On a CPU slot and entry are sorted as one number: no two are equal, so any sort is stable, and numpy's is fast.
    """
    bits = len(slots).bit_length()
    if slots.is_cuda or not len(slots) or int(slots.max()) >> (63 - bits):
        return slots.sort(stable=True)
    both = (slots << bits) | torch.arange(len(slots))
    both.numpy().sort()
    return both >> bits, both & ((1 << bits) - 1)


def _rows_of_entries(reads: Sequence[Read], device: torch.device) -> Tensor:
    """For every entry of all reads, laid out flat, the row of `rows` it scales."""
    parts, first = [], 0
    for read in reads:
        n, k = read.slots.shape
        parts.append(torch.arange(first, first + n, device=device).repeat_interleave(k))
        first += n
    return joined(parts)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
