"""What a block sees of the pools, and where it leaves what training wants to know about it."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from memforge_kernels import Reader


@dataclass(frozen=True)
class Pools:
    """The shared pools by name, and the reader through which tables are read: a tape, if it is to be recorded how.

    `observed` takes figures of the block by name, each a mean over tokens: telemetry, never part of the loss.
    """

    shared: nn.ModuleDict
    reader: Reader = field(default_factory=Reader)
    observed: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> nn.Module:
        return self.shared[name]
