"""What a rank of a mesh holds and sends: shares of parameters, the peak of a step, links and ports."""

import gc
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import REPO, memforge, write
from made_ranks import on_ranks
from test_ledger import demo
from torch import Tensor

from memforge.cost import estimate
from memforge.cost.devices import HOPPER, Device, Interconnect
from memforge.cost.links import members, rank_roofline, seconds
from memforge.cost.mesh import per_rank
from memforge.cost.wire import Group, Op, Total, ranks_of, sent_bytes
from memforge.errors import UsageError
from memforge.mesh import Mesh, parse_mesh
from memforge.plan import LAZY, PoolUpdate, TrainPlan, make_plan
from memforge.report.cost import si
from memforge.spec import load_spec
from memforge.training.ranks import Ranks

DEMO = REPO / "specs" / "demo"


def test_ranks_hold_gradients_of_pools_only_where_all_rows_are_updated() -> None:
    plan = demo("memory").model
    by_rows, dense = (
        estimate(plan, mesh=Mesh(memory=2), update=update).as_dict()["mesh"]
        for update in (LAZY, PoolUpdate(rule="dense"))
    )
    pools = 4 * by_rows["pool_params_per_rank"]
    assert dense["gradient_bytes_per_rank"] == dense["weight_bytes_per_rank"]
    assert by_rows["gradient_bytes_per_rank"] == dense["gradient_bytes_per_rank"] - pools


def test_ranks_hold_rows_of_the_dense_part_and_columns_of_pools() -> None:
    plan = demo("memory").model
    whole = per_rank(plan, Mesh())
    assert whole["params_per_rank"] == sum(row.numel for row in plan.params)
    assert whole["optimizer_bytes_per_rank"] == 8 * whole["params_per_rank"]
    split = per_rank(plan, Mesh(dp_replicate=3, dp_shard=2, memory=4))
    assert split["ranks"] == 24
    assert split["pool_params_per_rank"] == 96 * 96 * 128 // 4
    dense = [row for row in plan.params if row.group == "dense"]
    # Along the first dimension that 8 divides, which all have: 4 heads and 2 halves have 96 sub-keys.
    assert {any(n % 8 == 0 for n in row.shape) for row in dense} == {True}
    assert split["dense_params_per_rank"] == sum(row.numel for row in dense) // 8
    uneven = per_rank(plan, Mesh(dp_shard=7))
    assert uneven["dense_params_per_rank"] == sum(-(-row.shape[0] // 7) * (row.numel // row.shape[0]) for row in dense)
    by_columns, by_rows = (per_rank(plan, Mesh(memory=5), pools=way) for way in ("columns", "rows"))
    assert by_columns["pool_params_per_rank"] == 96 * 96 * 26
    assert by_rows["pool_params_per_rank"] == 1844 * 128
    with pytest.raises(UsageError, match=r"memory=129 is more than the 128 columns of pool\.facts\.values"):
        per_rank(plan, Mesh(memory=129), pools="columns")
    with pytest.raises(UsageError, match=r"memory=9217 is more than the 128 columns and the 9,216 rows of pool\.facts"):
        per_rank(plan, Mesh(memory=9217))


MANY = """
[model]
name = "many"
dim = 192
num_layers = 6
vocab_size = 600
max_seq_len = 256

[attention]
num_heads = 4

[ffn]
hidden_dim = 512
activation = "swiglu"

[pool.facts]
num_sub_keys = 64

[[place]]
layers = [1, 4]
block = { kind = "memory", pool = "facts", num_heads = 2, top_k = 4, key_dim = 32, gate = "swilu", qk_norm = true }

[[place]]
layers = [3]
block = { kind = "peer", num_sub_keys = 60, num_heads = 2, top_k = 8, key_dim = 32 }
"""


def most_allocated(begin: Callable[[], Callable[[], None]]) -> int:
    """The most that torch's CPU allocator has given out at once in the second step of what begins."""
    with torch.profiler.profile(profile_memory=True) as trace:
        step = begin()
        step()
        mark = torch.zeros(12_345, dtype=torch.int8)
        step()
        del mark
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(list(accumulate(sizes))[sizes.index(12_345) :]) - 12_345


def peaks_of_ranks(file: str, cases: list[tuple[list[int], int, int, dict[str, Any]]]) -> list[int]:
    """Of the last rank of each mesh. The others are not there: their part in a collective is what this one has."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from memforge.profile.measure import RATES
    from memforge.training.distributed import ProcessRanks
    from memforge.training.optimizer import Stepper
    from memforge.training.schedule import PEAK

    plan, found = make_plan(load_spec(Path(file))).model, []
    for axes, batch, seq_len, changes in cases:
        mesh = Mesh(*axes)
        dist.init_process_group("fake", store=FakeStore(), rank=mesh.ranks - 1, world_size=mesh.ranks)
        ranks = ProcessRanks(mesh, "cpu", pools="columns")
        sizes = {"batch_size": batch * mesh.ranks, "micro_batch_size": batch, "seq_len": seq_len}
        run = TrainPlan(**RATES | sizes | changes)
        window = torch.randint(plan.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))

        def begin(ranks: Ranks = ranks, run: TrainPlan = run, window: Tensor = window) -> Callable[[], None]:
            stepper = Stepper(ranks.build(plan, seed=1).train(), plan, run, ranks=ranks)
            return lambda: stepper.update(stepper.backward(window).norm, PEAK)

        with ThreadPoolExecutor(1) as fresh:  # the room that kernels keep for each thread is not there yet and counts
            found.append(fresh.submit(most_allocated, begin).result())
        dist.destroy_process_group()
        del begin, ranks
        gc.collect()  # what is given back later would count as less
    return found


def test_the_peak_of_a_rank_is_predicted_within_a_twentieth(tmp_path: Path) -> None:
    again = {"activation_checkpointing": True}
    cases = [
        ((1, 8, 8), 2, 256, {}),
        ((1, 2, 4), 2, 256, again),
        ((2, 4, 1), 1, 128, {"value_update": "dense"}),
        ((1, 1, 4), 3, 128, {}),
        ((4, 1, 1), 1, 16, again),
    ]
    file = write(tmp_path / "many.toml", MANY)
    plan = make_plan(load_spec(file)).model
    (measured,) = on_ranks(1, "test_rank_ledger:peaks_of_ranks", str(file), cases)
    for (axes, batch, seq_len, changes), found in zip(cases, measured, strict=True):
        shape = {"batch": batch, "seq_len": seq_len, "pools": "columns"}
        mesh = per_rank(plan, Mesh(*axes), **shape, update=PoolUpdate(rule=changes.get("value_update", "lazy")))
        key = "peak_bytes_checkpointed_per_rank" if changes == again else "peak_bytes_per_rank"
        assert mesh[key] == pytest.approx(found, rel=0.05), (axes, changes, mesh["peak_in"], mesh[key] / found)


def test_one_rank_holds_what_a_step_holds_and_sends_nothing() -> None:
    plan = demo("memory").model
    report = estimate(plan, batch=3, mesh=Mesh())
    assert report.mesh is not None
    assert report.mesh["peak_bytes_per_rank"] == report.memory.peak
    assert report.mesh["wire"] == {"rows": [], "sent_bytes": 0, "sent_bytes_checkpointed": 0}
    for line, alone in zip(report.mesh["roofline"], report.roofline, strict=True):
        assert line["seconds"]["in_turn"] == line["seconds"]["overlapped"]
        assert line["seconds"]["in_turn"] == pytest.approx(alone.total)


TOY = Interconnect(link=70, peer=10, per_machine=8, network=5, source="")


def total(op: Op, group: Group, size: int, sent: int) -> Total:
    return Total("", op, group, size, 1, 0, sent, False)


def test_a_collective_goes_over_links_and_over_ports_between_machines() -> None:
    mesh = Mesh(1, 8, 8)
    # Eight ranks of a machine have all seven links of each, two have one of them.
    assert seconds(total("all_to_all", "memory", 8, 700), mesh, TOY) == (10, 0)
    assert seconds(total("all_to_all", "memory", 2, 700), Mesh(1, 8, 2), TOY) == (70, 0)
    # Of 64 ranks each has 56 in other machines; what enters a machine does so once, through eight ports.
    assert seconds(total("all_gather", "shards", 64, 630), mesh, TOY) == ((630 - 70) / 70, 70 / 5)
    # Copies are in eight machines, one in each.
    assert seconds(total("all_gather", "copies", 8, 700), mesh, TOY) == (0, 140)
    # An exchange between 16 ranks: 8 of the 15 others are elsewhere.
    assert seconds(total("all_to_all", "memory", 16, 150), Mesh(1, 1, 16), TOY) == (1, 16)
    assert seconds(total("all_to_all", "memory", 16, 150), Mesh(1, 1, 16), replace(TOY, network=None)) == (1, None)


def test_groups_lie_in_machines_as_ranks_are_counted() -> None:
    assert [members(group, Mesh(2, 4, 8), 8) for group in ("memory", "shards", "dp_replicate", "copies")] == [
        8,
        8,
        1,
        1,
    ]
    assert members("copies", Mesh(1, 8, 2), 8) == 4
    # Ranks 6, 7 and 8 are a group, the last of them in the next machine.
    assert members("memory", Mesh(1, 3, 3), 8) == 1
    assert members("memory", Mesh(1, 2, 3), 8) == 3
    assert members("world", Mesh(1, 3, 3), 8) == 1
    # Ranks 0 and 6 are in one machine, 2 and 8 are not.
    assert members("dp_replicate", Mesh(2, 6, 1), 8) == 1
    assert members("copies", Mesh(1, 3, 3), 8) == 1
    assert members("copies", Mesh(1, 2, 6), 8) == 1


def test_no_group_has_fewer_ranks_in_a_machine_than_is_counted() -> None:
    for axes in product((1, 2, 3, 5), (1, 4, 6), (1, 3, 8)):
        mesh = Mesh(*axes)
        for group in get_args(Group):
            of_all = [Counter(each // 8 for each in ranks_of(group, mesh, rank)) for rank in range(mesh.ranks)]
            assert members(group, mesh, 8) == min(min(found.values()) for found in of_all), (mesh, group)


def test_two_machines_need_at_least_what_is_told_of_them() -> None:
    """nccl-tests on two machines of eight H100, ports of 200 Gb/s: a sum of 8 GiB took 47.5 ms, one of 64 MiB 1.26."""
    mesh, ports = Mesh(16, 1, 1), replace(HOPPER, network=25 * 10**9)
    for size, measured in ((2**33, 0.0475), (2**26, 0.00126)):
        row = total("all_reduce", "dp_replicate", 16, sent_bytes("all_reduce", 16, size))
        _, least = seconds(row, mesh, ports)
        assert least is not None
        assert 0.2 * measured < least < measured


def test_a_step_takes_between_all_at_once_and_one_after_the_other() -> None:
    device, rows = Device("toy", "bfloat16", 1, 1, 1, "", TOY), [total("all_gather", "copies", 8, 700)]
    rows.append(total("all_to_all", "memory", 8, 1400))
    line = rank_roofline((100.0, 30.0, 5.0), rows, Mesh(1, 8, 8), device)
    assert (line.link, line.network, line.wire) == (20, 140, 160)
    assert (line.overlapped, line.in_turn) == (140, 295)
    unknown = rank_roofline((1.0, 1.0, 1.0), rows, Mesh(1, 8, 8), replace(device, interconnect=None))
    assert (unknown.overlapped, unknown.in_turn) == (None, None)


def test_a_profile_of_a_mesh_shows_what_is_sent(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    asked = ("profile", DEMO / "memory.toml", "--mesh", "dp_shard=2,memory=4", "--batch", 2, "--device", "MI300X")
    shown = memforge(*asked, "--html", page)
    assert shown.returncode == 0, shown.stderr
    record = json.loads(memforge(*asked, "--json").stdout)["mesh"]
    sent = record["wire"]["sent_bytes"]
    assert sent == sum(row["sent_bytes"] for row in record["wire"]["rows"]) > 0
    for text in (shown.stdout, page.read_text(encoding="utf-8")):
        assert si(sent, "B") in text
        assert "none overlapped" in text
        assert record["peak_in"] in text
    assert "exchange; equal to the collectives recorded in training" in shown.stdout


@pytest.mark.parametrize(
    "text",
    ["", "8", "dp=8", "memory", "memory=0", "memory=x", "memory=2,memory=2", "memory=1048577", "dp_shard=2;memory=2"],
)
def test_meshes_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--mesh"):
        parse_mesh(text)
    assert parse_mesh(" dp_shard = 2 , memory=4") == Mesh(dp_shard=2, memory=4)
