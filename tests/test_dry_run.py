"""A rank among many, walked through without memory: what it holds is what the ledger says."""

import json
from pathlib import Path

import pytest
from conftest import REPO, memforge

PAPER = REPO / "specs" / "paper"


def walked(*arguments: object) -> dict[str, dict[str, int]]:
    done = memforge("train", *arguments, "--dry-run", "--json", "--no-parity")
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_a_model_of_138_billion_parameters_on_64_ranks() -> None:
    given = ("--world-size", 64, "--set", "parallel.memory=64")
    found = walked(PAPER / "memory-plus-1.3b-64m.toml", *given)
    assert found["walked"]["params"] == found["ledger"]["params"]
    assert found["walked"]["weights"] == found["ledger"]["weights"]
    # The number of steps is a scalar for each dense parameter.
    assert 0 <= found["walked"]["optimizer"] - found["ledger"]["optimizer"] < 10_000
    assert abs(found["walked"]["peak"] / found["ledger"]["peak"] - 1) <= 0.05


@pytest.mark.parametrize("mesh", ["memory=2", "dp_replicate=2"])
@pytest.mark.parametrize(
    "update",
    [
        {"value_update": "lazy_row_step"},
        {"value_update": "catch_up"},
        {"value_update": "dense"},
        {"value_optimizer": "sgd"},
        {"value_update": "catch_up", "dtype": "bfloat16"},
        {"value_optimizer": "sgd", "dtype": "bfloat16"},
        {"value_rounding": "stochastic", "dtype": "bfloat16"},
    ],
    ids=lambda update: "-".join(update.values()),
)
def test_what_each_way_of_updating_pools_keeps_is_counted(mesh: str, update: dict[str, str]) -> None:
    keys = {key: f"{'pool.facts' if key == 'dtype' else 'train'}.{key}={value}" for key, value in update.items()}
    given = [argument for assigned in keys.values() for argument in ("--set", assigned)]
    found = walked(REPO / "specs" / "demo" / "memory.toml", "--mesh", mesh, *given, "--set", "train.batch_size=64")
    # A count of steps for each dense parameter, and what catch_up knows of each step.
    assert 0 <= found["walked"]["optimizer"] - found["ledger"]["optimizer"] < 500
    assert abs(found["walked"]["peak"] / found["ledger"]["peak"] - 1) <= 0.1


@pytest.mark.parametrize("mesh", ["dp_shard=8", "dp_replicate=2,dp_shard=2,memory=2", "memory=8"])
@pytest.mark.parametrize("pools", ["columns", "rows"])
def test_small_ranks_hold_what_the_ledger_says(mesh: str, pools: str) -> None:
    spec = REPO / "specs" / "demo" / "memory.toml"
    found = walked(spec, "--mesh", mesh, "--set", f"parallel.pools={pools}", "--set", "train.batch_size=64")
    assert found["walked"]["weights"] == found["ledger"]["weights"]
    assert abs(found["walked"]["peak"] / found["ledger"]["peak"] - 1) <= 0.1


def test_options_of_a_dry_run_are_refused_without_it(tmp_path: Path) -> None:
    spec = REPO / "specs" / "demo" / "memory.toml"
    for options in (("--world-size", "4"), ("--rank", "1"), ("--dry-run", "--world-size", "4", "--rank", "4")):
        done = memforge("train", spec, *options, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
