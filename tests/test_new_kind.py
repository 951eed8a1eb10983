"""A kind of another package, registered by one entry point, gets everything the built-in ones have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, SMALL, memforge, write

TOY = str(Path(__file__).parent / "toy")
SPEC = SMALL.replace(
    "[data]",
    """\
[pool.more]
kind = "rows"
num_rows = 5

[[place]]
layers = [1]
block = { kind = "scale", start = 0.5 }

[[place]]
layers = [1]
mode = "add"
block = { kind = "fetch", source = "more" }

[data]""",
)


@pytest.fixture
def path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([TOY, os.environ.get("PYTHONPATH", "")])}


def test_schema_errors_profile_build_and_training_know_it(tmp_path: Path, path: dict[str, str]) -> None:
    assert "initial scale" in memforge("schema", **path).stdout
    assert "### `scale`: scaled channels, mixed once" in memforge("schema", "--markdown", **path).stdout
    wrong = memforge("check", write(tmp_path / "wrong.toml", SPEC.replace("start", "strat")), **path)
    assert "did you mean `start`?" in wrong.stderr
    spec = write(tmp_path / "toy.toml", SPEC)
    cost = json.loads(memforge("profile", spec, "--json", **path).stdout)
    assert cost["params"]["by_kind"]["scale"] == 32 + 32 * 32
    assert cost["flops_per_token"]["by_kind"]["scale"] == 6 * 32 * 32
    # A pool of another kind stands beside [pool.facts], which still says no kind and holds values.
    assert [(pool["path"], pool["params"], pool["readers"]) for pool in cost["pools"]] == [
        ("pool.facts", 64 * 32, ["layers.0.memory", "layers.2.memory"]),
        ("pool.more", 5 * 32, ["layers.1.fetch"]),
    ]
    unnamed = memforge("check", write(tmp_path / "pool.toml", SPEC.replace('"more"', '"mor"')), **path)
    assert "no pool named `mor`" in unnamed.stderr
    built = memforge("build", spec, "--out", tmp_path / "out", **path)
    assert built.returncode == 0, built.stderr
    assert "layers_1_scale_mix_weight" in (tmp_path / "out" / "graph.py").read_text()
    trained = memforge("train", spec, "--out", tmp_path / "run", "--set", "train.steps=2", **path)
    assert trained.returncode == 0, trained.stderr
    # Where the package is not installed, the kind is unknown.
    assert "unknown kind `scale`" in memforge("check", spec).stderr


def test_the_contract_tests_cover_it(path: dict[str, str]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(REPO / "tests" / "test_blocks_contract.py"),
            "-k",
            "scale or rows-0 or (free_of_torch and rows)",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        env={**os.environ, **path},
    )
    assert done.returncode == 0, done.stdout[-2000:]
    # Twelve cases for each of three examples, and two specs that are free of torch.
    assert "38 passed" in done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("absent_module:KIND", "cannot be loaded"),
        ("json:dumps", "is not a Kind"),
        ("memforge.blocks.ffn.spec:KIND", "two installed packages define"),
    ],
)
def test_a_broken_plug_in_is_named(tmp_path: Path, target: str, message: str) -> None:
    write(tmp_path / "broken-0.1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    write(tmp_path / "broken-0.1.dist-info" / "entry_points.txt", f"[memforge.blocks]\nbroken = {target}\n")
    done = memforge("schema", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 3
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
