"""Which part of a tensor a rank holds, and where its elements lie in the whole; without torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Runs:
    """Elements of a flat tensor in their order: groups of `num_runs` runs of `run_length` consecutive ones.

    Run i of group g starts at first + g * group_stride + i * stride. There is no last group.
    """

    first: int
    stride: int
    num_runs: int
    run_length: int
    group_stride: int = 0


@dataclass(frozen=True)
class Piece:
    """Part of a tensor along one dimension: the indices start, start + step, .., `length` of them.

    `length` may be 0.
    """

    dim: int
    start: int
    length: int
    step: int = 1

    def __post_init__(self) -> None:
        assert self.dim >= 0
        assert self.start >= 0
        assert self.length >= 0
        assert self.step >= 1

    @property
    def indices(self) -> range:
        return range(self.start, self.start + self.length * self.step, self.step)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """That of the piece of a tensor of shape `whole`."""
        assert self.length == 0 or self.indices[-1] < whole[self.dim]
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])

    def runs(self, whole: tuple[int, ...]) -> Runs:
        """Its elements in the flat tensor of shape `whole`."""
        inner = math.prod(whole[self.dim + 1 :])
        first, group_stride = self.start * inner, whole[self.dim] * inner
        if self.step == 1:
            return Runs(first, 0, 1, self.length * inner, group_stride)
        return Runs(first, self.step * inner, self.length, inner, group_stride)
