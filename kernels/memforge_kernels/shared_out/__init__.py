"""Tables that are shared out among ranks, by columns or by rows, and how they are read and updated there."""

from memforge_kernels.shared_out.backend import gloo
from memforge_kernels.shared_out.groups import MemoryGroup, Split, TokenGroup
from memforge_kernels.shared_out.readers import ColumnReader, PartReader, RowReader

__all__ = ["ColumnReader", "MemoryGroup", "PartReader", "RowReader", "Split", "TokenGroup", "gloo"]
