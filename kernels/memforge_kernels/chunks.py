"""How many bags are read at a time where rows must be copied into another dtype."""

from torch import Tensor

# 2**22 elements are 16 MiB in fp32.
CHUNK_ELEMENTS = 2**22


def rows_at_a_time(slots: Tensor, values: Tensor) -> int:
    """Bags whose gathered rows make up one chunk: slots [n, k], values [m, v]."""
    return max(1, CHUNK_ELEMENTS // max(1, slots.shape[1] * values.shape[1]))
