"""The ranks of a run: what each of them has, and what they do together."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

from torch import Tensor

from memforge.build import build_model
from memforge.errors import DeviceError, UsageError
from memforge.mesh import Mesh, shares
from memforge.nn.decoder import Decoder
from memforge.pieces import Piece
from memforge.plan import ModelPlan, ParamRow
from memforge.spec.schema import ParallelSpec
from memforge_kernels import Read

T = TypeVar("T")


class Ranks:
    """A rank that is alone: it has all of everything, and what ranks do together comes to nothing."""

    mesh = Mesh()
    rank = 0

    @property
    def size(self) -> int:
        return self.mesh.ranks

    @property
    def machines(self) -> int:
        return 1

    def beside(self) -> "Ranks":
        """The same ranks for another thread, whose talk does not mix with that of this one."""
        return self

    def patient(self) -> "Ranks":
        """The same ranks, which wait for what one of them does alone, however long that takes."""
        return self

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def split(self, batch: int, micro_batch: int) -> list[list[int]]:
        """Sequences of every pass of every rank: [ranks][passes]."""
        return shares(batch, self.mesh, micro_batch)

    def piece(self, row: ParamRow) -> Piece | None:
        """The part of a parameter that this rank has; None: all of it."""
        return None

    def share_out(self, model: Decoder, plan: ModelPlan) -> dict[str, Piece]:
        """Leave each parameter of a model on meta only the part that this rank has; the parts by path."""
        return {}

    def connect(self, model: Decoder, plan: ModelPlan) -> None:
        """Have a model with memory of its own read what other ranks have of it."""

    def build(self, plan: ModelPlan, *, seed: int | None, device: str = "cpu") -> Decoder:
        """The model of a plan as this rank has it; with no seed, not initialised."""
        model = build_model(plan, seed=seed, device=device, share_out=self.share_out, local=self.local)
        self.connect(model, plan)
        return model

    def rest(self, model: Decoder) -> None:
        """Have a model that was scored give back what it has gathered: only a backward pass would do that."""

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, a gradient or a moment."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a dense parameter or moment, on every rank."""
        return tensor

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same on each of them."""
        return x

    def total_of_group(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share out pools among them."""
        return x

    def total_of_copies(self, x: Tensor) -> Tensor:
        """The sum over the ranks that have the same part of the pools."""
        return x

    def tokens(self, of_ranks: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, every rank reads pools for so many tokens."""
        return nullcontext()

    def of_all_copies(self, table: Tensor, read: Read, tokens: Sequence[int]) -> Read:
        """A read together with those that ranks with the same part of the table have made for the others' tokens."""
        return read

    def gather(self, value: T) -> list[T]:
        """What every rank gives, by rank."""
        return [value]

    def share(self, value: T) -> T:
        """What the first rank gives."""
        return value

    def first(self, make: Callable[[], T], shown: Callable[[T], T] = lambda made: made) -> T:
        """What the first rank makes; the others get what is `shown` of it. An error of the first is that of all."""
        return make()

    def all_or_none(self, make: Callable[[], T]) -> T:
        """What each rank makes, if all of them can. Otherwise all raise the error of the first that could not."""
        return make()

    def one_after_the_other(self, make: Callable[[], T]) -> T:
        """What each rank makes, the first of each machine before the others: what it leaves in a cache is found."""
        return make()

    @contextmanager
    def first_enters(
        self, context: Callable[[], AbstractContextManager[T]], shown: Callable[[T], T] = lambda made: made
    ) -> Iterator[T]:
        """Inside a context that the first rank alone enters and leaves, for all; see `first`."""
        stack = ExitStack()
        entered = self.first(lambda: stack.enter_context(context()), shown)
        with stack:
            yield entered
            self.first(stack.close)

    def as_part_of(self, parameter: Tensor, local: Tensor) -> Tensor:
        """A moment of a parameter, of which `local` is what this rank has."""
        return local

    def writes(self, row: ParamRow) -> bool:
        """Whether this rank is the one that writes the part of a parameter that it has."""
        return True

    def agree(self, flags: Sequence[int]) -> list[int]:
        """The sum of each flag over all ranks."""
        return list(flags)


ALONE = Ranks()


@contextmanager
def ranks_of(parallel: ParallelSpec, device: str) -> Iterator[Ranks]:
    """The ranks of this process's run: those that torchrun, or what sets its variables, has started.

    Raises UsageError where they are not those of [parallel], DeviceError where they lose one another.
    """
    names = ("WORLD_SIZE", "LOCAL_RANK")
    try:
        world_size, local_rank = (int(os.environ.get(name, default)) for name, default in zip(names, "10", strict=True))
    except ValueError:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise DeviceError(f"the variables of torchrun are no numbers: {given}") from None
    mesh = mesh_of(parallel, world_size)
    if world_size == 1:
        yield ALONE
        return
    # A run of one rank does not wait for what it does not use.
    from memforge.training.distributed import joined

    with joined(mesh, device, local_rank, parallel.timeout_minutes, parallel.pools) as ranks:
        yield ranks


def mesh_of(parallel: ParallelSpec, world_size: int) -> Mesh:
    """The mesh of [parallel] on so many ranks. Raises UsageError where it does not come out even."""
    shards = parallel.dp_shard
    if shards == "auto":
        shards = max(1, world_size // (parallel.dp_replicate * parallel.memory))
    mesh = Mesh(parallel.dp_replicate, shards, parallel.memory)
    if mesh.ranks != world_size:
        started = f"{world_size} ranks were started" if world_size > 1 else "one was started; --nproc starts more"
        raise UsageError(f"[parallel] {mesh} are {mesh.ranks} ranks, and {started}; --mesh gives another mesh")
    return mesh
