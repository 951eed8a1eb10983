"""`extends`, `--set`, placement, rendering and the schema."""

import json
from pathlib import Path

import pytest
import tomli
from conftest import REPO, SMALL, memforge, write

from memforge.errors import SpecError, UsageError
from memforge.plan import make_plan
from memforge.spec import load_spec
from memforge.spec.placement import Centered, Every, select_layers
from memforge.spec.presets import PRESETS, preset_text
from memforge.spec.render import render_toml


def test_extends_merges_tables_and_replaces_arrays_whole(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", SMALL)
    top = write(
        tmp_path / "sub" / "top.toml",
        'extends = "../base.toml"\n[model]\nname = "top"\n'
        '[[place]]\nlayers = "middle"\n'
        'block = { kind = "memory", pool = "facts", num_heads = 1, top_k = 2, key_dim = 8 }\n',
    )
    spec = load_spec(top, spec_root=tmp_path)
    assert (spec.model.name, spec.model.dim) == ("top", 32)
    assert [rule.layers for rule in spec.place] == ["middle"]
    # An inline block is replaced whole: gate and qk_norm of the base are gone.
    assert (spec.place[0].block.gate, spec.place[0].block.qk_norm) == ("none", False)


def test_errors_in_a_base_file_name_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.toml", SMALL.replace("top_k = 4", "top_k = 40"))
    write(tmp_path / "top.toml", 'extends = "base.toml"\n[pool.facts]\nnum_sub_keys = 9\n')
    with pytest.raises(SpecError) as caught:
        load_spec("top.toml")
    (error,) = caught.value.diagnostics
    assert (error.where.file, error.where.line) == ("base.toml", 20)
    # The pool it names stands on the line of the error.
    assert [(p.file, p.line) for p, _ in error.related] == [("top.toml", 3), ("base.toml", 20)]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../outside.toml", "outside the spec root"),
        ("link.toml", "outside the spec root"),
        ("/etc/passwd", "relative path"),
        ("http://x/y.toml", "relative path"),
        ("absent.toml", "no such file"),
        ("a.toml", "extends itself"),
        (".", "no such file"),
    ],
)
def test_extends_stays_inside_its_root(tmp_path: Path, target: str, message: str) -> None:
    write(tmp_path / "outside.toml", SMALL)
    inside = tmp_path / "inside"
    path = write(inside / "a.toml", f'extends = "{target}"\n')
    (inside / "link.toml").symlink_to(tmp_path / "outside.toml")
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(path)
    assert caught.value.diagnostics[0].where.line == 1


def test_long_chains_are_refused(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"{i}.toml", f'extends = "{i + 1}.toml"\n')
    write(tmp_path / "12.toml", SMALL)
    with pytest.raises(SpecError, match="files extend each other"):
        load_spec(tmp_path / "0.toml")


def test_set_reaches_tables_rules_and_words(small: Path) -> None:
    spec = load_spec(small, overrides=["train.steps=7", "place.0.block.gate=sigmoid", "model.tie_embeddings=true"])
    assert spec.train is not None
    assert (spec.train.steps, spec.place[0].block.gate, spec.model.tie_embeddings) == (7, "sigmoid", True)


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("train.steps", UsageError, "KEY=VALUE"),
        ("train.steps=", SpecError, "not valid TOML"),
        ("train.step=3", SpecError, "unknown key `step`"),
        ("place.9.mode=add", SpecError, "is not the index"),
        ("train.steps=many", SpecError, "expected an integer"),
        ("model.dim.x=3", SpecError, "not a table"),
    ],
)
def test_bad_set_is_explained(small: Path, assignment: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_spec(small, overrides=[assignment])


@pytest.mark.parametrize(
    ("selector", "num_layers", "chosen"),
    [
        ("all", 3, (0, 1, 2)),
        ("middle", 12, (6,)),
        ([2, 0], 3, (0, 2)),
        # The placements of the paper's models: paper.md, "Placement".
        (Centered(centered=3, stride=4), 12, (2, 6, 10)),
        (Centered(centered=3, stride=8), 22, (3, 11, 19)),
        (Centered(centered=3, stride=8), 24, (4, 12, 20)),
        (Centered(centered=3, stride=8), 32, (8, 16, 24)),
        (Centered(centered=2, stride=2), 6, (2, 4)),
        (Every.model_validate({"every": 4, "from": 2}), 12, (2, 6, 10)),
        (Every(every=5), 6, (0, 5)),
    ],
)
def test_selectors(selector: object, num_layers: int, chosen: tuple[int, ...]) -> None:
    assert select_layers(selector, num_layers) == chosen


@pytest.mark.parametrize(
    "selector",
    [[0, 4], [1, 1], Centered(centered=2, stride=1), Centered(centered=3, stride=3), Every(every=1, **{"from": 4})],
)
def test_selectors_outside_the_model_are_refused(selector: object) -> None:
    with pytest.raises(ValueError, match=r"layer|centre|outside"):
        select_layers(selector, 4)


def test_the_last_rule_wins_and_add_keeps_the_block(small: Path) -> None:
    text = SMALL.replace("[data]", '[[place]]\nlayers = [2, 3]\nblock = { kind = "ffn", hidden_dim = 8 }\n\n[data]')
    text = text.replace(
        "[data]",
        '[[place]]\nlayers = [3]\nmode = "add"\n'
        'block = { kind = "memory", num_sub_keys = 4, num_heads = 1, top_k = 2, key_dim = 4 }\n\n[data]',
    )
    plan = make_plan(load_spec(write(small, text))).model
    assert [[b.kind for b in layer.blocks] for layer in plan.layers] == [
        ["memory"],
        ["ffn"],
        ["ffn"],
        ["ffn", "memory"],
    ]
    assert plan.pools[-1].path == "layers.3.memory.pool"


@pytest.mark.parametrize("path", sorted((REPO / "specs").rglob("*.toml")), ids=lambda p: p.stem)
def test_rendered_specs_mean_the_same(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path, spec_root=REPO / "specs", overrides=["train.seed=5"])
    for defaults in (False, True):
        text = render_toml(spec, defaults=defaults)
        assert "# --set:1" in text
        values = tomli.loads(text)
        values.pop("parity", None)
        again = type(spec).model_validate(values)
        assert make_plan(again).model == make_plan(spec).model
        assert make_plan(again).run == make_plan(spec).run


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_commented(preset: str, tmp_path: Path) -> None:
    text = preset_text(preset)
    assert "# model width" in text
    load_spec(write(tmp_path / "spec.toml", text))


def test_init_leaves_an_existing_file_alone(tmp_path: Path) -> None:
    assert memforge("init", "mine.toml", cwd=tmp_path).returncode == 0
    (tmp_path / "mine.toml").write_text("mine")
    assert memforge("init", "mine.toml", cwd=tmp_path).returncode == 4
    assert (tmp_path / "mine.toml").read_text() == "mine"


def test_schema_describes_every_key() -> None:
    schema = json.loads(memforge("schema").stdout)
    assert schema["properties"]["extends"]["type"] == "string"
    bare = [
        f"{name}.{key}"
        for name, table in schema["$defs"].items()
        for key, field in table.get("properties", {}).items()
        if key != "kind" and not field.get("description") and name not in ("Centered", "Every", "ToleranceSpec")
    ]
    assert bare == []
