"""Ranks on torch.distributed: FSDP2 for dense parameters, memory groups for pools, gloo for what is no tensor."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from memforge.errors import DeviceError, MemforgeError
from memforge.mesh import Mesh, Split, SplitChoice, part_of_pool, shard_dim, shard_of, sizes
from memforge.nn.decoder import Decoder
from memforge.pieces import Piece
from memforge.plan import ModelPlan, ParamRow, split_of
from memforge.training.ranks import Ranks, T
from memforge_kernels import Read, Reader
from memforge_kernels.shared_out import MemoryGroup, PartReader, TokenGroup, gloo

NO_HURRY = timedelta(days=30)


@contextmanager
def joined(
    mesh: Mesh, device: str, local_rank: int, wait_minutes: float, pools: SplitChoice = "auto"
) -> Iterator[Ranks]:
    """This process among the ranks of its run, by the variables of torchrun.

    Raises DeviceError where they do not come together, or do not stay together.
    """
    on_gpu = device.startswith("cuda")
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        # gloo otherwise listens where the host's name leads.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    wait = timedelta(minutes=wait_minutes)
    try:
        dist.init_process_group(f"cpu:{gloo()},cuda:nccl" if on_gpu else gloo(), timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"this rank has not found the others: {_first_line(error)}") from None
    rank = dist.get_rank()
    try:
        yield ProcessRanks(mesh, "cuda" if on_gpu else "cpu", local_rank, wait, pools)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise DeviceError(f"rank {rank} has lost another rank: {_first_line(error)}") from None
        raise
    dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """What gloo or NCCL say, without the place in their sources, the condition that stands there and their advice."""
    line = str(error).strip().split("\n")[0]
    return re.sub(r"^\[(enforce fail at [^\]]*\] .*?\. |[^\]]*\.\w+:[0-9]+\]\s*)", "", line).partition(". ")[0]


def _control(wait: timedelta | None) -> dist.ProcessGroup:
    """A group of all ranks for what is no tensor."""
    return dist.new_group(backend=None if dist.get_backend() == "fake" else gloo(), timeout=wait)


class ProcessRanks(Ranks):
    """This process among those of a mesh. How it shares out `pools` follows from the plan of the model it builds."""

    def __init__(
        self,
        mesh: Mesh,
        device_type: str,
        local_rank: int = 0,
        wait: timedelta | None = None,
        pools: SplitChoice = "auto",
    ) -> None:
        self.mesh, self.rank, self.local_rank, self.wait = mesh, dist.get_rank(), local_rank, wait
        self.dense = self._dense_mesh(device_type)
        groups = torch.arange(mesh.ranks).view(mesh.copies, mesh.memory)
        self.memory = MemoryGroup(self._group(groups), partial(sizes, parts=mesh.memory)) if mesh.memory > 1 else None
        self.copies = TokenGroup(self._group(groups.T)) if mesh.copies > 1 else None
        self.pools = pools
        self._splits: dict[str, Split] = {}
        self.control = _control(wait)

    @property
    def machines(self) -> int:
        return max(1, self.size // int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def beside(self) -> "ProcessRanks":
        return self._with(_control(self.wait))

    def patient(self) -> "ProcessRanks":
        return self._with(_control(NO_HURRY))

    def _with(self, control: dist.ProcessGroup) -> "ProcessRanks":
        """The same ranks, which talk in a group of their own."""
        others = copy(self)
        others.control = control
        return others

    def _group(self, groups: Tensor) -> dist.ProcessGroup:
        """That of this rank among groups of ranks [number, size]; those of init_device_mesh wait for 30 minutes."""
        world = dist.group.WORLD
        if len(groups) == 1 and world is not None:  # another one would take memory of a GPU
            return world
        return dist.new_subgroups_by_enumeration(groups.tolist(), timeout=self.wait)[0]

    def _dense_mesh(self, device_type: str) -> DeviceMesh:
        ranks = torch.arange(self.size).view(self.mesh.dp_replicate, self.mesh.shards)
        shards = self._group(ranks)
        if self.mesh.dp_replicate == 1:
            return DeviceMesh.from_group(shards, device_type, mesh_dim_names=("shards",))
        names = ("dp_replicate", "shards")
        return DeviceMesh.from_group([self._group(ranks.T), shards], device_type, ranks, mesh_dim_names=names)

    def piece(self, row: ParamRow) -> Piece | None:
        if row.group == "values":
            if self.mesh.memory == 1:
                return None
            assert row.owner in self._splits, "how pools are shared out is known once a model is built"
            return part_of_pool(row.shape, self.mesh, self.rank, self._splits[row.owner])
        return shard_of(row.shape, self.mesh, self.rank) if self.mesh.shards > 1 else None

    def share_out(self, model: Decoder, plan: ModelPlan) -> dict[str, Piece]:
        self._splits = split_of(plan, self.pools, self.mesh)
        values = [row for row in plan.params if row.group == "values"]
        for row in values:
            if (piece := self.piece(row)) is not None:
                owner, _, name = row.path.rpartition(".")
                part = nn.Parameter(model.get_parameter(row.path).new_empty(piece.shape(row.shape)))
                setattr(model.get_submodule(owner), name, part)
        self._shard(model, {model.get_parameter(row.path) for row in values})
        return {row.path: piece for row in plan.params if (piece := self.piece(row)) is not None}

    def _shard(self, model: Decoder, pools: set[nn.Parameter]) -> None:
        """Every layer and what is outside of them is gathered when it runs; gradients are sums over ranks."""

        def placement(parameter: nn.Parameter) -> Shard:
            return Shard(shard_dim(tuple(parameter.shape), self.mesh.shards))

        # Logits are a view, and so are taps; nothing is added to either in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for module in (*model.layers, model):
            fully_shard(module, mesh=self.dense, shard_placement_fn=placement, ignored_params=pools)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        register_fsdp_forward_method(model, "forward_with")

    def connect(self, model: Decoder, plan: ModelPlan) -> None:
        memory = self.memory
        if memory is None:
            return
        for row in plan.params:
            if row.group == "values":
                memory.share_out(model.get_parameter(row.path), self._splits[row.owner], row.shape)

        def through(reader: Reader) -> Reader:
            return PartReader(reader, memory)

        model.through = through

    def rest(self, model: Decoder) -> None:
        assert isinstance(model, FSDPModule)
        model.reshard()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    def total_of_group(self, x: Tensor) -> Tensor:
        if self.memory is None:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.memory.group)
        return x

    def total_of_copies(self, x: Tensor) -> Tensor:
        if self.copies is None:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.copies.group)
        return x

    def tokens(self, of_ranks: Sequence[int]) -> AbstractContextManager[None]:
        if self.memory is None:
            return nullcontext()
        first = self.rank - self.memory.rank
        return self.memory.tokens(of_ranks[first : first + self.memory.size])

    def of_all_copies(self, table: Tensor, read: Read, tokens: Sequence[int]) -> Read:
        if self.copies is None:
            return read
        if self.memory is not None and self.memory.part(table).split == "rows":
            return self.copies.gather_bags(read, len(table))
        size = self.mesh.memory
        of_groups = [sum(tokens[first : first + size]) for first in range(0, self.size, size)]
        return self.copies.gather_read(read, len(table), of_groups)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def share(self, value: T) -> T:
        one = [value]
        dist.broadcast_object_list(one, src=0, group=self.control)
        return one[0]

    def first(self, make: Callable[[], T], shown: Callable[[T], T] = lambda made: made) -> T:
        made, error = self._try(make) if self.is_first else (None, None)
        error, given = self.share((error, None if made is None else shown(made)))
        if error is not None:
            raise error
        return made if self.is_first else given  # type: ignore[return-value]

    def all_or_none(self, make: Callable[[], T]) -> T:
        made, error = self._try(make)
        for found in self.gather(error):
            if found is not None:
                raise found
        return made  # type: ignore[return-value]

    def one_after_the_other(self, make: Callable[[], T]) -> T:
        made = self.all_or_none(lambda: None if self.local_rank else make())
        return self.all_or_none(lambda: make() if self.local_rank else made)  # type: ignore[return-value]

    @staticmethod
    def _try(make: Callable[[], T]) -> tuple[T | None, MemforgeError | None]:
        """What is made, or the error for the user, marked as one that all ranks have."""
        try:
            return make(), None
        except MemforgeError as error:
            error.of_all_ranks = True
            return None, error

    def as_part_of(self, parameter: Tensor, local: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or local.shape != parameter.to_local().shape:
            return local
        given = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(local, parameter.device_mesh, parameter.placements, **given)

    def writes(self, row: ParamRow) -> bool:
        if self.piece(row) is None:
            return self.is_first
        return self.rank < (self.mesh.memory if row.group == "values" else self.mesh.shards)

    def agree(self, flags: Sequence[int]) -> list[int]:
        both = torch.tensor(list(flags), dtype=torch.int64)
        dist.all_reduce(both, group=self.control)
        return [int(flag) for flag in both]
