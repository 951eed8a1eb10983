"""memforge match: the solver against brute force, and the command as its user meets it."""

import json
import shlex
from itertools import product
from pathlib import Path

import pytest
from conftest import memforge, write

from memforge.cost import estimate
from memforge.errors import CheckFailedError, SpecError, UsageError
from memforge.match import Match, parse_free, require_match, solve
from memforge.plan import make_model_plan, make_plan
from memforge.spec import Spec, load_baseline, load_spec, with_values

PAPER = Path(__file__).parents[1] / "specs" / "paper"
DENSE = """
[model]
name = "dense"
dim = 32
num_layers = 3
vocab_size = 64
max_seq_len = 32
[attention]
num_heads = 4
[ffn]
hidden_dim = 96
"""
MEMORY = (
    DENSE.replace('"dense"', '"memory"')
    + """
[pool.facts]
num_sub_keys = 12
[[place]]
layers = "middle"
block = { kind = "memory", pool = "facts", num_heads = 2, top_k = 4, key_dim = 16, gate = "swilu" }
"""
)
MOE = (
    DENSE.replace('"dense"', '"moe"')
    + """
[[place]]
layers = "all"
block = { kind = "moe", num_experts = 4, top_k = 2, hidden_dim = 64, capacity_factor = 1.3 }
"""
)


def specs(folder: Path, text: str) -> tuple[Spec, Spec]:
    baseline = load_baseline(write(folder / "dense.toml", DENSE))
    return load_spec(write(folder / "a.toml", text)), baseline


def matched(spec: Spec, baseline: Spec, free: list[str], tolerances: dict[str, float], seq_len: int = 32) -> Match:
    keys = [parse_free(spec, text) for text in free]
    return solve(spec, "baseline", make_plan(baseline).model, keys, tolerances, seq_len)


@pytest.mark.parametrize(
    ("text", "free", "axes"),
    [
        (MEMORY, ["ffn.hidden_dim=1..300"], ["flops"]),
        (MEMORY, ["pool.facts.num_sub_keys=4..60"], ["params"]),
        (MEMORY, ["ffn.hidden_dim=20..120", "values.num_sub_keys=2..30"], ["flops", "params"]),
        (MEMORY, ["memory.key_dim=2..40", "ffn.hidden_dim=60..110"], ["flops", "active_params"]),
        (MEMORY, ["memory.top_k=1..9", "memory.key_dim=2..9", "ffn.hidden_dim=84..104"], ["flops", "params", "bytes"]),
        (MOE, ["moe.num_experts=1..16", "moe.hidden_dim=8..96"], ["flops", "params"]),
        (MOE, ["moe.top_k=1..6", "moe.hidden_dim=8..96"], ["flops"]),
        (DENSE, ["model.dim=4..64", "model.num_layers=1..6"], ["params"]),
    ],
)
def test_nothing_in_the_range_is_nearer_than_what_is_found(
    tmp_path: Path, text: str, free: list[str], axes: list[str]
) -> None:
    """The baseline's own shape is no solution here: its capacity, heads and pools differ."""
    spec, baseline = specs(tmp_path, text)
    found = matched(spec, baseline, free, dict.fromkeys(axes, 0.005))
    target, nearest = estimate(make_model_plan(baseline), seq_len=32).exact_axes(), float("inf")
    for values in product(*(range(f.first, f.high + 1) for f in found.free)):
        keys = zip(found.free, values, strict=True)
        try:
            changed = with_values(spec, {place: value for f, value in keys for place in f.key.places})
        except SpecError:
            continue
        here = estimate(make_model_plan(changed), seq_len=32, devices=()).exact_axes()
        nearest = min(nearest, max(abs(float(here[axis] / target[axis]) - 1) for axis in axes))
    assert max(abs(a.ratio - 1) for a in found.best.axes if a.name in axes) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("size", ["373m", "1.3b"])
@pytest.mark.parametrize("sub_keys", [1024, 2048, 4096, 8192])
def test_memory_of_any_size_is_matched_to_dense_within_half_a_percent(size: str, sub_keys: int) -> None:
    spec = load_spec(PAPER / f"memory-plus-{size}.toml", overrides=[f"pool.facts.num_sub_keys={sub_keys}"])
    baseline = load_baseline(PAPER / f"dense-{size}.toml")
    best = matched(spec, baseline, ["ffn.hidden_dim"], {"flops": 0.005}, 4096).best
    assert best.ok
    assert all(abs(axis.ratio - 1) <= 0.005 for axis in best.axes if axis.name == "flops")


def test_a_mixture_is_matched_to_memory_on_parameters_and_flops() -> None:
    """With experts of full size the nearest is the paper's own four, 5% more parameters; narrower ones match."""
    spec, memory = load_spec(PAPER / "moe-1.3b.toml"), load_baseline(PAPER / "memory-plus-1.3b.toml")
    axes = {"flops": 0.01, "params": 0.01}
    experts = matched(spec, memory, ["moe.num_experts"], axes, 4096)
    assert (experts.best.values, experts.best.ok) == ((4,), False)
    with pytest.raises(
        CheckFailedError, match=r"the nearest is moe.num_experts = 4, where params 3,545,507,840 is 1.05"
    ):
        require_match(experts, "moe", "memory")
    assert matched(spec, memory, ["moe.num_experts", "moe.hidden_dim"], axes, 4096).best.ok


@pytest.mark.parametrize(
    ("free", "column", "message", "hint"),
    [
        ("ffn.hiden_dim", 5, "unknown key `ffn.hiden_dim`", "did you mean `ffn.hidden_dim`?"),
        ("place.7.block.top_k", 7, "unknown key", None),
        ("ffn", 1, "`ffn` is a table", None),
        ("model.name", 1, "`model.name` is not an integer: memory", None),
        ("memory.num_sub_keys", 1, "is not an integer: None", None),
        ("model.tie_embeddings", 1, "is not an integer: False", None),
        ("ffn.hidden_dim=9", 16, "expected KEY=LOW..HIGH, got 9", None),
        ("ffn.hidden_dim=9..3", 16, "expected KEY=LOW..HIGH", None),
        ("ffn.hidden_dim=", 16, "expected KEY=LOW..HIGH, got nothing", None),
    ],
)
def test_a_key_that_cannot_be_solved_for_is_refused_at_its_character(
    tmp_path: Path, free: str, column: int, message: str, hint: str | None
) -> None:
    spec, _ = specs(tmp_path, MEMORY)
    with pytest.raises(SpecError) as caught:
        parse_free(spec, free)
    (found,) = caught.value.diagnostics
    assert (found.where.file, found.where.line, found.where.column) == ("--free", 1, column)
    assert message in found.message
    assert hint is None or found.help == hint


def test_keys_that_say_nothing_together_are_refused(tmp_path: Path) -> None:
    spec, baseline = specs(tmp_path, MEMORY)
    for free, why in (
        ([], "give one to 3 keys"),
        (["ffn.hidden_dim"] * 4, "give one to 3 keys"),
        (["memory.top_k", "place.0.block.top_k"], "the same key more than once"),
    ):
        with pytest.raises(UsageError, match=why):
            matched(spec, baseline, free, {"flops": 0.1})
    two = MEMORY + MEMORY[MEMORY.index("[[place]]") :].replace('"middle"', "[0]").replace("top_k = 4", "top_k = 5")
    with pytest.raises(SpecError, match=r"has several values: place\.0\.block\.top_k = 4, place\.1\.block\.top_k = 5"):
        parse_free(specs(tmp_path, two)[0], "memory.top_k")


def test_what_is_written_is_a_spec_that_keeps_its_claim(tmp_path: Path) -> None:
    specs(tmp_path, MEMORY)
    given = ["match", "a.toml", "--to", "dense.toml", "--set", "place.0.block.top_k=3", "--free", "ffn.hidden_dim"]
    done = memforge(*given, "--out", "matched.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "wrote matched.toml; next: memforge check matched.toml\n")
    spec = load_spec(tmp_path / "matched.toml")
    assert (spec.model.name, spec.place[0].block.top_k) == ("matched", 3)
    assert spec.parity is not None
    assert (spec.parity.against, spec.parity.tolerance.flops) == ("dense.toml", 0.005)
    assert memforge("check", "matched.toml", cwd=tmp_path).returncode == 0
    again = memforge(*given, "--out", "matched.toml", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (4, "error: matched.toml: exists already\n")
    outside = memforge(*given, "--out", tmp_path / "elsewhere" / "m.toml", cwd=tmp_path)
    assert (outside.returncode, (tmp_path / "elsewhere" / "m.toml").exists()) == (4, False)


def test_without_a_solution_the_nearest_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    specs(tmp_path, MEMORY)
    given = ["match", "a.toml", "--to", "dense.toml", "--axis", "params", "--free", "memory.top_k", "--out", "m.toml"]
    done = memforge(*given, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "m.toml").exists()) == (1, False)
    assert "no match of memory with dense for memory.top_k 1 to 256: the nearest is memory.top_k = 4" in done.stderr
    record = memforge(*given, "--json", cwd=tmp_path)
    assert record.returncode == 1
    assert json.loads(record.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "absent.toml", "--free", "ffn.hidden_dim"], "absent.toml:1:1: no such file"),
        (["--to", "dense.toml", "--axis", "flop", "--free", "ffn.hidden_dim"], "--axis flop: known are params"),
        (["--to", "dense.toml", "--free", "ffn.hidden_dim", "--seq-len", "64"], "at most 32 tokens"),
        (["--to", "dense.toml"], "give one to 3 keys with --free, not 0"),
        (["--to", "dense.toml", "--free", "ffn.hidden_dim", "--tolerance", "flops=x"], "--tolerance flops=x"),
    ],
)
def test_usage_errors_end_with_2(tmp_path: Path, args: list[str], message: str) -> None:
    specs(tmp_path, MEMORY)
    done = memforge("match", "a.toml", *args, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [(MEMORY, "{ flops = 0.001 }"), (MOE, "{ flops = 0.01, params = 0.02 }"), (MOE, "{ params = 0.01 }")],
)
def test_a_claim_that_fails_ends_with_the_command_that_mends_it(tmp_path: Path, text: str, tolerance: str) -> None:
    specs(tmp_path, text + f'[parity]\nagainst = "dense.toml"\ntolerance = {tolerance}\n')
    record = json.loads(memforge("check", "a.toml", "--json", cwd=tmp_path).stdout)
    (error, *_) = record["errors"]
    failing = [name for name, axis in record["parity"]["axes"].items() if axis["ok"] is False]
    told = memforge("check", "a.toml", cwd=tmp_path)
    assert told.returncode == 1
    for name in failing:
        axis = record["parity"]["axes"][name]
        for part in (
            name,
            f"{axis['value']:,}",
            f"{axis['baseline']:,}",
            f"{axis['ratio']:.5f}",
            f"{axis['tolerance']:g}",
        ):
            assert part in told.stderr
    assert error["help"] in told.stderr
    program, *command = shlex.split(error["help"])
    assert program == "memforge"
    assert memforge(*command, "--out", "mended.toml", cwd=tmp_path).returncode == 0
    assert memforge("check", "mended.toml", cwd=tmp_path).returncode == 0
