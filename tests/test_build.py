"""The build directory, the exported graph and the compiled model."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, SMALL, memforge, write
from torch._dynamo.testing import CompileCounterWithBackend

from memforge.build import build_model
from memforge.cost import estimate
from memforge.errors import CheckFailedError, StorageError
from memforge.export.directory import FILES, write_build
from memforge.export.graph import export_graph, readable
from memforge.plan import make_plan, read_plan
from memforge.profile.counter import require_exact
from memforge.spec import load_spec
from memforge.storage import replaced_directory
from memforge.training.checkpoint import open_run

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


def under(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["sub", "sub/../sub", ".", "absent/../sub", "sub/."])
def test_a_build_is_replaced_however_its_directory_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write(tmp_path / "sub" / "file", "old").parent
    monkeypatch.chdir(target if name == "." else tmp_path)
    stands_in = Path().stat().st_ino
    with replaced_directory(Path(name)) as directory:
        (directory / "fresh").write_text("new")
    assert under(tmp_path) == {"sub/fresh": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]
    assert Path().resolve().stat().st_ino == stands_in  # who stands in it sees the new one


@pytest.mark.parametrize("name", ["sub", "."])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_directory_that_cannot_be_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, after: bool, nth: int
) -> None:
    target, rename, count = tmp_path / "sub", Path.rename, 0
    for file in ("a", "b"):
        write(target / file, f"old {file}")
    monkeypatch.chdir(target if name == "." else tmp_path)

    def fails_once(self: Path, destination: Path) -> Path:
        nonlocal count
        count += 1
        if count != nth + 1:
            return rename(self, destination)
        if after:
            rename(self, destination)
        raise error

    monkeypatch.setattr(Path, "rename", fails_once)
    before, caught = under(tmp_path), suppress(StorageError, KeyboardInterrupt)
    with caught, replaced_directory(Path(name)) as directory:
        for file in ("b", "c"):
            (directory / file).write_text("new")
    failed = nth < (4 if name == "." else 2)
    assert under(tmp_path) == (before if failed else {"sub/b": b"new", "sub/c": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]


def test_a_build_into_the_current_directory(small: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for _ in range(2):
        done = memforge("build", small, "--out", ".", cwd=empty)
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in empty.iterdir()) == sorted([*FILES, "manifest.json"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "small.toml"]


def test_a_build_is_reported_at_the_length_of_training(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL)
    spec = write(tmp_path / "claim.toml", SMALL + '\n[parity]\nagainst = "dense.toml"\n')
    write_build(make_plan(load_spec(spec)), tmp_path / "out")
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert (cost["seq_len"], cost["parity"]["seq_len"]) == (48, 48)
    assert cost["parity"]["axes"]["flops"]["value"] == cost["flops_per_token"]["total"]


def test_parity_that_fails_stops_the_build(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL)
    claim = '\n[parity]\nagainst = "dense.toml"\ntolerance = { params = 0.0 }\n'
    spec = write(tmp_path / "wide.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 64") + claim)
    done = memforge("build", spec, "--out", tmp_path / "out")
    assert (done.returncode, "params" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
    assert memforge("build", spec, "--out", tmp_path / "out", "--no-parity").returncode == 0


WITH_EVERY_KIND = SMALL.replace(
    "[data]",
    """\
[pool.neurons]
kind = "experts"
num_sub_keys = 6
dtype = "bfloat16"

[[place]]
layers = [1]
mode = "add"
block = { kind = "peer", pool = "neurons", num_heads = 2, top_k = 3, key_dim = 8 }

[[place]]
layers = [2]
mode = "add"
block = { kind = "moe", num_experts = 3, hidden_dim = 10, router = "expert_choice", num_shared_experts = 1 }

[[place]]
layers = [3]
mixer = { num_heads = 2, window = 4, rope_scaling = { kind = "yarn", factor = 2.0, original_max_seq_len = 48 } }

[data]""",
)

# Runs where importing memforge or its kernels fails.
ALONE = """
import sys
sys.modules["memforge"] = sys.modules["memforge_kernels"] = None
import torch
program = torch.export.load(sys.argv[1])
tokens = torch.load(sys.argv[2])
torch.save([program.module()(batch)[0] for batch in tokens], sys.argv[3])
"""


def run_alone(program: Path, batches: list[torch.Tensor], work: Path) -> list[torch.Tensor]:
    torch.save(batches, work / "tokens.pt")
    command = [sys.executable, "-c", ALONE, program, work / "tokens.pt", work / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stderr[-2000:]
    logits: list[torch.Tensor] = torch.load(work / "logits.pt")
    return logits


def test_the_aten_graph_runs_with_torch_alone(tmp_path: Path) -> None:
    spec = write(tmp_path / "all.toml", WITH_EVERY_KIND)
    done = memforge("build", spec, "--out", tmp_path / "out", "--emit", "aten", "--seed", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["aten"]["weights"] == "seed 5"
    plan = make_plan(load_spec(spec)).model
    assert {part.kind for part in plan.sublayers()} == {"attention", "ffn", "memory", "peer", "moe"}
    model = build_model(plan, seed=5).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(300, shape, generator=generator) for shape in ((1, 1), (2, 13), (5, 96))]
    with torch.no_grad():
        for alone, batch in zip(
            run_alone(tmp_path / "out" / "model.aten.pt2", batches, tmp_path), batches, strict=True
        ):
            torch.testing.assert_close(alone, model(batch)[0], rtol=1e-5, atol=1e-6)
    # A later build without it replaces the directory whole.
    assert memforge("build", spec, "--out", tmp_path / "out").returncode == 0
    assert not (tmp_path / "out" / "model.aten.pt2").exists()


def test_the_aten_graph_holds_the_weights_of_a_run(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert memforge("train", small, "--out", run).returncode == 0
    done = memforge("build", small, "--out", tmp_path / "out", "--emit", "aten", "--weights", run)
    assert done.returncode == 0, done.stderr
    assert "weights of step-00000004" in done.stdout
    _, model, _, _ = open_run(run, "cpu")
    tokens = torch.arange(20).view(2, 10)
    (alone,) = run_alone(tmp_path / "out" / "model.aten.pt2", [tokens], tmp_path)
    torch.testing.assert_close(alone, model(tokens)[0], rtol=1e-5, atol=1e-6)
    other = write(tmp_path / "other.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 47"))
    foreign = memforge("build", other, "--out", tmp_path / "no", "--emit", "aten", "--weights", run)
    assert (foreign.returncode, len(foreign.stderr.splitlines())) == (4, 1)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--emit", "onnx"], 2, "the one form is aten"),
        (["--plan-only", "--emit", "aten"], 2, "writes nothing"),
        (["--seed", "3"], 2, "--emit aten"),
        (["--emit", "aten", "--seed", "3", "--weights", "run"], 2, "give one of them"),
        (["--emit", "aten", "--weights", "absent"], 4, "no such run directory"),
        (["--emit", "aten", "--set", "pool.facts.num_sub_keys=60000"], 3, "3 copies of the weights takes"),
        (["--emit", "aten", "--set", "place.1.block.num_experts=300"], 2, "at most 256 experts, not 300"),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    small: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = memforge("build", small, "--out", tmp_path / "out", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_written_graph_is_python_with_shapes_and_block_paths(tmp_path: Path) -> None:
    plan = make_plan(load_spec(write(tmp_path / "all.toml", WITH_EVERY_KIND)))
    program = export_graph(plan.model)
    text = readable(program, plan.name)
    # It is the model: run as Python on real weights, it gives the same logits.
    names: dict[str, Any] = {}
    exec(compile(text, "graph.py", "exec"), names)
    model, tokens = build_model(plan.model, seed=2).eval(), torch.arange(34).view(2, 17)
    parameters = [model.get_parameter(path) for path in program.graph_signature.inputs_to_parameters.values()]
    with torch.no_grad():
        torch.testing.assert_close(names["forward"](*parameters, tokens)[0], model(tokens)[0])
    assert [line for line in text.splitlines() if "# layers.2.memory" in line]
    assert "tokens,  # i64[b, t]" in text
    assert re.search(
        r"= torch\.ops\.memforge\.weighted_gather\.default\(p_pool_facts_values, .*# f32\[b\*t, 32\]", text
    )
    assert re.search(r"return \(linear_\d+,\)\n$", text)


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_all_shapes_after_two_recompiles(tmp_path: Path, training: bool) -> None:
    plan = make_plan(load_spec(write(tmp_path / "all.toml", WITH_EVERY_KIND))).model
    model = build_model(plan, seed=1).train(training)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled, generator = torch.compile(model, fullgraph=True, backend=backend), torch.Generator().manual_seed(0)
    for shape in ((2, 8), (3, 8), (3, 16), (5, 11), (7, 30), (2, 9), (4, 96)):
        tokens = torch.randint(300, shape, generator=generator)
        torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])
    assert backend.frame_count <= 3


def test_a_plan_of_138_billion_parameters_needs_no_torch(tmp_path: Path) -> None:
    paper = REPO / "specs" / "paper"
    blocked = write(tmp_path / "torch.py", "raise ImportError('torch was imported')\n").parent
    for spec, change, params in (
        ("memory-plus-1.3b-64m", [], 138_747_680_768),
        ("memory-plus-8b", ["--set", "pool.facts.num_sub_keys=8192"], 282_782_363_648),
    ):
        done = memforge(
            "build", paper / f"{spec}.toml", "--plan-only", "--mesh", "dp_shard=8,memory=8", "--json", *change,
            PYTHONPATH=os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")]), cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        cost = json.loads(done.stdout)
        assert cost["params"]["total"] == params
        assert cost["mesh"]["ranks"] == 64
        assert cost["mesh"]["pool_params_per_rank"] * 8 == cost["pools"][0]["params"]
        # Pools are split by columns: each rank has the last step of all rows.
        moments = 8 * cost["mesh"]["params_per_rank"]
        assert cost["mesh"]["optimizer_bytes_per_rank"] == moments + 4 * cost["pools"][0]["rows"]
    assert not (tmp_path / "build").exists()


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
