"""Slots of a table, checked before a kernel reads or writes where they point."""

import os

import torch
from torch import Tensor

# On a GPU the check waits for the device, so there it is made where this is "1".
CHECKED = "MEMFORGE_CHECKED"


def require_slots(slots: Tensor, num_rows: int) -> None:
    """Raise ValueError for a slot outside 0..num_rows-1; on a GPU in checked mode only (MEMFORGE_CHECKED=1)."""
    if not slots.numel() or (slots.is_cuda and os.environ.get(CHECKED) != "1"):
        return
    low, high = (int(bound) for bound in torch.aminmax(slots))
    if low < 0 or high >= num_rows:
        raise ValueError(f"slots {low} to {high}: the table has {num_rows} rows, 0 to {num_rows - 1}")
