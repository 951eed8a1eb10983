"""The ledger beyond FLOPs: rows touched, memory, roofline, ranks; and the gate that nothing passes uncounted."""

import gc
import io
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, memforge, write
from made_ranks import on_ranks
from rich.console import Console
from torch import Tensor

from memforge.blocks.base import OpCost, RowReads, Traffic, matmul_cost
from memforge.blocks.ffn.module import Ffn
from memforge.blocks.product_keys.spec import SCORES_AT_A_TIME
from memforge.cost import estimate
from memforge.cost.access import distinct_uniform, distinct_zipf
from memforge.cost.devices import HOPPER, Device, Interconnect
from memforge.cost.ledger import touched
from memforge.cost.links import members, rank_roofline, seconds
from memforge.cost.mesh import per_rank
from memforge.cost.roofline import roofline
from memforge.cost.wire import Group, Op, Total, sent_bytes
from memforge.errors import CheckFailedError, UsageError
from memforge.mesh import Mesh, parse_mesh
from memforge.plan import Plan, TrainPlan, make_plan
from memforge.profile.counter import require_exact
from memforge.profile.measure import measure_step
from memforge.report.cost import kind_table, layer_table, roofline_table, show_tables, si, traffic_table
from memforge.spec import load_spec
from memforge.training.ranks import Ranks
from memforge_kernels.product_key_topk.cpu import CHUNK_SCORES

DEMO = REPO / "specs" / "demo"


def demo(name: str, *overrides: str) -> Plan:
    return make_plan(load_spec(DEMO / f"{name}.toml", overrides=overrides))


@pytest.mark.parametrize("name", ["dense", "memory", "moe"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_of_a_step_is_predicted_within_a_tenth(name: str, checkpointed: bool) -> None:
    plan = demo(name)
    predicted = estimate(plan.model, batch=32).memory
    measured = measure_step(plan, 32, 64, checkpoint_layers=checkpointed)
    if checkpointed:
        assert measured.activations == predicted.activations_checkpointed
        peak = predicted.peak_checkpointed
    else:
        assert measured.activations == predicted.activations
        peak = predicted.peak
    assert measured.peak == pytest.approx(peak, rel=0.1)
    assert measured.peak_tracked == pytest.approx(peak, rel=0.1)
    assert measured.process > measured.peak / 2


def test_the_dense_gradient_of_a_large_pool_makes_the_peak() -> None:
    """Three readers of one pool: the second and third gradient stand beside the sum of those before."""
    plan = demo("memory", "pool.facts.num_sub_keys=300", "train.value_update=dense")
    predicted = estimate(plan.model, batch=2, seq_len=8, dense_values=True).memory
    assert predicted.peak_in.startswith("backward of layer")
    pool = 4 * 300**2 * 128
    assert predicted.peak > 3 * pool + 2 * pool
    assert measure_step(plan, 2, 8).peak == pytest.approx(predicted.peak, rel=0.1)


def test_by_rows_a_pool_takes_nothing_but_weights_and_moments() -> None:
    small, large = (demo("memory", f"pool.facts.num_sub_keys={s}") for s in (100, 400))
    peaks = [estimate(plan.model, batch=2, seq_len=8).memory.peak for plan in (small, large)]
    grown = sum(row.numel for row in large.model.params) - sum(row.numel for row in small.model.params)
    assert 3 * 4 * grown <= peaks[1] - peaks[0] <= 3.1 * 4 * grown
    for plan, peak in zip((small, large), peaks, strict=True):
        assert measure_step(plan, 2, 8).peak == pytest.approx(peak, rel=0.1)


MANY_READS = """
[model]
name = "many-reads"
dim = 128
num_layers = 2
vocab_size = 64
max_seq_len = 256

[attention]
num_heads = 4

[[place]]
layers = "all"
"""


@pytest.mark.parametrize(
    "block",
    [
        'kind = "memory", num_sub_keys = 64, top_k = 64, gate = "sigmoid", value_dim = 64',
        'kind = "memory", num_sub_keys = 300, top_k = 32, gate = "swilu", qk_norm = true',
        'kind = "peer", num_sub_keys = 16, top_k = 16, activation = "relu"',
    ],
)
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_the_peak_of_many_reads_on_few_tokens_is_predicted(block: str, checkpoint_layers: bool, tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", f"{MANY_READS}block = {{ {block}, num_heads = 8, key_dim = 64 }}\n")
    plan = make_plan(load_spec(spec))
    memory = estimate(plan.model, batch=4, seq_len=256).memory
    predicted = memory.peak_checkpointed if checkpoint_layers else memory.peak
    measured = measure_step(plan, 4, 256, checkpoint_layers=checkpoint_layers)
    assert measured.peak == pytest.approx(predicted, rel=0.1)


def test_the_ledger_knows_how_many_scores_the_kernel_holds() -> None:
    assert SCORES_AT_A_TIME == CHUNK_SCORES


def test_ranks_hold_gradients_of_pools_only_where_all_rows_are_updated() -> None:
    plan = demo("memory").model
    by_rows, dense = (
        estimate(plan, mesh=Mesh(memory=2), dense_values=dense).as_dict()["mesh"] for dense in (False, True)
    )
    pools = 4 * by_rows["pool_params_per_rank"]
    assert dense["gradient_bytes_per_rank"] == dense["weight_bytes_per_rank"]
    assert by_rows["gradient_bytes_per_rank"] == dense["gradient_bytes_per_rank"] - pools


def test_a_tied_embedding_has_three_gradients_at_once() -> None:
    plan = demo("dense", "model.tie_embeddings=true", "model.vocab_size=50000")
    predicted = estimate(plan.model, batch=1, seq_len=8).memory
    assert predicted.peak_in == "backward of the embedding"
    assert measure_step(plan, 1, 8).peak == pytest.approx(predicted.peak, rel=0.1)


def test_wide_models_on_few_tokens_are_not_underestimated() -> None:
    plan = demo("memory", "model.dim=512", "ffn.hidden_dim=1408", "place.0.block.key_dim=256")
    predicted, measured = estimate(plan.model, batch=4, seq_len=64).memory, measure_step(plan, 4, 64)
    assert measured.activations == predicted.activations
    assert 0.85 * predicted.peak <= measured.peak <= 1.05 * predicted.peak


def simulated(weights: list[float], reads: list[RowReads], tokens: int, trials: int) -> float:
    r, total = random.Random(0), 0
    for _ in range(trials):
        seen = set()
        for read in reads:
            for _ in range(tokens * read.draws):
                uniform = len(set(weights)) == 1
                rows = (
                    r.sample(range(len(weights)), read.rows)
                    if uniform
                    else r.choices(range(len(weights)), weights, k=read.rows)
                )
                seen.update(rows)
        total += len(seen)
    return total / trials


@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_rows_touched_are_those_of_a_simulation(tokens: int) -> None:
    reads = [RowReads(draws=2, rows=5), RowReads(draws=1, rows=3)]
    uniform = simulated([1.0] * 300, reads, tokens, 200)
    assert distinct_uniform(reads, tokens, 300) == pytest.approx(uniform, rel=0.02, abs=1)
    zipf = simulated([1 / i for i in range(1, 301)], reads, tokens, 200)
    assert distinct_zipf(reads, tokens, 300) == pytest.approx(zipf, rel=0.03, abs=1)


def test_zipf_in_buckets_is_the_sum_over_all_ranks() -> None:
    rows, reads = 200_000, [RowReads(draws=4, rows=32)]
    harmonic = sum(1 / i for i in range(1, rows + 1))
    exact = sum(1 - (1 - 1 / (i * harmonic)) ** (128 * 500) for i in range(1, rows + 1))
    assert distinct_zipf(reads, 500, rows) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("expected", [distinct_uniform, distinct_zipf])
def test_rows_touched_at_the_edges(expected: Callable[..., int]) -> None:
    assert expected([RowReads(draws=1, rows=1)], 5, 1) == 1
    assert expected([RowReads(draws=1, rows=1)], 1, 2**32) == 1
    assert expected([RowReads(draws=1, rows=4)], 10**6, 4) == 4
    assert expected([RowReads(draws=256, rows=1024)], 10**9, 2**32) <= 2**32


def test_a_roofline_is_the_slower_of_computing_and_moving() -> None:
    device = Device("toy", "bfloat16", 1000, 100, 10**6, "")
    # 2*8*4*4 = 256 FLOPs; 16 weights and 64 activations of two bytes.
    moving = matmul_cost("w", 8, 4, 4)
    line = roofline([("ffn", moving)], 10, 5, device)
    assert line.forward == pytest.approx(max(256 / 1000, (16 + 64) * 2 / 100))
    assert line.backward == pytest.approx(max(512 / 1000, (32 + 128) * 2 / 100))
    assert (line.update, line.update_dense) == (pytest.approx(10 / 100), pytest.approx(5 / 100))
    assert line.memory_bound == 1
    computing = OpCost("w", 10**6, 10**6, traffic=Traffic(1, 1, 1, 1, dtype="float32"))
    line = roofline([("a", moving), ("b", computing)], 10, 5, device)
    assert line.by_kind == {"a": pytest.approx(4.8), "b": pytest.approx(2000)}
    assert line.memory_bound == pytest.approx(4.8 / 2004.8)


def test_bytes_of_a_dense_matmul_and_of_a_gather() -> None:
    plan = demo("memory").model
    costs = {row.cost.op: row.cost for row in estimate(plan, batch=1, seq_len=4).rows if row.path == "layers.1.memory"}
    assert costs["w1"].traffic == Traffic(128 * 128, 4 * 256, 2 * 128 * 128, 2 * 4 * 256)
    # 4 tokens x 4 heads x 32 rows of 128, each with a slot of two elements and a weight; every row moves once.
    reads = 4 * 128
    moved = Traffic(reads * 128, 4 * 128 + 3 * reads, 2 * reads * 128, 2 * 4 * 128 + 3 * reads, dtype="float32")
    assert costs["weighted_gather"].traffic == moved
    many = {row.cost.op: row.cost for row in estimate(plan, batch=999).rows if row.path == "layers.1.memory"}
    assert many["weighted_gather"].traffic.weights == 96 * 96 * 128
    moe = {row.cost.op: row.cost for row in estimate(demo("moe").model, seq_len=3).rows if row.path == "layers.1.moe"}
    assert moe["w1"].traffic.weights == 3 * 128 * 320


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
    (measured,) = on_ranks(1, "test_ledger:peaks_of_ranks", str(file), cases)
    for (axes, batch, seq_len, changes), found in zip(cases, measured, strict=True):
        shape = {"batch": batch, "seq_len": seq_len, "pools": "columns"}
        mesh = per_rank(plan, Mesh(*axes), **shape, dense_values="value_update" in changes)
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


def test_an_op_that_nobody_counts_fails_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Ffn.forward

    def with_distances(self: Ffn, x: Tensor, pools: object) -> tuple[Tensor, dict[str, Tensor]]:
        y, losses = forward(self, x, pools)  # type: ignore[arg-type]
        return y + torch.cdist(x, x).mean(), losses

    monkeypatch.setattr(Ffn, "forward", with_distances)
    with pytest.raises(
        CheckFailedError,
        match=r"neither counted nor declared free: .*aten\._euclidean_dist \(first in layers\.0\.ffn\)",
    ):
        require_exact(demo("dense").model)


def test_an_op_of_evaluation_alone_is_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Ffn.forward

    def with_distances(self: Ffn, x: Tensor, pools: object) -> tuple[Tensor, dict[str, Tensor]]:
        y, losses = forward(self, x, pools)  # type: ignore[arg-type]
        return (y if self.training else y + torch.cdist(x, x).mean()), losses

    monkeypatch.setattr(Ffn, "forward", with_distances)
    with pytest.raises(CheckFailedError, match="neither counted nor declared free"):
        require_exact(demo("dense").model)


def test_random_numbers_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is run again for its backward pass must be the same layer."""
    forward = Ffn.forward

    def with_dropout(self: Ffn, x: Tensor, pools: object) -> tuple[Tensor, dict[str, Tensor]]:
        y, losses = forward(self, x, pools)  # type: ignore[arg-type]
        return torch.nn.functional.dropout(y, 0.1, self.training), losses

    monkeypatch.setattr(Ffn, "forward", with_dropout)
    with pytest.raises(CheckFailedError, match=r"dropout|bernoulli|rand"):
        require_exact(demo("dense").model)


def test_element_wise_ops_of_a_block_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Ffn.forward

    def with_tanh(self: Ffn, x: Tensor, pools: object) -> tuple[Tensor, dict[str, Tensor]]:
        y, losses = forward(self, x, pools)  # type: ignore[arg-type]
        return torch.tanh(y).cumsum(-1), losses

    monkeypatch.setattr(Ffn, "forward", with_tanh)
    require_exact(demo("dense").model)


def test_a_step_beyond_the_machine_is_not_measured() -> None:
    done = memforge("profile", REPO / "specs" / "paper" / "memory-plus-1.3b-64m.toml", "--measure")
    assert done.returncode == 3
    assert "takes 1,7" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--device", "H1000"], ["--mesh", "dp=2"], ["--mesh", "memory=9217"]])
def test_unknown_devices_and_meshes_are_refused_with_the_known_ones(arguments: list[str]) -> None:
    done = memforge("profile", DEMO / "memory.toml", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert any(known in done.stderr for known in ("MI300X", "dp_shard", "more than the 128 columns"))


def test_numbers_are_never_cut_on_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    narrow = Console(file=screen, width=40, height=25, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr("memforge.report.cost.console", lambda: narrow)
    plan = make_plan(load_spec(REPO / "specs" / "paper" / "memory-plus-1.3b-64m.toml"))
    cost = estimate(plan.model).as_dict()
    show_tables([kind_table(cost), layer_table(cost), traffic_table(cost), roofline_table(cost)], cost)
    shown = screen.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for number in ("138,747,680,768", "137,438,953,472", "67,108,864"):
        assert number in shown


def test_a_tied_head_is_in_the_table_by_kind() -> None:
    cost = estimate(demo("dense", "model.tie_embeddings=true").model).as_dict()
    table = kind_table(cost)
    assert "head" in list(table.columns[0].cells)
    assert sum(cost["flops_per_token"]["by_kind"].values()) == cost["flops_per_token"]["total"]


def test_an_update_moves_bytes_of_the_type_that_is_stored() -> None:
    """AdamW: weight and gradient in their own type, two fp32 moments."""
    full, half = demo("memory").model, demo("memory", 'pool.facts.dtype="bfloat16"').model
    costs = [estimate(plan).as_dict() for plan in (full, half)]
    values = 96 * 96 * 128
    reads = [cost["bytes_per_batch"]["dense_update"]["read"] for cost in costs]
    written = [cost["bytes_per_batch"]["dense_update"]["written"] for cost in costs]
    assert (reads[0] - reads[1], written[0] - written[1]) == (4 * values, 2 * values)
    assert reads[0] == 16 * sum(row.numel for row in full.params)


def test_experts_that_choose_are_all_read_by_every_batch() -> None:
    chosen = ("place.0.block.num_experts=64", "place.0.block.top_k=2")
    by_tokens = estimate(demo("moe", *chosen).model, batch=1, seq_len=4)
    choosing = ('place.0.block.router="expert_choice"', "place.0.block.load_balance_coef=0.0")
    by_experts = estimate(demo("moe", *chosen, *choosing).model, batch=1, seq_len=4)
    tables = ("layers.1.moe.w1", "layers.1.moe.w2", "layers.1.moe.w3")
    for report, at_most in ((by_tokens, 8), (by_experts, 64)):
        rows = {row.path: row for row in report.params}
        assert {rows[path].active for path in tables} == {2 * 128 * 320}
        for path in tables:
            assert all(at_most - 2 <= rows_read <= at_most for rows_read in touched(rows[path], 4).values())
    # Four tokens of 1,024 rows are all that is not read in whole.
    batch = by_experts.as_dict()["bytes_per_batch"]
    unread = 4 * 128 * (1024 - 4)
    for access in ("uniform", "zipf"):
        assert batch[access]["read"] == pytest.approx(4 * by_experts.axes()["params"] - unread, rel=1e-3)
        assert batch[access]["written"] == pytest.approx(batch["dense_update"]["written"] - 3 * unread, rel=1e-3)


def test_large_numbers_have_a_prefix() -> None:
    shown = [si(2.955 * 10**power, "B") for power in (3, 4, 15, 18, 20, 21, 24, 27)]
    assert shown == [
        "2,955 B", "29.55 kB", "2.955 PB", "2.955 EB", "295.5 EB", "2.955 ZB", "2.955 YB", "2955 YB",
    ]  # fmt: skip
