"""What a block sees of the pools."""

from dataclasses import dataclass, field

from torch import nn

from memforge_kernels import Reader


@dataclass(frozen=True)
class Pools:
    """The shared pools by name, and the reader through which tables are read: a tape, if it is to be recorded how."""

    shared: nn.ModuleDict
    reader: Reader = field(default_factory=Reader)

    def __getitem__(self, name: str) -> nn.Module:
        return self.shared[name]
