"""The Triton kernels without a GPU: right in the interpreter, and compiled for the targets they are meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = (
    "gather",
    "dot",
    "topk_scores",
    "topk_ties",
    "sums",
    "only_long_segments_have_pieces",
    "adamw",
    "sgd",
    "random_rounding",
    "repeated_runs_agree",
    "every_config_agrees",
    "offsets_are_64_bit",
    "bytes_of_gather",
    "bytes_of_dot",
    "bytes_of_adamw",
    "bytes_of_topk",
)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Registers that a kernel may use on any target, a tenth above what the shipped configs use.
REGISTERS = {
    "weighted_gather": 102,
    "gather_dot": 84,
    "product_key_topk.halves": 142,
    "product_key_topk.pairs": 70,
    "row_update.segment_sum": 74,
    "row_update.squared_norm": 74,
    "row_update.adamw": 142,
    "row_update.sgd": 104,
}
COMPILED = """
import json, sys, torch
from memforge_kernels import offline, tuning
target, float32, bfloat16 = sys.argv[1], torch.float32, torch.bfloat16
shapes = [(op, 1024, dtype) for op in tuning.OPS for dtype in (float32, bfloat16)]
shapes += [(op, 256, dtype) for op in tuning.OPS if not op.startswith("product_key") for dtype in (float32, bfloat16)]
# A width that 8 divides and 16 does not, one that nothing does, and rows so narrow that many share a block.
shapes += [("weighted_gather", 1000, bfloat16), ("weighted_gather", 13, bfloat16), ("row_update.adamw", 64, float32)]
records = []
for op, width, dtype in shapes:
    k = 2 if op.startswith("row_update") else 32
    if dtype == float32 or op not in ("product_key_topk.pairs", "row_update.segment_sum", "row_update.squared_norm"):
        config = tuning.lookup(op, tuning.Key(4096, width, k, dtype), target)
        records.append(offline.compile_kernel(op, config, dtype, target, width=width, k=k))
print(json.dumps(records))
"""


def run(*command: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env={**os.environ, **env},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("check", CHECKS)
def test_the_interpreter_agrees(check: str, tmp_path: Path) -> None:
    run("interpreted_checks.py", check, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))


def test_every_check_is_run() -> None:
    code = "import interpreted_checks as c; print(*(check.__name__ for check in c.CHECKS))"
    assert tuple(run("-c", code, TRITON_INTERPRET="1").split()) == CHECKS


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_within_their_limits(target: str, tmp_path: Path) -> None:
    """No spills, no atomics, registers below a ceiling, and bulk loads of 128 bits where rows start on 16 bytes."""
    records = json.loads(run("-c", COMPILED, target, TRITON_CACHE_DIR=str(tmp_path)))
    assert {record["op"] for record in records} == set(REGISTERS)
    for record in records:
        assert record["spill_bytes"] == 0, record
        assert record["instructions"]["atomic"] == 0, record
        assert record["registers"] <= REGISTERS[record["op"]], record
        assert record["occupancy"] >= 0.25, record
        if record["width"] == 13:
            assert record["wide_share"] == 0, record
        elif record["op"] != "product_key_topk.pairs":
            assert record["wide_share"] >= 0.9, record


def test_a_missing_tool_is_named() -> None:
    code = """
import memforge_kernels.machine_code as m
m.triton.__file__ = "/nowhere/triton/__init__.py"
try:
    m.check_tools("sm_90")
except m.ToolMissing as missing:
    assert isinstance(missing, RuntimeError)
    print(missing.tool, missing)
"""
    assert run("-c", code, PATH="/nowhere").startswith("ptxas ptxas is not in")
