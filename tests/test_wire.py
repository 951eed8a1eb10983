"""Bytes on the wire: those predicted are those recorded, collective by collective, on every mesh of at most four."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from conftest import write
from made_ranks import on_ranks
from test_blocks_contract import each_example, plan_with
from test_ranks import MESHES, SPEC

from memforge.blocks.base import Kind
from memforge.cost.wire import StepOnWire, ranks_of, sent_bytes
from memforge.mesh import Mesh, shares
from memforge.plan import ModelPlan, Plan, TrainPlan, make_plan, read_plan
from memforge.profile.measure import RATES
from memforge.spec import load_spec
from memforge.training.optimizer import Stepper
from memforge.training.schedule import PEAK
from memforge.training.tables import read_sites
from memforge_kernels.shared_out import gloo

if TYPE_CHECKING:
    from memforge.training.distributed import ProcessRanks

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
# Layer 1 reads its pool last, and keeps nothing of what it reads: run again, it does not read to the end.
BARE = ("place.1.block.gate=none",)
# The same with a block after it, which does.
ADDED = '[[place]]\nlayers = [1]\nmode = "add"\nblock = { kind = "moe", num_experts = 3, top_k = 2, hidden_dim = 11 }\n'
AGAIN = "train.activation_checkpointing=true"
VARIANTS: dict[str, tuple[str, ...]] = {
    "tied, passes of one": ("model.tie_embeddings=true", "train.micro_batch_size=1"),
    "again": (AGAIN, "train.micro_batch_size=2"),
    "again, bare, dense": (AGAIN, *BARE, "train.value_update=dense", "train.micro_batch_size=2"),
    "again, bare, added": (AGAIN, *BARE),
    "again, bare, dropout, float64": (AGAIN, *BARE, "train.dropout=0.1"),
    "by rows": (AGAIN, *BARE, "train.micro_batch_size=2", "parallel.pools=rows"),
}


def planned(path: Path, variant: str) -> Plan:
    text = SPEC.replace("[data]", f"{ADDED}\n[data]") if "added" in variant else SPEC
    return make_plan(load_spec(write(path / "wire.toml", text), overrides=VARIANTS[variant]))


def step_of(plan: Plan, mesh: Mesh, rank: int, element: int) -> StepOnWire:
    run = plan.run.train
    assert run is not None
    return StepOnWire(
        plan.model,
        mesh,
        rank,
        shares(run.batch_size, mesh, run.micro_batch_size),
        run.seq_len,
        pools=plan.run.parallel.pools,
        update=plan.run.pool_update,
        checkpoint_layers=run.activation_checkpointing,
        dropout=run.dropout > 0,
        element=element,
    )


def recorded_step(ranks: "ProcessRanks", plan: ModelPlan, run: TrainPlan, dtype: torch.dtype) -> list[Any]:
    """The collectives of this rank in one step."""
    from memforge.profile.wire import RecordedCollectives

    model = ranks.build(plan, seed=3).to(dtype).train()
    ranks.connect(model, plan)
    stepper = Stepper(model, plan, run, ranks=ranks)
    parts = [sum(passes) for passes in ranks.split(run.batch_size, run.micro_batch_size)]
    first = sum(parts[: ranks.rank])
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(plan.vocab_size, (run.batch_size, run.seq_len + 1), generator=generator)
    with RecordedCollectives() as record:
        stepper.update(stepper.backward(window[first : first + parts[ranks.rank]]).norm, PEAK)
    return record.calls


def recorded(plans: dict[str, str], meshes: list[list[int]]) -> list[list[Any]]:
    """The collectives of this rank in a step of each plan, given by its file, on each mesh."""
    from memforge.training.distributed import ProcessRanks

    dist.init_process_group(gloo())
    found = []
    for axes in meshes:
        ranks = ProcessRanks(Mesh(*axes), "cpu")
        for variant, file in plans.items():
            plan = read_plan(Path(file))
            run = plan.run.train
            assert run is not None
            ranks.pools = plan.run.parallel.pools
            dtype = torch.float64 if "float64" in variant else torch.float32
            found.append([axes, variant, recorded_step(ranks, plan.model, run, dtype)])
    dist.destroy_process_group()
    return found


@contextmanager
def among_fake_ranks(mesh: Mesh, rank: int) -> Iterator["ProcessRanks"]:
    """A rank whose collectives return at once, as if all ranks had what it has."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from memforge.training.distributed import ProcessRanks

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.ranks)
    try:
        yield ProcessRanks(mesh, "cpu", pools="columns")
    finally:
        dist.destroy_process_group()


Call = tuple[str, tuple[int, ...], int, int]


def compared(step: StepOnWire, calls: list[Any]) -> tuple[int, int]:
    """Payloads of what is predicted as a mean and of what was recorded in its place; all else is equal."""
    predicted = list(step.collectives())

    def counted(*, expected: bool) -> Counter[Call]:
        rows = (row for row in predicted if row.expected == expected)
        return Counter(
            (row.op, tuple(ranks_of(row.group, step.mesh, step.rank)), row.payload, row.sent) for row in rows
        )

    made = Counter((op, tuple(ranks), payload, sent) for op, ranks, payload, sent in calls)
    exact, mean = counted(expected=False), counted(expected=True)
    rest = made - exact
    assert made >= exact, (step.mesh, step.rank, exact - made, rest)
    assert sorted(call[:2] for call in rest.elements()) == sorted(call[:2] for call in mean.elements())
    return sum(call[2] for call in mean.elements()), sum(call[2] for call in rest.elements())


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_collectives_are_those_predicted(tmp_path: Path, world: int) -> None:
    plans = {variant: planned(tmp_path, variant) for variant in VARIANTS}
    axes = [[mesh.dp_replicate, mesh.dp_shard, mesh.memory] for mesh in MESHES[world]]
    files = {variant: str(write(tmp_path / f"{variant}.json", plan.to_json())) for variant, plan in plans.items()}
    means: Counter[str] = Counter()
    for rank, of_rank in enumerate(on_ranks(world, "test_wire:recorded", files, axes)):
        assert len(of_rank) == len(axes) * len(plans)
        for given, variant, calls in of_rank:
            step = step_of(plans[variant], Mesh(*given), rank, 8 if "float64" in variant else 4)
            mean, recorded_mean = compared(step, calls)
            assert bool(mean) == (variant == "by rows" and step.mesh.memory > 1)
            means += Counter({f"predicted {step.mesh}": mean, f"recorded {step.mesh}": recorded_mean})
    # Which slots a token reads decides where they are sent by rows; new keys spread them about evenly.
    for mesh in MESHES[world]:
        assert means[f"recorded {mesh}"] == pytest.approx(means[f"predicted {mesh}"], rel=0.1)


def compared_on_fake_ranks(plan: ModelPlan, mesh: Mesh, rank: int, run: TrainPlan) -> None:
    with among_fake_ranks(mesh, rank) as ranks:
        calls = recorded_step(ranks, plan, run, torch.float32)
    step = StepOnWire(
        plan,
        mesh,
        rank,
        shares(run.batch_size, mesh, run.micro_batch_size),
        run.seq_len,
        pools="columns",
        checkpoint_layers=run.activation_checkpointing,
    )
    assert compared(step, calls) == (0, 0)


def run_of(ranks: int, seq_len: int, **changes: Any) -> TrainPlan:
    """One sequence less than two for each rank."""
    return TrainPlan(**RATES | {"batch_size": 2 * ranks - 1, "micro_batch_size": 2, "seq_len": seq_len} | changes)


@pytest.mark.parametrize(("mesh", "rank"), [(Mesh(1, 8, 8), 0), (Mesh(2, 8, 4), 61), (Mesh(5, 3, 7), 52)])
def test_many_ranks_send_what_is_predicted(tmp_path: Path, mesh: Mesh, rank: int) -> None:
    plan = planned(tmp_path, "again, bare, added")
    compared_on_fake_ranks(plan.model, mesh, rank, run_of(mesh.ranks, 12))


@each_example
def test_every_kind_tells_what_it_sends(kind: Kind, i: int) -> None:
    plan, mesh = plan_with(kind, i), Mesh(1, 2, 2)
    for again in (False, True):
        compared_on_fake_ranks(plan, mesh, 3, run_of(4, 16, activation_checkpointing=again))
    # And what it reads: what a weighted_gather returns has the width of the table, a gather_dot a number for each slot.
    shapes = {row.path: row.shape for row in plan.params}
    told = [
        (table := f"{block.pool_path()}.{read.table}", shapes[table][1] if read.op == "weighted_gather" else read.rows)
        for layer in plan.layers
        for block in layer.blocks
        for read in block.table_reads()
    ]
    assert [(site.table, site.shape[1]) for layer in read_sites(plan, 1, 5) for site in layer] == told


def test_bytes_sent_are_those_of_rings_and_exchanges() -> None:
    assert [sent_bytes(op, 4, 100) for op in ("all_gather", "reduce_scatter", "all_to_all")] == [300, 75, 75]
    assert sent_bytes("all_reduce", 4, 100) == 150
    assert sent_bytes("all_reduce", 7, 24) == 42  # 41 1/7
    assert sent_bytes("all_to_all", 4, 100, own=1) == 99
    assert [sent_bytes(op, 1, 100) for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")] == [0] * 4


def test_a_collective_that_nobody_counts_is_no_silence() -> None:
    from memforge.profile.wire import RecordedCollectives

    with among_fake_ranks(Mesh(1, 2, 1), 0), RecordedCollectives() as record:
        dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))
        dist.broadcast(torch.zeros(5, dtype=torch.float64), 0)
        dist.all_to_all_single(torch.zeros(4, 2), torch.zeros(4, 2), [1, 3], [1, 3])
        dist.barrier()
        with pytest.raises(NotImplementedError, match="gather_"):
            dist.gather(torch.zeros(3), [torch.zeros(3), torch.zeros(3)])
    expected = [("all_gather", 12, 12), ("broadcast", 40, 40), ("all_to_all", 32, 24)]
    assert [(call.op, call.payload, call.sent) for call in record.calls] == expected
    assert {call.ranks for call in record.calls} == {(0, 1)}
