"""The build directory, the exported graph and the compiled model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, memforge, write

from memforge.build import build_model, export_graph, require_exact, write_build
from memforge.cost import estimate
from memforge.errors import CheckFailedError, StorageError
from memforge.plan import make_plan, read_plan
from memforge.spec import load_spec

SPECS = sorted((REPO / "specs").rglob("*.toml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_every_spec_has_exactly_the_parameters_and_flops_of_its_ledger(path: Path) -> None:
    plan = make_plan(load_spec(path, spec_root=REPO / "specs")).model
    total = estimate(plan).as_dict()["params"]["total"]
    assert total == sum(p.numel() for p in build_model(plan, device="meta").parameters())
    require_exact(plan)


def test_the_build_directory_holds_what_the_manifest_says(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = memforge("build", small, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert sorted(p.name for p in out.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert read_plan(out / "plan.json") == make_plan(load_spec(small))
    cost = json.loads((out / "cost.json").read_text())
    assert cost["params"]["total"] == sum(row.numel for row in make_plan(load_spec(small)).model.params)
    graph = (out / "graph.py").read_text()
    for op in ("product_key_topk", "weighted_gather", "grouped_linear"):
        assert f"torch.ops.memforge.{op}.default" in graph
    for text in (graph, (out / "manifest.json").read_text(), (out / "plan.json").read_text()):
        assert str(tmp_path) not in text
        assert str(REPO) not in text


def test_two_builds_are_byte_identical_where_the_manifest_says_so(small: Path, tmp_path: Path) -> None:
    plan = make_plan(load_spec(small))
    manifests = [write_build(plan, tmp_path / name) for name in ("a", "b")]
    for name, record in manifests[0]["files"].items():
        if record["byte_identical"]:
            assert record["sha256"] == manifests[1]["files"][name]["sha256"], name


def test_the_saved_graph_loads_and_has_dynamic_shapes(small: Path, tmp_path: Path) -> None:
    write_build(make_plan(load_spec(small)), tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert program.graph_signature.user_inputs
    for shape in ((1, 5), (3, 96)):
        tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
        assert program.module()(tokens)[0].shape == (*shape, 300)


def test_the_exported_graph_computes_what_the_model_computes(small: Path) -> None:
    plan = make_plan(load_spec(small)).model
    model = build_model(plan, seed=4).eval()
    program = torch.export.export(
        model, (torch.zeros(2, 4, dtype=torch.int64),), dynamic_shapes=({0: torch.export.Dim("b")},)
    )
    tokens = torch.arange(12).view(3, 4)
    assert torch.equal(program.module()(tokens)[0], model(tokens)[0])
    assert len(export_graph(plan).graph.nodes) > 100


def test_a_model_that_differs_from_its_plan_is_refused(small: Path) -> None:
    plan = make_plan(load_spec(small)).model
    row = plan.params[0]
    wrong = plan.model_copy(update={"params": (row.model_copy(update={"shape": (299, 32)}), *plan.params[1:])})
    with pytest.raises(CheckFailedError, match="does not have the parameters of its plan"):
        require_exact(wrong)


def test_buffers_are_refused_until_the_plan_has_rows_for_them(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memforge.blocks.moe.module import Moe

    make = Moe.__init__

    def with_buffer(self: Moe, *args: object) -> None:
        make(self, *args)
        self.register_buffer("bias", torch.zeros(4))

    monkeypatch.setattr(Moe, "__init__", with_buffer)
    with pytest.raises(CheckFailedError, match=r"layers\.3\.moe\.bias"):
        require_exact(make_plan(load_spec(small)).model)


@pytest.mark.parametrize("what", ["file", "foreign", "manifest", "under-file", "link"])
def test_places_that_cannot_be_written_are_left_alone(small: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    if what == "file":
        target.write_text("mine")
    elif what == "foreign":
        write(target / "notes.txt", "mine")
    elif what == "manifest":
        write(target / "manifest.json", '{"my": "web application"}')
    elif what == "link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.write_text("mine")
        target = target / "deeper"
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    done = memforge("build", small, "--out", target)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_failed_build_keeps_the_one_before(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_spec(small))
    write_build(plan, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.export.save", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_build(plan, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.toml"]


def test_parity_that_fails_stops_the_build(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL)
    claim = '\n[parity]\nagainst = "dense.toml"\ntolerance = { params = 0.0 }\n'
    spec = write(tmp_path / "wide.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 64") + claim)
    done = memforge("build", spec, "--out", tmp_path / "out")
    assert (done.returncode, "params" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
    assert memforge("build", spec, "--out", tmp_path / "out", "--no-parity").returncode == 0


COMPILE = """
import sys, torch
from memforge import build_model, load_spec, make_plan
model = build_model(make_plan(load_spec(sys.argv[1])).model, seed=0).double().train()
tokens = torch.arange(2 * 16).view(2, 16)
outputs = []
for run in (model, torch.compile(model, fullgraph=True)):
    model.zero_grad()
    logits, losses = run(tokens)
    (logits.square().mean() + sum(losses.values())).backward()
    outputs.append([logits.detach(), *(p.grad for p in model.parameters())])
for eager, compiled in zip(*outputs, strict=True):
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)
print("agree")
"""


def test_inductor_compiles_the_whole_model_with_a_fresh_cache(small: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(small)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout == "agree\n", done.stderr[-2000:]
