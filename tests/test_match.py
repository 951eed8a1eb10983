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


# Nothing of it is the baseline's; its width must be a multiple of 8.
OTHER = DENSE.replace("dim = 32", "dim = 56").replace("num_layers = 3", "num_layers = 2").replace("= 96", "= 40")


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
        (OTHER, ["model.dim=8..64", "model.num_layers=1..6"], ["params"]),
        (OTHER, ["model.dim=8..512"], ["flops"]),
        (OTHER, ["model.num_layers=1..6", "model.dim=8..96"], ["active_params"]),
        (MEMORY, ["memory.top_k=1..20", "values.num_sub_keys=2..20"], ["flops", "params"]),
    ],
)
def test_nothing_in_the_range_is_nearer_than_what_is_found(
    tmp_path: Path, text: str, free: list[str], axes: list[str]
) -> None:
    """Widths that heads divide, experts that can be chosen: the spec is not valid everywhere."""
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
        ("ffn.hidden_dim=9..3", 1, "nothing to search from 9 to 3", None),
        ("ffn.hidden_dim=1.." + "9" * 5000, 16, "expected KEY=LOW..HIGH", None),
        ("ffn.hidden_dim=200000..300000", 1, "allowed are 1 to 131,072", None),
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
        (["model.max_seq_len"], "model.max_seq_len: it does not change flops"),
    ):
        with pytest.raises(UsageError, match=why):
            matched(spec, baseline, free, {"flops": 0.1})
    two = MEMORY + MEMORY[MEMORY.index("[[place]]") :].replace('"middle"', "[0]").replace("top_k = 4", "top_k = 5")
    with pytest.raises(SpecError, match=r"has several values: place\.0\.block\.top_k = 4, place\.1\.block\.top_k = 5"):
        parse_free(specs(tmp_path, two)[0], "memory.top_k")


OUT = ["match", "a.toml", "--to", "dense.toml", "--free", "ffn.hidden_dim", "--out"]


def test_what_is_written_is_a_spec_that_keeps_its_claim(tmp_path: Path) -> None:
    specs(tmp_path, MEMORY)
    given = [*OUT[:-1], "--set", "place.0.block.top_k=3", "--out", "matched.toml"]
    done = memforge(*given, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "wrote matched.toml; next: memforge check matched.toml\n")
    spec = load_spec(tmp_path / "matched.toml")
    assert (spec.model.name, spec.place[0].block.top_k) == ("matched", 3)
    assert spec.parity is not None
    assert (spec.parity.against, spec.parity.tolerance.flops) == ("dense.toml", 0.005)
    assert memforge("check", "matched.toml", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [
        ("dense.toml", 4, "dense.toml: exists already"),
        ("absent/m.toml", 4, "no such directory: absent"),
        ("below/m.toml", 2, "a.toml is not below"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_once_and_first(
    tmp_path: Path, out: str, code: int, message: str
) -> None:
    specs(tmp_path, MEMORY)
    (tmp_path / "below").mkdir()
    done = memforge(*OUT, out, cwd=tmp_path)
    assert (done.returncode, done.stdout, message in done.stderr) == (code, "", True)
    record = memforge(*OUT, out, "--json", cwd=tmp_path)
    assert (record.returncode, json.loads(record.stdout)["ok"]) == (code, False)
    assert not (tmp_path / "below" / "m.toml").exists()


def test_tables_written_inline_are_written_whole(tmp_path: Path) -> None:
    inline = """
model = { name = "inline", dim = 32, num_layers = 3, vocab_size = 64, max_seq_len = 32 }
attention = { num_heads = 4 }
ffn = { hidden_dim = 96, activation = "gelu" }
pool = { a = { num_sub_keys = 12 }, b = { num_sub_keys = 8 } }
[[place]]
layers = [0]
block = { kind = "memory", pool = "a", num_heads = 2, top_k = 4, key_dim = 16 }
[[place]]
layers = [1]
block = { kind = "memory", pool = "b", num_heads = 2, top_k = 4, key_dim = 16 }
"""
    specs(tmp_path, inline)
    for free, name in (("ffn.hidden_dim", "_first.toml"), ("pool.a.num_sub_keys", "second.toml")):
        args = ["match", "a.toml", "--to", "dense.toml", "--free", free, "--tolerance", "flops=9", "--out", name]
        done = memforge(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert load_spec(tmp_path / name).ffn.activation == "gelu"
    assert load_spec(tmp_path / "_first.toml").model.name == "first"


def test_a_match_at_another_length_than_the_claims_is_not_written(tmp_path: Path) -> None:
    long = MEMORY.replace("max_seq_len = 32", "max_seq_len = 2048")
    write(tmp_path / "dense.toml", DENSE.replace("max_seq_len = 32", "max_seq_len = 2048"))
    write(tmp_path / "a.toml", long.replace("num_heads = 4", "num_heads = 4\nhead_dim = 16"))
    done = memforge(*OUT, "m.toml", "--seq-len", "8", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "m.toml").exists()) == (1, False)
    assert "parity fails: m against dense: flops" in done.stderr


def test_without_a_solution_the_nearest_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    specs(tmp_path, MEMORY)
    given = [
        "match",
        "a.toml",
        "--to",
        "dense.toml",
        "--axis",
        "params",
        "--free",
        "memory.key_dim=2..8",
        "--out",
        "m.toml",
    ]
    done = memforge(*given, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "m.toml").exists()) == (1, False)
    assert "no match of memory with dense for memory.key_dim 2 to 8: the nearest is memory.key_dim = 8" in done.stderr
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
    ("text", "tolerance", "options"),
    [
        (MEMORY, "{ flops = 0.001 }", []),
        (MEMORY, "{ flops = 0.001 }", ["--set", "memory.top_k=2", "--set", "ffn.activation=gelu"]),
        (MOE, "{ flops = 0.01, params = 0.02 }", []),
        (MOE, "{ params = 0.01 }", ["--set", "place.0.block.num_experts=5"]),
    ],
)
def test_a_claim_that_fails_ends_with_the_command_that_mends_it(
    tmp_path: Path, text: str, tolerance: str, options: list[str]
) -> None:
    specs(tmp_path, text + f'[parity]\nagainst = "dense.toml"\ntolerance = {tolerance}\n')
    options = [option.replace("memory.top_k", "place.0.block.top_k") for option in options]
    record = json.loads(memforge("check", "a.toml", *options, "--json", cwd=tmp_path).stdout)
    (error, *_) = record["errors"]
    failing = [name for name, axis in record["parity"]["axes"].items() if axis["ok"] is False]
    told = memforge("check", "a.toml", *options, cwd=tmp_path)
    assert told.returncode == 1
    for name in failing:
        axis = record["parity"]["axes"][name]
        numbers = (f"{axis['value']:,}", f"{axis['baseline']:,}", f"{axis['ratio']:.5f}", f"{axis['tolerance']:g}")
        assert all(part in told.stderr for part in (name, *numbers))
    assert error["help"] in told.stderr
    program, *command = shlex.split(error["help"])
    assert program == "memforge"
    assert memforge(*command, "--out", "mended.toml", cwd=tmp_path).returncode == 0
    assert memforge("check", "mended.toml", cwd=tmp_path).returncode == 0
    mended = load_spec(tmp_path / "mended.toml")
    assert ("--set" not in options) or mended.ffn.activation == "gelu" or mended.place[0].block.num_experts == 5


def test_the_command_keeps_the_spec_root_and_all_failures_are_told(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", DENSE)
    write(tmp_path / "sub" / "base.toml", 'extends = "../dense.toml"\n[ffn]\nhidden_dim = 500\n[model]\nname = "b"\n')
    write(tmp_path / "wide.toml", DENSE.replace("= 96", "= 300").replace('"dense"', '"wide"'))
    against = ["--against", "sub/base.toml", "--against", "wide.toml"]
    done = memforge("profile", "dense.toml", *against, "--spec-root", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert "parity fails: dense against b: flops" in done.stderr
    assert "dense against wide: flops" in done.stderr
    assert "--spec-root . --axis flops" in done.stderr


def test_a_key_of_a_table_with_an_alias_can_be_solved_for(tmp_path: Path) -> None:
    every = MOE.replace('layers = "all"', "layers = { every = 2, from = 1 }")
    spec, baseline = specs(tmp_path, every)
    found = matched(spec, baseline, ["place.0.layers.from"], {"flops": 0.005})
    assert found.free[0].first == 0
