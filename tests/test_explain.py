"""explain, diff and doctor: what a key means, how two specs differ, what the machine has."""

import json
from pathlib import Path

import pytest
from conftest import SMALL, memforge, write

from memforge.explain import UNITS, explain
from memforge.plan import make_model_plan
from memforge.spec import load_spec, with_values
from memforge.spec.keys import known_keys, value_of

BASE = SMALL.split("[data]")[0]
TOP = 'extends = "base.toml"\n[model]\nname = "top"\n[ffn]\nhidden_dim = 64\n'


@pytest.fixture
def top(tmp_path: Path) -> Path:
    write(tmp_path / "base.toml", BASE)
    return write(tmp_path / "top.toml", TOP)


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("ffn.hidden_dim", 64, "top.toml:5:14"),
        ("model.dim", 32, "base.toml:3:7 (extended)"),
        ("attention.num_heads", 4, "base.toml:9:13 (extended)"),
        ("model.norm_eps", 1e-5, "default"),
        ("memory.gate", "swilu", "base.toml:20:91 (extended)"),
        ("memory.value_dim", None, "default"),
        ("model.num_layers", 5, "--set model.num_layers = 5"),
    ],
)
def test_every_value_has_an_origin(top: Path, key: str, value: object, origin: str) -> None:
    spec = load_spec(top, overrides=["model.num_layers=5"])
    (place,) = explain(spec, key, 32).places
    assert place[1] == value
    assert place[2].removeprefix(f"{top.parent}/") == origin


def test_effects_are_those_of_the_changed_spec(top: Path) -> None:
    spec = load_spec(top)
    found = explain(spec, "moe.num_experts", 32)
    (effect,) = found.effects
    assert (effect.value, found.unit) == (5, "experts")
    changed = make_model_plan(with_values(spec, {("place", 1, "block", "num_experts"): 5}))
    sizes = [sum(row.numel for row in plan.params) for plan in (make_model_plan(spec), changed)]
    assert effect.axes["params"] == tuple(sizes)
    assert effect.axes["flops"][0] < effect.axes["flops"][1]
    assert found.parameters == tuple(f"layers.{{3}}.moe.{name}" for name in ("router.weight", "w1", "w2", "w3"))
    assert "layers.{3}.moe.router" in found.ops


def test_a_choice_is_shown_with_every_other_word(top: Path) -> None:
    found = explain(load_spec(top), "memory.gate", 32)
    assert [effect.value for effect in found.effects] == ["none", "sigmoid"]
    assert found.allowed == '"none" | "sigmoid" | "swilu"'


def test_a_key_of_training_changes_nothing_in_the_model(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    done = memforge("explain", spec, "train.steps")
    assert done.returncode == 0
    assert "nothing in the model" in done.stdout
    assert "optimizer steps" in done.stdout


def test_places_that_differ_change_one_by_one(tmp_path: Path) -> None:
    second = '[[place]]\nlayers = [1]\nblock = { kind = "moe", num_experts = 6, top_k = 2, hidden_dim = 24 }\n'
    found = explain(load_spec(write(tmp_path / "s.toml", BASE + second)), "moe.num_experts", 32)
    assert [(e.place, e.value) for e in found.effects] == [
        ("place.1.block.num_experts", 5),
        ("place.2.block.num_experts", 7),
    ]
    grown = [effect.axes["params"][1] - effect.axes["params"][0] for effect in found.effects]
    assert grown == [3 * 32 * 24 + 32] * 2  # one expert and its row of the router


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("model.norm_eps", "no shape and no FLOPs of the model"),
        ("memory.value_dim", "not shown: no other value was tried"),
        ("model.vocab_size", "ops       head"),
    ],
)
def test_what_is_not_known_is_not_said_to_be_nothing(tmp_path: Path, key: str, line: str) -> None:
    assert line in memforge("explain", write(tmp_path / "s.toml", SMALL), key).stdout


def test_an_unknown_key_is_refused_at_its_character(top: Path) -> None:
    done = memforge("explain", top, "ffn.hiden_dim")
    assert done.returncode == 2
    assert done.stderr.startswith("KEY:1:5: unknown key `ffn.hiden_dim`")
    assert "did you mean `ffn.hidden_dim`?" in done.stderr


def test_every_key_of_a_spec_can_be_explained_and_every_number_has_a_unit(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path / "s.toml", SMALL))
    for name, places in known_keys(spec).items():
        found = explain(spec, name, 32)
        assert [place[0] for place in found.places] == [".".join(map(str, path)) for path in places]
        value = value_of(spec, places[0])
        if type(value) in (int, float) and str(places[0][-1]) not in ("seed", "eps", "norm_eps", "betas"):
            assert found.unit or str(places[0][-1]) in UNITS or "coef" in name, name


def test_diff_names_the_keys_and_what_follows(top: Path) -> None:
    done = memforge("diff", top.parent / "base.toml", top, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["keys"] == {"model.name": ["small", "top"], "ffn.hidden_dim": [48, 64]}
    assert found["same_model"] is False
    before, after = found["axes"]["params"]
    assert after - before == 3 * 32 * 16  # one FFN of three matrices, 16 wider
    assert found["kinds"]["ffn"]["params"] == [3 * 32 * 48, 3 * 32 * 64]
    shown = memforge("diff", top.parent / "base.toml", top).stdout
    assert "Keys that differ: 2 (different models)" in shown
    assert memforge("diff", top, top, "--json").stdout.count('"keys": {}') == 1


def test_diff_compares_the_files_that_claims_name(tmp_path: Path) -> None:
    claim = '[parity]\nagainst = "{}"\n'
    for path, against in (("a.toml", "base.toml"), ("sub/b.toml", "../base.toml"), ("sub/c.toml", "base.toml")):
        write(tmp_path / path, BASE + claim.format(against))
    for path in ("base.toml", "sub/base.toml"):
        write(tmp_path / path, BASE)
    for other, keys in (("sub/b.toml", set()), ("sub/c.toml", {"parity.against"})):
        done = memforge("diff", "a.toml", other, "--spec-root", ".", "--json", cwd=tmp_path)
        assert set(json.loads(done.stdout)["keys"]) == keys


def test_doctor_says_what_is_used_and_why() -> None:
    done = memforge("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True)
    assert set(found) == {"ok", "versions", "machine", "devices", "compilers", "caches", "settings", "uses"}
    assert found["versions"]["torch"].startswith("2.")
    assert found["uses"]["calibration"].startswith("none")
    text = memforge("doctor").stdout
    for section in set(found) - {"ok"}:
        assert f"\n{section}\n" in f"\n{text}"


def test_doctor_without_torch_says_so_and_ends_with_3(tmp_path: Path) -> None:
    write(tmp_path / "torch" / "__init__.py", "raise ImportError('libc10.so: cannot open shared object file')\n")
    done = memforge("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert "cannot be imported: libc10.so" in done.stdout
    assert done.stderr == "error: torch: cannot be imported: libc10.so: cannot open shared object file\n"
