"""Who reads which rows of a table that is shared out by rows: entries sorted by owner, and bags of those received."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memforge_kernels.row_update.gradient import stable_sort
from memforge_kernels.shared_out.groups import MemoryGroup, done


@dataclass(frozen=True)
class Bags:
    """The entries that a rank was sent, as a read of its own rows: a bag for each token of the group that has any.

    Bags are as long as the longest, and filled up with the first slot that they have: by the weight 0 it changes
    nothing, and no row is touched that was not read.
    Shape: slots [u, longest] int64, local rows; places [r] of the entries among the u * longest; tokens [u].
    """

    slots: Tensor
    places: Tensor
    tokens: Tensor


class Requests:
    """The slots [n, k] that the ranks of a group read, each sent to the rank that has the row: slot % size.

    Which token an entry belongs to is told by the number of entries that each token has at each owner: one byte for
    every token and owner, where four for every entry would tell the same, and it tells how many entries there are.
    """

    def __init__(self, group: MemoryGroup, slots: Tensor, counts: Sequence[int]) -> None:
        n, k = slots.shape
        owners = (slots % group.size).flatten()
        token = torch.arange(n, device=slots.device).repeat_interleave(k)
        asked = torch.bincount(owners * n + token, minlength=group.size * n)
        # Entries of a rank by owner, those of an owner by token.
        _, self.order = stable_sort(owners)
        small = asked.to(torch.uint8 if k < 2**8 else torch.int32)
        self.held = done(group.exchange(small, [n] * group.size, counts)).long()
        per_owner = asked.view(group.size, n).sum(dim=1)
        per_rank = torch.stack([of_rank.sum() for of_rank in self.held.split(list(counts))])
        longest = self.held.max() if len(self.held) else self.held.sum()
        *sizes, self.longest = torch.cat((per_owner, per_rank, longest[None])).tolist()
        self.sent, self.received = sizes[: group.size], sizes[group.size :]
        self._slots = group.exchange(
            (slots.flatten()[self.order] // group.size).to(torch.int32), self.sent, self.received
        )

    @cached_property
    def bags(self) -> Bags:
        """Waits for the slots."""
        slots, longest, device = done(self._slots).long(), max(1, self.longest), self.held.device
        tokens = self.held.nonzero().squeeze(1)
        lengths = self.held[tokens]
        firsts = lengths.cumsum(0) - lengths
        places = torch.arange(len(slots), device=device)
        shift = torch.arange(len(tokens), device=device) * longest - firsts
        places = places + shift.repeat_interleave(lengths, output_size=len(slots))
        filled = slots[firsts][:, None].repeat(1, longest)
        filled.view(-1)[places] = slots
        return Bags(filled, places, tokens)
