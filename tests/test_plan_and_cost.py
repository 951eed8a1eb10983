"""The plan and the ledger: exact, complete, torch-free."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import REPO, SMALL, write

from memforge.blocks.base import Site
from memforge.blocks.ffn.spec import FfnSpec
from memforge.blocks.memory.spec import MemorySpec
from memforge.blocks.values.spec import ValuesSpec
from memforge.cost import estimate
from memforge.errors import CheckFailedError, StorageError, UsageError
from memforge.parity import Axis, claimed, report_seq_len, require
from memforge.plan import make_plan, plan_from_json
from memforge.spec import load_spec

TRAIN = SMALL[SMALL.index("[train]") :]


def test_plans_round_trip_and_notice_changes(small: Path) -> None:
    plan = make_plan(load_spec(small))
    text = plan.to_json()
    assert plan_from_json(text, "plan.json") == plan
    with pytest.raises(StorageError, match="changed after it was written"):
        plan_from_json(text.replace('"hidden_dim": 24', '"hidden_dim": 25'), "plan.json")
    with pytest.raises(StorageError, match="not valid JSON"):
        plan_from_json(text[: len(text) // 2], "plan.json")


def test_the_plan_of_the_small_model(small: Path, golden: Callable[[str, str], None]) -> None:
    plan = make_plan(load_spec(small)).model
    rows = [f"{r.path} {list(r.shape)} {r.dtype} {r.group} decay={r.decay} {r.init.kind}({r.init.scale:.6g}) "
            f"read by {', '.join(r.readers)}" for r in plan.params]  # fmt: skip
    golden("plan-small.txt", "\n".join(rows) + "\n")


def test_a_shared_pool_is_counted_once(small: Path) -> None:
    cost = estimate(make_plan(load_spec(small)).model).as_dict()
    (pool,) = cost["pools"]
    assert pool == {
        "path": "pool.facts",
        "params": 64 * 32,
        "active_params": min(2 * 2 * 4, 64) * 32,
        "bytes_read": min(2 * 2 * 4, 64) * 32 * 4,
        "kind": "memory",
        "rows": 64,
        "rows_per_token": 2 * 2 * 4,
        "rows_touched": {"uniform": 64, "zipf": 64},
        "layers": [0, 2],
        "readers": ["layers.0.memory", "layers.2.memory"],
    }
    inside = sum(layer["params"] for layer in cost["layers"])
    outside = {kind: cost["params"]["by_kind"][kind] for kind in ("embedding", "head")}
    assert cost["params"]["total"] == inside + pool["params"] + sum(outside.values()) + 32


@pytest.mark.parametrize("path", sorted((REPO / "specs").rglob("*.toml")), ids=lambda p: p.stem)
def test_parts_sum_to_totals(path: Path) -> None:
    cost = estimate(make_plan(load_spec(path, spec_root=REPO / "specs")).model, batch=3, seq_len=17).as_dict()
    params, flops = cost["params"], cost["flops_per_token"]
    assert sum(params["by_kind"].values()) == params["total"]
    assert sum(params["active_by_kind"].values()) == params["active"]
    # Per token is a rendering: capacities round up, so that it need not be an integer.
    total = pytest.approx(flops["total"], rel=1e-14)
    assert sum(flops["by_kind"].values()) == total
    assert flops["forward"] + flops["backward"] == total
    memory = cost["memory"]
    for what in ("weights", "gradients", "optimizer", "activations"):
        assert sum(kind[what] for kind in memory["by_kind"].values()) == memory[what]
    assert sum(cost["bytes_per_token"]["read_by_kind"].values()) == cost["bytes_per_token"]["read"]
    layers = sum(layer["flops_per_token"]["total"] for layer in cost["layers"])
    assert layers + flops["by_kind"]["head"] == total
    for layer in cost["layers"]:
        for block in layer["blocks"]:
            ops = sum(op["total"] for op in block["ops"].values())
            assert ops == pytest.approx(block["flops_per_token"]["total"], rel=1e-14)


@pytest.mark.parametrize(
    ("dim", "hidden", "sub_keys", "layer_mflop", "ffn_mflop"),
    [
        # Forward matmul MFLOP per token of one Memory+ layer (4 heads, k 32, key_dim dim/2) and of the FFN it
        # replaces: derived by hand from arXiv 2412.09764.
        (1024, 2816, 1024, 12.85, 17.3),
        (2048, 5632, 1024, 42.5, 69.2),
        (2048, 5632, 4096, 67.6, 69.2),
        (2048, 5632, 8192, 101.2, 69.2),
    ],
)
def test_flops_of_the_papers_layers(dim: int, hidden: int, sub_keys: int, layer_mflop: float, ffn_mflop: float) -> None:
    site = Site(dim, 24, 4096, {"facts": ValuesSpec(num_sub_keys=sub_keys)})
    memory = MemorySpec(pool="facts", num_heads=4, top_k=32, key_dim=dim // 2, gate="swilu").plan(
        site, "layers.0.memory"
    )
    ffn = FfnSpec(hidden_dim=hidden).plan(site, "layers.0.ffn")
    forward = [sum(c.forward for c in block.costs(1, 1)) / 1e6 for block in (memory, ffn)]
    assert forward == pytest.approx([layer_mflop, ffn_mflop], abs=0.05)


def test_sizes_no_machine_could_hold_are_exact_integers(tmp_path: Path) -> None:
    text = SMALL.replace("dim = 32", "dim = 4096").replace("num_sub_keys = 8", "num_sub_keys = 65536")
    cost = estimate(make_plan(load_spec(write(tmp_path / "big.toml", text))).model).as_dict()
    assert cost["pools"][0]["params"] == 2**32 * 4096


def test_sequence_lengths_outside_the_model_are_refused(small: Path) -> None:
    plan = make_plan(load_spec(small)).model
    for seq_len in (0, 97):
        with pytest.raises(UsageError, match="1 to 96"):
            estimate(plan, seq_len=seq_len)


def test_attention_is_counted_at_half_and_executed_in_full(small: Path) -> None:
    plan = make_plan(load_spec(small)).model
    per_layer = {t: next(r.cost for r in estimate(plan, seq_len=t).rows if r.cost.op == "attention") for t in (16, 48)}
    for t, cost in per_layer.items():
        assert cost.counted == (2 * t * t * 32, 4 * t * t * 32)
        assert (cost.forward, cost.backward) == (4 * t * t * 32, 8 * t * t * 32)


def test_both_models_are_compared_at_the_same_length(tmp_path: Path) -> None:
    write(tmp_path / "short.toml", SMALL.replace('name = "small"', 'name = "short"'))
    long = SMALL.replace("max_seq_len = 96", "max_seq_len = 192") + '\n[parity]\nagainst = "short.toml"\n'
    plan = make_plan(load_spec(write(tmp_path / "long.toml", long)))
    parity = claimed(plan)
    assert parity is not None
    assert (parity.seq_len, parity.ok) == (48, True)  # train.seq_len
    with pytest.raises(UsageError, match="short takes at most 96 tokens"):
        claimed(plan, 192)
    untrained = make_plan(load_spec(write(tmp_path / "long.toml", long.replace(TRAIN, ""))))
    assert [report_seq_len(p) for p in (plan, untrained)] == [48, 96]
    assert report_seq_len(untrained, baseline=untrained.model) == 192
    assert report_seq_len(untrained, 7) == 7


def test_tolerances_are_compared_as_they_are_written() -> None:
    # 210 / 200 - 1 is a little more than 0.05 in floats, and floats beyond 2**53 are even.
    assert Axis("params", 210, 200, 0.05).ok
    assert not Axis("params", 211, 200, 0.05).ok
    large = 18_016_666_408_058_944
    assert Axis("params", large, large, 0.0).ok
    assert not Axis("params", large + 2, large, 0.0).ok
    assert Axis("flops", Fraction(1, 3), Fraction(1, 3), 1e-300).ok
    assert Axis("flops", Fraction(10), Fraction(9), None).ok is None


def test_flops_per_token_are_compared_unrounded(tmp_path: Path) -> None:
    limited = SMALL.replace("top_k = 2, hidden_dim = 24", "hidden_dim = 24, capacity_factor = 0.7")
    report = estimate(make_plan(load_spec(write(tmp_path / "moe.toml", limited))).model, seq_len=37)
    exact = report.exact_axes()["flops"]
    assert exact.denominator > 1
    assert exact * report.tokens == sum(report.flops())
    assert report.axes()["flops"] == float(exact)


def test_a_parity_claim_names_axis_numbers_and_tolerance(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL.replace('name = "small"', 'name = "dense"'))
    wide = SMALL.replace("hidden_dim = 48", "hidden_dim = 200") + '\n[parity]\nagainst = "dense.toml"\n'
    plan = make_plan(load_spec(write(tmp_path / "wide.toml", wide)))
    parity = claimed(plan)
    assert parity is not None
    assert [a.ok for a in parity.axes] == [None, None, False, None]
    with pytest.raises(CheckFailedError, match=r"small against dense: flops [\d,]+ is 1\.\d+ times [\d,]+, outside 1"):
        require(parity)
    same = plan.parity.model_copy(update={"baseline": plan.model}) if plan.parity else None
    require(claimed(plan.model_copy(update={"parity": same})))
