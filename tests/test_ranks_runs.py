"""Runs of several ranks: saved on one mesh and taken up on another, stopped, killed, and left waiting."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, memforge, write
from made_ranks import on_ranks

from memforge.mesh import Mesh
from memforge.plan import make_plan, on_mesh, plan_from_json
from memforge.spec import load_spec

STEPS, HALF = 8, 4
# A pool of 32 columns over 3 ranks, 4 sequences over 3, revived sub-keys, an own pool: all that a checkpoint holds.
SPEC = SMALL.replace(
    'kind = "moe", num_experts = 4, top_k = 2, hidden_dim = 24',
    'kind = "peer", num_sub_keys = 6, num_heads = 2, top_k = 3, key_dim = 8',
)
KEYS = (
    f"train.steps={STEPS}",
    "train.compile=off",
    "train.revive_every=3",
    "train.value_update=catch_up",
    f"train.checkpoint_every={HALF}",
    "eval.every_steps=4",
    "eval.sample_tokens=2",
)


def planned(path: Path, mesh: Mesh, *overrides: str) -> str:
    spec = write(path / "s.toml", SPEC)
    return on_mesh(make_plan(load_spec(spec, overrides=(*KEYS, *overrides))), mesh).to_json()


def run_in_double(plan: str, run: str, resume: str | None, max_steps: int | None) -> None:
    """Train with weights and moments in fp64, which no spec asks for."""
    from memforge.training import ranks

    built = ranks.build_model
    ranks.build_model = lambda *args, **given: built(*args, **given).double()
    train(plan, run, resume, max_steps)


def train(plan: str, run: str, resume: str | None, max_steps: int | None) -> None:
    import memforge.training

    memforge.training.train(
        plan_from_json(plan, "the test"), Path(run), resume=resume, budget=memforge.training.Budget(max_steps=max_steps)
    )


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_saved_on_four_ranks_goes_on_on_any_number(tmp_path: Path) -> None:
    on_ranks(1, "test_ranks_runs:run_in_double", planned(tmp_path, Mesh()), str(tmp_path / "whole"), None, None)
    expected = rows(tmp_path / "whole")
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    four = tmp_path / "four"
    plan = planned(tmp_path, Mesh(dp_shard=2, memory=2), "parallel.pools=rows")
    on_ranks(4, "test_ranks_runs:run_in_double", plan, str(four), None, HALF)
    for mesh in (Mesh(), Mesh(memory=2), Mesh(dp_shard=3), Mesh(memory=3)):
        run = tmp_path / f"on-{mesh.dp_shard}-{mesh.memory}"
        shutil.copytree(four, run)
        on_ranks(mesh.ranks, "test_ranks_runs:run_in_double", planned(tmp_path, mesh), str(run), "auto", None)
        found = rows(run)
        assert [row.keys() for row in found] == [row.keys() for row in expected]
        for here, there in zip(found, expected, strict=True):
            for name in ("loss", "grad_norm", "held_out_loss"):
                if name in there:
                    assert abs(here[name] / there[name] - 1) <= 1e-10, (str(mesh), here["step"], name)
            # Counts of reads, which are sums over ranks; of weights in fp32. read_norm is the mean of those of passes.
            for name in here:
                if name.endswith(("slots_used", "slots_ever")):
                    assert here[name] == there[name], (str(mesh), here["step"], name)
                elif name.endswith(("entropy", "kl", "top_1pct", "moved")):
                    assert abs(here[name] - there[name]) <= 1e-4, (str(mesh), here["step"], name)


def test_a_rank_without_sequences_takes_part_in_all_that_ranks_do(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)  # whose router tells how it shares out tokens
    keys = (*KEYS, "train.steps=2", "train.batch_size=1", "parallel.timeout_minutes=0.25")
    plan = on_mesh(make_plan(load_spec(spec, overrides=keys)), Mesh(dp_shard=2)).to_json()
    on_ranks(2, "test_ranks_runs:train", plan, str(tmp_path / "run"), None, None)
    assert steps_left(tmp_path / "run") == ["step-00000002"]
    for row in rows(tmp_path / "run"):
        assert 1 <= row["layers.3.moe.load_max"] <= 4  # over the mean, of 4 experts
        assert row["layers.0.memory.read_norm"] > 0


@pytest.mark.parametrize("mesh", [Mesh(memory=2), pytest.param(Mesh(dp_shard=2), marks=pytest.mark.slow)], ids=str)
def test_a_run_taken_up_on_the_same_mesh_is_the_same_to_the_bit(tmp_path: Path, mesh: Mesh) -> None:
    plan = planned(tmp_path, mesh)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(2, "test_ranks_runs:train", plan, str(whole), None, None)
    on_ranks(2, "test_ranks_runs:train", plan, str(parts), None, HALF + 1)
    on_ranks(2, "test_ranks_runs:train", plan, str(parts), "auto", None)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    manifests = [json.loads((run / f"step-{STEPS:08d}" / "manifest.json").read_text()) for run in (whole, parts)]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert len(manifests[0]["files"]) == 2 + 2 + 1 + 1  # model and optimizer of both ranks, telemetry, revival


def started(path: Path, run: Path, ranks: int, *more: str, lost_grace: float | None = None) -> "subprocess.Popen[str]":
    run_as = ["-m", "memforge"]
    if lost_grace is not None:
        launched = f"launch(sys.argv[1:], {ranks}, lost_grace={lost_grace})"
        run_as = ["-c", f"import sys; from memforge.launch import launch; sys.exit({launched})"]
    command = [sys.executable, *run_as, "train", str(path), "--out", str(run), "--nproc", str(ranks)]
    given = [part for key in KEYS for part in ("--set", key)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *given, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


LONG = ("--set", "train.steps=400", "--set", "train.checkpoint_every=2", "--set", "eval.every_steps=1000")


def ranks_of(process: "subprocess.Popen[str]", run: Path, number: int, step: int = 2) -> list[int]:
    """The processes of the ranks, by rank, once the run has saved so many steps."""
    end = time.monotonic() + 120
    while not (run / f"step-{step:08d}" / "manifest.json").exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate()[1])
        time.sleep(0.05)
    found = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    by_rank = {}
    for pid in found:
        variables = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
        )
        by_rank[int(variables["RANK"])] = pid
    assert sorted(by_rank) == list(range(number))
    return [by_rank[rank] for rank in range(number)]


def steps_left(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


def killed_and_resumed(path: Path, run: Path, rng: random.Random) -> None:
    """Kill one of three ranks at a random moment; what is left goes on on two."""
    process = started(path, run, 3, *LONG)
    victim = rng.randrange(3)
    pid = ranks_of(process, run, 3)[victim]
    time.sleep(rng.uniform(0, 1))
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 3, errors
    assert f"rank {victim} (process {pid}) was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    last = max(int(name.removeprefix("step-")) for name in steps_left(run))
    goal = last + 3
    resumed = started(path, run, 2, *LONG, "--resume", "auto", "--max-steps", str(goal))
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"going on from step {last}" in errors
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, goal + 1))


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    killed_and_resumed(write(tmp_path / "s.toml", SPEC), tmp_path / "run", random.Random(0))


@pytest.mark.slow
def test_twenty_killed_ranks(tmp_path: Path) -> None:
    for seed in range(20):
        killed_and_resumed(write(tmp_path / "s.toml", SPEC), tmp_path / f"run-{seed}", random.Random(100 + seed))


@pytest.mark.parametrize("who", ["all", "one"])
def test_a_signal_to_any_rank_saves_the_same_step_on_all(tmp_path: Path, who: str) -> None:
    run = tmp_path / "run"
    process = started(write(tmp_path / "s.toml", SPEC), run, 2, *LONG, "--set", "train.checkpoint_every=2")
    pids = ranks_of(process, run, 2)
    os.kill(process.pid if who == "all" else pids[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 143, errors
    told = [line for line in errors.splitlines() if line.startswith("interrupted; saved")]
    assert len(told) == 1
    last = steps_left(run)[-1]
    assert told[0].endswith(last)
    manifest = json.loads((run / last / "manifest.json").read_text())
    assert sorted(name for name in manifest["files"] if name.startswith("model")) == [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]


def test_a_rank_that_hangs_is_waited_for_only_so_long(tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write(tmp_path / "s.toml", SPEC)
    process = started(path, run, 2, *LONG, "--set", "parallel.timeout_minutes=0.15", lost_grace=2)
    pids = ranks_of(process, run, 2)
    os.kill(pids[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "rank 0 has lost another rank: Timed out waiting 9000ms" in errors
    assert f"rank 1 (process {pids[1]}) did not answer and was killed" in errors


@pytest.mark.parametrize(
    ("pools", "parts"),
    [("columns", "32 columns"), ("rows", "36 rows"), ("auto", "32 columns and the 36 rows")],
)
def test_a_mesh_whose_ranks_are_too_many_for_a_pool_is_refused_in_one_line(
    tmp_path: Path, pools: str, parts: str
) -> None:
    path, run = write(tmp_path / "s.toml", SPEC), tmp_path / "run"
    given = ("--mesh", "memory=37", "--nproc", 37, "--set", f"parallel.pools={pools}", "--out", run)
    done = memforge("train", path, *given)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"memory=37 is more than the {parts} of " in done.stderr
    assert not run.exists()


def test_a_mesh_that_is_not_the_ranks_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", SPEC)
    process = started(path, tmp_path / "run", 2, "--mesh", "memory=3")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, len(errors.splitlines())) == (2, 1)
    assert "memory=3 are 3 ranks, and 2 ranks were started" in errors
    assert not (tmp_path / "run").exists()
