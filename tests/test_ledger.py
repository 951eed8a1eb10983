"""The ledger beyond FLOPs: rows touched, memory, roofline; and the gate that nothing passes uncounted."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, memforge, write
from rich.console import Console
from torch import Tensor

from memforge.blocks.base import OpCost, RowReads, Traffic, matmul_cost
from memforge.blocks.ffn.module import Ffn
from memforge.blocks.product_keys.spec import SCORES_AT_A_TIME
from memforge.cost import estimate
from memforge.cost.access import distinct_uniform, distinct_zipf
from memforge.cost.devices import Device
from memforge.cost.ledger import touched
from memforge.cost.roofline import roofline
from memforge.errors import CheckFailedError
from memforge.plan import Plan, make_plan
from memforge.profile.counter import require_exact
from memforge.profile.measure import measure_step
from memforge.report.cost import kind_table, layer_table, roofline_table, show_tables, si, traffic_table
from memforge.spec import load_spec
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
    predicted = estimate(plan.model, batch=2, seq_len=8, update=plan.run.pool_update).memory
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
