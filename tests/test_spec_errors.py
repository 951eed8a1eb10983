"""What a user reads when a spec is wrong."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SMALL, memforge, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memforge.errors import SpecError
from memforge.report.diagnostics import MAX_LINES, render
from memforge.spec import load_spec

HEADLINE = re.compile(r"^\S+:\d+:\d+: \S")

# name -> (text to replace in SMALL, replacement); each becomes one golden file.
EDITS = {
    "unknown-key": ("num_kv_heads = 2", "num_kv_head = 2"),
    "unknown-table": ("[ffn]", "[fnn]"),
    "wrong-type": ("dim = 32\n", 'dim = "32"\n'),
    "out-of-bounds": ("num_layers = 4", "num_layers = 0"),
    "not-finite": ("learning_rate = 1e-3", "learning_rate = nan"),
    "unknown-word": ('gate = "swilu"', 'gate = "swiglu"'),
    "unknown-kind": ('kind = "moe"', 'kind = "mow"'),
    "missing-key": ("num_facts = 12\n", ""),
    "layer-outside": ("layers = [0, 2]", "layers = [0, 7]"),
    "off-centre": ("layers = [0, 2]", "layers = { centered = 2, stride = 1 }"),
    "unknown-pool": ('pool = "facts"', 'pool = "fact"'),
    "top-k-over-sub-keys": ("top_k = 4", "top_k = 9"),
    "odd-key-dim": ("key_dim = 16", "key_dim = 15"),
    "readers-disagree": ('pool = "facts",', 'pool = "facts", num_sub_keys = 16,'),
    "top-k-over-experts": ("top_k = 2", "top_k = 5"),
    "heads-do-not-divide": ("num_heads = 4\n", "num_heads = 5\n"),
    "broken-toml": ("hidden_dim = 48", "hidden_dim = = 48"),
    "defined-twice": ("hidden_dim = 48", "hidden_dim = 48\nhidden_dim = 49"),
    "unread-pool": ("[ffn]", "[pool.unused]\nnum_sub_keys = 4\n\n[ffn]"),
    "small-vocabulary": ("vocab_size = 300", "vocab_size = 200"),
    "empty-tolerance": ("[data]", '[parity]\nagainst = "bad.toml"\ntolerance = {}\n\n[data]'),
    "catch-up-betas": ("[train]\n", '[train]\nvalue_update = "catch_up"\nbetas = [0.9, 0.8]\n'),
    "sgd-catches-up": ("[train]\n", '[train]\nvalue_update = "catch_up"\nvalue_optimizer = "sgd"\n'),
    "never-zero": ("[train]\n", '[train]\nschedule = "exponential"\nfinal_rate = 0.0\n'),
    "missing-data": ('kind = "facts"\nnum_facts = 12', 'kind = "text"\npath = "absent.txt"'),
}


def errors_of(path: Path) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(path, require_data=True)
    return render(caught.value.diagnostics)


@pytest.mark.parametrize("name", EDITS)
def test_each_mistake_reads_as_its_golden_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    before, after = EDITS[name]
    assert before in SMALL
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.toml", SMALL.replace(before, after, 1))
    lines = errors_of(Path("bad.toml"))
    assert HEADLINE.match(lines[0])
    golden(f"errors/{name}.txt", "\n".join(lines) + "\n")


def test_all_errors_of_a_file_come_at_once_in_source_order(small: Path) -> None:
    text = SMALL
    for name in ("unknown-key", "layer-outside", "odd-key-dim", "unknown-kind", "not-finite"):
        text = text.replace(*EDITS[name], 1)
    with pytest.raises(SpecError) as caught:
        load_spec(write(small, text))
    where = [d.where.line for d in caught.value.diagnostics]
    keys = [d.key[-1] for d in caught.value.diagnostics]
    assert where == sorted(where)
    assert keys == ["num_kv_head", 1, "key_dim", "kind", "learning_rate"]


def test_a_misspelt_required_key_is_one_error(small: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(small, SMALL.replace("num_layers", "num_layer")))
    assert [d.message for d in caught.value.diagnostics] == ["unknown key `num_layer`"]


def test_a_misspelt_axis_is_one_error(small: Path) -> None:
    claim = '\n[parity]\nagainst = "small.toml"\ntolerance = { flop = 0.1 }\n'
    with pytest.raises(SpecError) as caught:
        load_spec(write(small, SMALL + claim))
    assert [d.message for d in caught.value.diagnostics] == ["unknown key `flop`"]


def test_a_baseline_shorter_than_the_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "short.toml", SMALL.replace("max_seq_len = 96", "max_seq_len = 40").replace("seq_len = 48\n", ""))
    write(tmp_path / "bad.toml", SMALL + '\n[parity]\nagainst = "short.toml"\n')
    golden("errors/short-baseline.txt", "\n".join(errors_of(Path("bad.toml"))) + "\n")
    load_spec("bad.toml", overrides=["train.seq_len=40"])


def test_at_most_25_lines_and_the_rest_counted(small: Path) -> None:
    extra = "".join(f"key_{i} = {i}\n" for i in range(60))
    with pytest.raises(SpecError) as caught:
        load_spec(write(small, SMALL.replace("[ffn]\n", f"[ffn]\n{extra}")))
    lines = render(caught.value.diagnostics)
    assert len(caught.value.diagnostics) == 60
    assert len(lines) == MAX_LINES
    assert lines[1].lstrip().startswith("13 | key_0 = 0")
    assert lines[-1] == f"and {60 - sum(bool(HEADLINE.match(line)) for line in lines)} more"


def test_columns_count_characters_and_tabs(small: Path) -> None:
    text = SMALL.replace("hidden_dim = 48", 'hidden_dim = 48\n\tactivation = "é", ').replace('"é", ', '"ééé"')
    with pytest.raises(SpecError) as caught:
        load_spec(write(small, text))
    (error,) = caught.value.diagnostics
    assert (error.where.line, error.where.column, error.where.end_column) == (14, 15, 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table [model] is required"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not a UTF-8 text file"),
        (b"a = 1\0", "not valid TOML"),
        (b"x = " + b"[" * 100_000, "nested more than"),
        (b"a" + b".a" * 50_000 + b" = 1", "dotted key"),
        (b"x = " + b"9" * 100_000, "digits"),
        (b"#" * 300_000, "larger than"),
    ],
    ids=["empty", "binary", "nul", "nested", "dotted", "digits", "large"],
)
def test_hostile_files_are_refused_with_a_position(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.toml"
    path.write_bytes(content)
    lines = errors_of(path)
    assert message in lines[0]
    assert HEADLINE.match(lines[0])
    assert len(lines) <= MAX_LINES


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_what_is_not_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.toml"
    if kind == "directory":
        path.mkdir()
    assert ("no such file" if kind == "missing" else "not a regular file") in errors_of(path)[0]


def test_control_characters_are_escaped(small: Path) -> None:
    (line, *_) = errors_of(write(small, SMALL.replace("[ffn]\n", '[ffn]\n"\\u001b[31m" = 1\n')))
    assert "\x1b" not in line
    assert "\\x1b[31m" in line


def test_json_has_every_error_and_exit_code_2(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", SMALL.replace("num_kv_heads = 2", "num_kv_head = 2"))
    done = memforge("check", path, "--json")
    assert done.returncode == 2
    record = json.loads(done.stdout)
    assert record["ok"] is False
    (error,) = record["errors"]
    assert (error["line"], error["column"], error["key"]) == (10, 1, "attention.num_kv_head")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_specs_load_or_explain(small: Path, data: st.DataObject) -> None:
    """Cut, double or replace a stretch of a good spec: it loads, or every error names a line that exists."""
    start = data.draw(st.integers(0, len(SMALL)))
    end = data.draw(st.integers(start, min(len(SMALL), start + 40)))
    middle = data.draw(st.sampled_from(["", SMALL[start:end] * 2, "=", "[", "]]", '"', "1e400", "-1", "\n", "é", "{}"]))
    text = SMALL[:start] + middle + SMALL[end:]
    try:
        load_spec(write(small, text))
    except SpecError as error:
        lines = render(error.diagnostics)
        assert 1 <= len(lines) <= MAX_LINES
        for d in error.diagnostics:
            assert d.where.text == text.split("\n")[d.where.line - 1]


# What once crashed, misled or stalled: (replacements in SMALL, key and line of each error expected).
REGRESSIONS = {
    "table-prefix-typo": ([("[pool.facts]", "[pol.facts]")], [("pol", 15)]),
    "pool-is-a-number": ([("[pool.facts]\nnum_sub_keys = 8", ""), ("[model]", "pool = 5\n[model]")], [("pool", 1)]),
    "pool-named-pool": ([("[pool.facts]", "[pool.pool]"), ("top_k = 4", 'top_k = "x"')], [("top_k", 20)]),
    "kind-is-a-table": ([("steps = 4", "kind = {}\nsteps = 4")], [("kind", 31)]),
    "kind-as-a-key": (
        [('kind = "memory",', 'kind = "memory", memory = 1,'), ("top_k = 4", 'top_k = "x"')],
        [("memory", 20), ("top_k", 20)],
    ),
    "a-word-and-a-combination": (
        [('gate = "swilu"', 'gate = "swil"'), ("key_dim = 16", "key_dim = 15")],
        [("key_dim", 20), ("gate", 20)],
    ),
    "a-required-key-and-a-combination": (
        [("num_layers = 4", "num_layer = 4"), ("top_k = 2", "top_k = 5")],
        [("num_layer", 4), ("top_k", 24)],
    ),
    "a-stand-in-is-in-no-conflict": (
        [("dim = 32", 'dim = "32"'), ("num_heads = 4\n", "num_heads = 6\n")],
        [("dim", 3)],
    ),
    "no-ffn-and-a-misspelt-count": (
        [("num_layers = 4", "num_layer = 4"), ("[ffn]\nhidden_dim = 48", ""), ("[0, 2]", "[0, 1, 2]")],
        [("num_layer", 4)],
    ),
    "two-added-blocks": (
        [
            (
                "[data]",
                '[[place]]\nlayers = [1]\nmode = "add"\n'
                'block = { kind = "moe", num_experts = 2, hidden_dim = 4 }\n[data]',
            ),
            (
                "[data]",
                '[[place]]\nlayers = "all"\nmode = "add"\n'
                'block = { kind = "memory", num_sub_keys = 4, num_heads = 1, top_k = 2, key_dim = 4 }\n[data]',
            ),
        ],
        [("mode", 32), ("kind", 33)],
    ),
    "a-bad-rule-and-an-unread-pool": (
        [("layers = [3]", "layers = [9]"), ("[ffn]", "[pool.b]\nnum_sub_keys = 4\n[ffn]")],
        [("b", 12), (0, 25)],
    ),
    "a-rule-that-was-dropped": (
        [
            ("layers = [3]", 'layers = ["x"]'),
            ("[data]", '[[place]]\nlayers = [3]\nmode = "add"\nblock = { kind = "ffn", hidden_dim = 4 }\n[data]'),
        ],
        [(0, 23)],
    ),
    "dotted-unknown-key": ([("layers = [3]", "layers = [3]\nblock.zz = 1"), ('block = { kind = "moe"', "#")], None),
    "hex-digits": ([("dim = 32", "dim = 0x" + "f" * 5000)], [None]),
    "quotes-hide-brackets": ([("[data]", 'x = ["""a"""", ' + "[" * 400 + "]" * 400 + "]\n[data]")], [None]),
    "newline-in-a-name": ([('pool = "facts"', 'pool = "fa\\ncts"')], [("pool", 20)]),
    "toml-1.1-escape": ([('kind = "facts"', 'kind = "f\\x61cts"')], []),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_went_wrong(name: str, small: Path) -> None:
    edits, expected = REGRESSIONS[name]
    text = SMALL
    for before, after in edits:
        assert before in text
        text = text.replace(before, after, 1)
    write(small, text)
    if expected == []:
        load_spec(small)
        return
    with pytest.raises(SpecError) as caught:
        load_spec(small)
    lines = render(caught.value.diagnostics)
    assert all("\n" not in line and len(line) < 400 for line in lines)
    if expected and None not in expected:
        assert [(d.key[-1], d.where.line) for d in caught.value.diagnostics] == expected


@pytest.mark.parametrize(
    "text",
    [
        SMALL + " " * 200_000,
        SMALL + "x" + " " * 200_000 + "= 1",
        SMALL + '\\"' * 100_000,
        SMALL + '\\"""\n' * 40_000,
        SMALL + "".join(f"a{i} = 1\n" for i in range(20_000)),
        SMALL + "[[place]]\n" * 20_000,
        "place = [" + "1, " * 80_000 + "]\n" + SMALL,
    ],
    ids=["spaces", "spaces-before-equals", "quotes", "triple-quotes", "unknown-keys", "rules", "rule-scalars"],
)
def test_large_files_are_read_in_linear_time(small: Path, text: str) -> None:
    """Each of these took more than 15 seconds where a scan or a lookup was quadratic; the bound is far from both."""
    write(small, text)
    began = time.process_time()
    with suppress(SpecError):
        load_spec(small)
    assert time.process_time() - began < 8


def test_carets_stand_under_what_they_mean(small: Path) -> None:
    for name in ("f\u00a0cts", "日本", "a\tb"):
        write(small, SMALL.replace('"memory", pool = "facts"', f'"memory", pool = "{name}", top_j = 1'))
        lines = errors_of(small)
        code, carets = lines[-2], lines[-1]
        shown = code[: cell_index(code, carets.index("^"))]
        assert shown.endswith(", "), (code, carets)


def cell_index(text: str, cells: int) -> int:
    from rich.cells import cell_len

    return next(i for i in range(len(text) + 1) if cell_len(text[:i]) >= cells)


@pytest.mark.parametrize("name", ["loop.toml", "a" * 300])
@pytest.mark.parametrize("key", ["extends", "against", "path"])
def test_paths_that_cannot_be_followed_have_a_position(tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    text = {
        "extends": f'extends = "{name}"\n',
        "against": SMALL + f'[parity]\nagainst = "{name}"\n',
        "path": SMALL.replace('kind = "facts"\nnum_facts = 12', f'kind = "text"\npath = "{name}"'),
    }[key]
    (line, *_) = errors_of(write(tmp_path / "s.toml", text))
    assert HEADLINE.match(line)
    assert "cannot be followed" in line or "can be followed" in line or "no such file" in line


@pytest.mark.parametrize(
    ("block", "message", "other"),
    [
        (
            'kind = "moe"\nnum_experts = 4\ntop_k = 5\nhidden_dim = 8',
            "top_k = 5 is more than num_experts = 4",
            "num_experts",
        ),
        (
            'kind = "moe"\nnum_experts = 4\nhidden_dim = 8\nrouter = "expert_choice"\ncapacity_factor = 2.0',
            "always full",
            "router",
        ),
        (
            'kind = "moe"\nnum_experts = 4\nhidden_dim = 8\nrouter = "expert_choice"\nload_balance_coef = 0.1',
            "in balance by",
            "router",
        ),
        (
            'kind = "moe"\nnum_experts = 4\nhidden_dim = 8\nrouter = "expert_choice"\nnormalize_top_k = true',
            "any number",
            "router",
        ),
        ('kind = "moe"\nnum_experts = 4\nhidden_dim = 9999\nnum_shared_experts = 999', "are wider than", "hidden_dim"),
        (
            'kind = "peer"\nnum_sub_keys = 4\nnum_heads = 1\ntop_k = 5\nkey_dim = 8',
            "is more than num_sub_keys = 4",
            "num_sub_keys",
        ),
        (
            'kind = "peer"\npool = "facts"\nnum_heads = 1\ntop_k = 3\nkey_dim = 8',
            "holds values; a peer block reads experts",
            "pool",
        ),
    ],
)
def test_both_ends_of_a_conflict_are_shown(tmp_path: Path, block: str, message: str, other: str) -> None:
    text = SMALL.replace("[data]", f"[[place]]\nlayers = [1]\n[place.block]\n{block}\n\n[data]")
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path / "s.toml", text))
    (diagnostic,) = caught.value.diagnostics
    assert message in diagnostic.message
    assert any(other in position.text for position, _ in diagnostic.related)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ('{ kind = "llama3", original_max_seq_len = 32, low_freq_factor = 4.0 }', "high_freq_factor = 4 is not above"),
        ('{ kind = "yarn", factor = 2.0, original_max_seq_len = 32, beta_slow = 64.0 }', "beta_fast = 32 is not above"),
        ('{ kind = "ntk", factor = 2.0 }', "unknown kind `ntk`"),
        ('{ kind = "linear" }', "factor"),
        ('{ kind = "linear", factor = 0.5 }', "factor"),
    ],
)
def test_rope_scaling_that_means_nothing_is_refused(tmp_path: Path, scaling: str, message: str) -> None:
    text = SMALL.replace("num_heads = 4\nnum_kv_heads = 2", f"num_heads = 4\nrope_scaling = {scaling}")
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path / "s.toml", text))
    assert any(message in d.message or message in ".".join(map(str, d.key)) for d in caught.value.diagnostics)


@pytest.mark.parametrize(
    ("key", "dtype", "message"),
    [
        ("value_update=dense", "bfloat16", "dense updates of a bfloat16 pool would lose small ones"),
        ("value_rounding=stochastic", "float16", "a float16 pool is not rounded stochastically"),
    ],
)
def test_pools_in_16_bits_are_updated_so_that_nothing_is_lost(
    key: str, dtype: str, message: str, tmp_path: Path
) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    with pytest.raises(SpecError) as caught:
        load_spec(spec, overrides=[f"train.{key}", f"pool.facts.dtype={dtype}"])
    lines = render(caught.value.diagnostics)
    assert message in lines[0]
    assert any(f"{dtype} is set here" in line for line in lines)
