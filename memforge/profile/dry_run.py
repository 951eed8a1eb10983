"""One training step of one rank among many, walked through without memory, numbers or other ranks.

The model is made of fake tensors, the process group is torch's fake one, and everything else is the code that trains:
what it allocates is counted storage by storage.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from memforge.cost import estimate
from memforge.cost.wire import expected_bags
from memforge.mesh import MESH_AXES, Mesh, SplitChoice, shares, sizes
from memforge.nn.decoder import Decoder
from memforge.plan import Plan, TrainPlan
from memforge.profile.live import LiveStorage
from memforge.profile.measure import train_plan
from memforge.training.distributed import ProcessRanks
from memforge.training.optimizer import Stepper
from memforge.training.ranks import ALONE, Ranks
from memforge.training.schedule import PEAK
from memforge_kernels import RowOptimizer
from memforge_kernels.row_update import op as row_ops
from memforge_kernels.row_update.gradient import Read, RowGradient, joined
from memforge_kernels.shared_out import MemoryGroup, TokenGroup, readers
from memforge_kernels.shared_out.groups import done
from memforge_kernels.shared_out.requests import Bags, Requests


@dataclass(frozen=True)
class DryRun:
    """What a rank holds: parameters it has, and bytes of weights, of optimizer state, and at the peak of a step.

    `passes` are the sequences of each of its passes.
    """

    rank: int
    passes: list[int]
    params: int
    weights: int
    optimizer: int
    peak: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(plan: Plan, mesh: Mesh, rank: int | None = None) -> DryRun:
    """The second training step of a rank, by default the last, which has most columns and sequences where they do not
    divide; of rows and of dense parameters the first has most. The first step makes the optimizer's state.

    What follows from the numbers is expected: that slots fall on all ranks alike, and that no slot is read twice.
    """
    run, begin = training_of(plan, mesh), time.perf_counter()
    rank = mesh.ranks - 1 if rank is None else rank
    with (
        _ranks(mesh, rank, plan.run.parallel.pools) as ranks,
        FakeTensorMode(allow_non_fake_inputs=True),
        _without_numbers(),
    ):
        model = Decoder(plan.model).train()
        ranks.share_out(model, plan.model)
        ranks.connect(model, plan.model)
        stepper = Stepper(model, plan.model, run, ranks=ranks)
        passes = ranks.split(run.batch_size, run.micro_batch_size)[rank]
        window = torch.zeros(sum(passes), run.seq_len + 1, dtype=torch.int64)
        held = [ranks.local(parameter) for parameter in model.parameters()]
        _step(stepper, window)
        kept = (
            value for optimizer in stepper.optimizers for found in optimizer.state.values() for value in found.values()
        )
        state = [ranks.local(value) for value in kept if isinstance(value, Tensor)]
        with ResizedStorage([*held, *state]) as live:
            _step(stepper, window)
    return DryRun(
        rank=rank,
        passes=passes,
        params=sum(tensor.numel() for tensor in held),
        weights=_bytes(held),
        optimizer=_bytes(state),
        peak=live.peak,
        seconds=time.perf_counter() - begin,
    )


def training_of(plan: Plan, mesh: Mesh) -> TrainPlan:
    """[train] of a plan; where it has none, one sequence of full length for each rank."""
    return plan.run.train or train_plan(plan, mesh.ranks, plan.model.max_seq_len, micro_batch_size=1)


def record(plan: Plan, mesh: Mesh, walked: DryRun) -> dict[str, Any]:
    """What was walked through beside what the ledger says of the fullest rank, as one JSON document."""
    run = training_of(plan, mesh)
    most = max(map(max, shares(run.batch_size, mesh, run.micro_batch_size)))
    shape = {"batch": most, "seq_len": run.seq_len, "update": plan.run.pool_update}
    shape |= {"dropout": run.dropout > 0, "pools": plan.run.parallel.pools}
    ledger = estimate(plan.model, mesh=mesh, devices=(), **shape).as_dict()["mesh"]
    assert ledger is not None
    peak = "peak_bytes_checkpointed_per_rank" if run.activation_checkpointing else "peak_bytes_per_rank"
    keys = {"params": "params_per_rank", "weights": "weight_bytes_per_rank", "optimizer": "optimizer_bytes_per_rank"}
    return {
        "name": plan.name,
        "ranks": mesh.ranks,
        "mesh": {axis: getattr(mesh, axis) for axis in MESH_AXES},
        "walked": walked.as_dict(),
        "ledger": {name: ledger[key] for name, key in (keys | {"peak": peak}).items()},
    }


def _step(stepper: Stepper, window: Tensor) -> None:
    stepper.backward(window)
    stepper.update(1.0, PEAK)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _ranks(mesh: Mesh, rank: int, pools: SplitChoice) -> Iterator[Ranks]:
    """A rank of a mesh whose other ranks are not there."""
    if mesh.ranks == 1:
        yield ALONE
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.ranks)
    try:
        yield ProcessRanks(mesh, "cpu", pools=pools)
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Inside, reads are sorted by slots that have no values, and nobody looks whether those are rows of the table."""
    replaced = (
        (RowOptimizer, "_gradient", _gradient),
        (row_ops, "require_slots", lambda *_: None),
        (readers, "Requests", _ExpectedRequests),
        (TokenGroup, "gather_bags", _gather_bags),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, instead in replaced:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, before, strict=True):
            setattr(owner, name, original)


def _gradient(optimizer: RowOptimizer, table: Tensor) -> RowGradient:
    """As sorted_gradient makes it, op by op, of a table with as many rows as the reads may have touched."""
    known = optimizer._gradients
    if table not in known:
        reads = optimizer._reads[table]
        dtype = torch.promote_types(reads[0].rows.dtype, torch.float32)
        slots = joined([read.slots.reshape(-1) for read in reads])
        weights = joined([read.weights.reshape(-1).to(dtype) for read in reads])
        rows = joined([read.rows.to(dtype) for read in reads])
        by_slot, order = _sorted(slots)
        touched = by_slot.new_empty(min(len(slots), len(table)))
        entries = joined([torch.arange(len(read.slots)).repeat_interleave(read.slots.shape[1]) for read in reads])
        starts = touched.new_empty(len(touched) + 1)
        known[table] = RowGradient(touched, starts, entries[order], weights[order], rows)
    return known[table]


def _sorted(slots: Tensor) -> tuple[Tensor, Tensor]:
    both = (slots << 1) | torch.arange(len(slots))
    return both >> 1, both & 1


class _ExpectedRequests(Requests):
    """Requests as large as they are expected to be where slots fall on all ranks alike."""

    def __init__(self, group: MemoryGroup, slots: Tensor, counts: Sequence[int]) -> None:
        n, k = slots.shape
        self.order, self.held = slots.new_empty(n * k), slots.new_empty(sum(counts))
        self.sent = sizes(n * k, group.size)
        self.received = [sizes(count * k, group.size)[group.rank] for count in counts]
        self.num_bags, self.longest = expected_bags(sum(counts), k, group.size)
        sent = slots.new_empty(n * k, dtype=torch.int32)
        group.exchange(slots.new_empty(n * group.size, dtype=torch.uint8), [n] * group.size, counts)
        self._slots = group.exchange(sent, self.sent, self.received)

    @cached_property
    def bags(self) -> Bags:
        slots = done(self._slots).long()
        filled = slots.new_empty(self.num_bags, max(1, self.longest))
        return Bags(filled, torch.empty_like(slots), slots.new_empty(self.num_bags))


def _gather_bags(group: TokenGroup, read: Read, num_slots: int) -> Read:
    """Those of all copies, each with as many bags as this one."""
    return group.gather_read(read, num_slots, [len(read.slots)] * group.size)


class ResizedStorage(LiveStorage):
    """Counts storages that FSDP2 empties and fills again, too: what each holds is looked at after every op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._look()
        return out

    def _look(self) -> None:
        for key, (reference, size) in list(self._alive.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self._alive[key] = (reference, storage.nbytes())
                self.bytes += storage.nbytes() - size
        self.peak = max(self.peak, self.bytes)
