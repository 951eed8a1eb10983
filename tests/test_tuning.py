"""Configs: what is looked up where, and what becomes of a table that cannot be trusted."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from memforge_kernels import tuning
from memforge_kernels.tuning import Config, Key

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ODD = [Key(1, 1, 1, torch.float32), Key(7, 13, 5, torch.bfloat16), Key(10**6, 1536, 48, torch.float16)]
BF16 = Key(4096, 1024, 32, torch.bfloat16)
GOOD = {"config": {"BLOCK_K": 4, "BLOCK_V": 128, "num_warps": 2, "num_stages": 1}}


def write_table(root: Path, **changes: object) -> Path:
    """A table of sm_90 with GOOD for BF16, and fields changed."""
    entries = {"weighted_gather": {str(BF16): GOOD}}
    table = {"format": 1, "target": "sm_90", "kernel_sha256": "0" * 64, "entries": entries, **changes}
    file = root / "sm_90" / "weighted_gather.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))
    return file


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables of its own, whose kernels have a hash of zeros."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(tuning, "kernel_sha256", lambda op: "0" * 64)
    return tmp_path


@pytest.mark.parametrize("op", tuning.OPS)
@pytest.mark.parametrize("key", [*ODD, BF16], ids=str)
def test_defaults_fit_every_shape(op: str, key: Key) -> None:
    config = tuning.default(op, key)
    assert config == tuning.default(op, key)
    assert Config.from_dict(config.as_dict()) == config
    assert 1 <= len(tuning.candidates(op, key)) <= 13
    assert tuning.candidates(op, key)[0] == config
    if op == "gather_dot":
        assert all(c["BLOCK_V"] >= key.width for c in tuning.candidates(op, key))
    if op == "product_key_topk.halves":
        assert all(c["BLOCK_S"] >= key.k for c in tuning.candidates(op, key))


def test_a_key_is_looked_up_itself_then_in_its_bucket_then_the_default_is_used(tables: Path) -> None:
    exact = Key(3000, 1000, 30, torch.float16)
    assert exact.bucket == BF16
    own = {"config": {"BLOCK_K": 2, "BLOCK_V": 64, "num_warps": 1, "num_stages": 1}}
    write_table(tables, entries={"weighted_gather": {str(exact): own, str(BF16): GOOD}})
    found = [
        tuning.lookup("weighted_gather", key, "sm_90")
        for key in (exact, exact._replace(n=10**6), exact._replace(width=2000))
    ]
    assert [config["BLOCK_K"] for config in found[:2]] == [2, 4]
    assert found[2] == tuning.default("weighted_gather", exact._replace(width=2000))
    assert tuning.config("weighted_gather", exact, torch.device("cpu")) == tuning.default("weighted_gather", exact)


BAD = {
    "of a newer format": {"format": 2},
    "of another device": {"target": "sm_80"},
    "of another kernel": {"kernel_sha256": "1" * 64},
    "without entries": {"entries": None},
    "with a tile of another kernel": {"entries": {"weighted_gather": {str(BF16): {"config": {"BLOCK_U": 4}}}}},
    "with an odd tile": {"entries": {"weighted_gather": {str(BF16): {"config": {**GOOD["config"], "BLOCK_K": 3}}}}},
    "of an unknown op": {"entries": {"weighted_gathers": {str(BF16): GOOD}}},
}
DAMAGED = {"cut off": b'{"format": 1, "tar', "not a table": b"[1, 2]", "not text": b"\x80", "empty": b""}


@pytest.mark.parametrize("why", [*BAD, *DAMAGED])
def test_a_bad_table_is_ignored_with_one_warning(why: str, tables: Path) -> None:
    file = write_table(tables, **BAD.get(why, {}))
    if why in DAMAGED:
        file.write_bytes(DAMAGED[why])
    with pytest.warns(RuntimeWarning, match=r"weighted_gather\.json is ignored and default configs are used") as caught:
        found = [tuning.lookup("weighted_gather", key, "sm_90") for key in (BF16, *ODD)]
    assert len(caught) == 1
    assert found == [tuning.default("weighted_gather", key, "sm_90") for key in (BF16, *ODD)]


def test_a_device_without_tables_has_defaults_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.lookup("weighted_gather", BF16, "sm_86") == tuning.default("weighted_gather", BF16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", sorted({op.partition(".")[0] for op in tuning.OPS}))
def test_shipped_tables_are_fresh_and_whole(op: str, target: str) -> None:
    """A change of kernel.py makes them stale: tune_static and write_tables make them anew."""
    table = json.loads((tuning.TUNED / target / f"{op}.json").read_text())
    assert table["kernel_sha256"] == tuning.kernel_sha256(op)
    assert (table["format"], table["op"], table["target"]) == (tuning.FORMAT, op, target)
    assert table["provenance"] in ("static", "measured")
    for name in [name for name in tuning.OPS if name.partition(".")[0] == op]:
        assert list(table["entries"][name]) == [str(key) for key in tuning.buckets(name)]
        for key in tuning.buckets(name):
            entry = table["entries"][name][str(key)]
            timed = table["provenance"] == "measured"
            assert (entry["ms"] is not None) == (entry["default_ms"] is not None) == timed
            assert tuning.lookup(name, key, target).as_dict() == entry["config"]
            assert tuning.lookup(name, key, target) in tuning.candidates(name, key, target)


def test_tables_are_written_one_entry_to_a_line_and_read_back(tmp_path: Path) -> None:
    choices = {("gather_dot", key): tuning.Choice(tuning.default("gather_dot", key), 0.5, 1.0) for key in ODD}
    choices |= {("row_update.sgd", key): tuning.Choice(tuning.default("row_update.sgd", key)) for key in ODD}
    tables = tuning._tables(choices, "sm_90", "measured", device="a GPU")
    files = tuning.write_tables(tables, tmp_path)
    assert [file.name for file in files] == [f"{t['op']}.json" for t in tables]
    dot = next(file for file in files if file.stem == "gather_dot")
    assert json.loads(dot.read_text()) == next(table for table in tables if table["op"] == "gather_dot")
    assert sum('"config"' in line for line in dot.read_text().splitlines()) == len(ODD)
    assert tuning.read_table(dot, "sm_90") == {
        "gather_dot": {str(key): tuning.default("gather_dot", key) for key in ODD}
    }


TRIALS = """
import torch
from memforge_kernels import tuning
from memforge_kernels.trials import trial
from memforge_kernels.tuning import Key
for op in tuning.OPS:
    key = Key(4, 12, 3, torch.bfloat16 if op != "product_key_topk.pairs" else torch.float32)
    tried = trial(op, key, torch.device("cpu"))
    config = tuning.default(op, key)
    assert tried.agrees(config), op
    tried.run(config)
print("agree")
"""


def test_a_config_is_tried_against_float64_before_it_is_timed() -> None:
    """What tune_measured does on a device, in the interpreter, but for the timing."""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", "import interpreted_builder\n" + TRIALS],
        capture_output=True,
        text=True,
        check=False,
        cwd=tests,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout == "agree\n", done.stderr[-2000:]
