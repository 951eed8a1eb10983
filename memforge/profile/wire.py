"""Bytes on the wire, counted: every collective that is made, as torch dispatches it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memforge.cost.wire import Op, sent_bytes


class Recorded(NamedTuple):
    """A collective of this rank: the ranks of its group, and bytes as memforge.cost.wire counts them."""

    op: Op
    ranks: tuple[int, ...]
    payload: int
    sent: int


# Of each op what it is, and the argument that holds what a rank hands in.
COLLECTIVES: Mapping[str, tuple[Op, str]] = {
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "_c10d_functional::all_reduce": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", "inputs"),
    "_c10d_functional::all_to_all_single": ("all_to_all", "input"),
    "_c10d_functional::broadcast": ("broadcast", "input"),
    "_c10d_functional::broadcast_": ("broadcast", "input"),
    "c10d::_allgather_base_": ("all_gather", "input_tensor"),
    "c10d::allgather_": ("all_gather", "input_tensors"),
    "c10d::allgather_coalesced_": ("all_gather", "input_list"),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "c10d::reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "c10d::allreduce_": ("all_reduce", "tensors"),
    "c10d::allreduce_coalesced_": ("all_reduce", "tensors"),
    "c10d::alltoall_base_": ("all_to_all", "input"),
    "c10d::alltoall_": ("all_to_all", "input_tensors"),
    "c10d::broadcast_": ("broadcast", "tensors"),
}
# What moves no tensor of its own.
WITHOUT_BYTES = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "check_for_nan")


class RecordedCollectives(TorchDispatchMode):
    """Inside, every collective of this thread and of the backward passes that it starts is added to `calls`.

    Raises NotImplementedError for one that it does not know, so that none is left out in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            names = [argument.name for argument in func._schema.arguments]
            self._see(func._schema.name, dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, given: dict[str, Any]) -> None:
        if name not in COLLECTIVES:
            if name.rpartition("::")[2] not in WITHOUT_BYTES:
                raise NotImplementedError(f"{name} is a collective whose bytes nobody counts")
            return
        op, argument = COLLECTIVES[name]
        ranks, payload = _ranks(given), _bytes(given[argument])
        own = _own_part(given, given[argument], ranks) if op == "all_to_all" else None
        self.calls.append(Recorded(op, ranks, payload, sent_bytes(op, len(ranks), payload, own)))


def _bytes(x: Any) -> int:
    """Of a tensor or of a list of them."""
    return x.nbytes if isinstance(x, Tensor) else sum(_bytes(each) for each in x)


def _ranks(given: Mapping[str, Any]) -> tuple[int, ...]:
    """Those of the group that is among the arguments, itself or by its name."""
    group = given["group_name"] if "group_name" in given else dist.ProcessGroup.unbox(given["process_group"])
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    return tuple(dist.get_process_group_ranks(group))


def _own_part(given: Mapping[str, Any], x: Any, ranks: tuple[int, ...]) -> int:
    """Bytes of an exchange that stay with this rank."""
    place = ranks.index(dist.get_rank())
    if not isinstance(x, Tensor):
        return _bytes(x[place])
    parts = given["input_split_sizes"]
    return _bytes(x.split(parts)[place] if parts else x.chunk(len(ranks))[place])
