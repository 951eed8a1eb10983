"""The experiment of benchmarks/facts on a fixture: every stage by its command, and the report it writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, write
from made_experiment import EXPERIMENT, MADE, experiment_in

from benchmarks.facts.experiment import read_experiment
from benchmarks.facts.jobs import Jobs
from benchmarks.facts.records import Record, Records, read_record, record_of
from benchmarks.facts.runner import Runner, TrainingFailedError, commit_of
from memforge.report.run import read_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return experiment_in(tmp_path)


def facts(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.facts", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_an_experiment_is_run_in_pieces_reported_and_repeated(file: Path, tmp_path: Path) -> None:
    first = facts("run", file, "--minutes", "0", cwd=tmp_path)
    assert (first.returncode, first.stderr.splitlines()[-1]) == (
        0,
        "0 done, 11 left: the same command goes on",
    )
    early = facts("brief", file, cwd=tmp_path)
    assert (early.returncode, early.stderr) == (2, f"error: {file}: no run of the main study is finished\n")
    done = facts("run", file, "--at-once", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "results" / "fixture"
    names = sorted(path.stem for path in (out / "runs").glob("*.json"))
    # The point of 20 facts is that of the other studies, and is trained once.
    assert names == sorted(
        [
            *(f"search.{arm}.{i}" for arm in ("plain", "table") for i in (0, 1)),
            *(f"{arm}.seed-{seed}" for arm in ("plain", "table", "table-large") for seed in (1, 2)),
            "table.data.num_facts-12.seed-1",
        ]
    )
    left = {path.name for path in (tmp_path / "runs" / "facts" / "fixture").iterdir()}
    assert left == {".lock"}, "runs that are recorded are not kept"

    record = read_record(out / "runs" / "table.seed-1.json")
    assert record.slots == 64
    assert [row["step"] for row in record.curve] == [2, 3]
    assert record.curve[-1]["recall"] == record.final["recall"]
    assert 0 <= record.final["recall.unseen"] <= 1
    assert record.settings["train.value_learning_rate"] in (1e-2, 1e-1)
    trials = [read_record(out / "runs" / f"search.table.{i}.json") for i in (0, 1)]
    best = min(trials, key=lambda trial: trial.final["held_out_loss"])
    assert record.settings["train.value_learning_rate"] == best.settings["train.value_learning_rate"]

    page = (out / "report.md").read_text()
    assert "Not finished" not in page
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[2] == "## What is not decided"
    assert headings[7:16] == [
        *("## All of them", "### Recall by FLOPs", "### Over training", "### Over slots, or none"),
        *("## counts", "### Over tokens", "## sizes", "### Sizes", "### Over slots"),
    ]
    guesses = [line.split(" | ")[:2] for line in page.partition("## counts")[2].splitlines() if "no model" in line]
    assert [guess[1] for guess in guesses[:2]] == ["12", "20"]
    ours, theirs = (
        np.mean([read_record(out / "runs" / f"{arm}.seed-{seed}.json").final["recall"] for seed in (1, 2)])
        for arm in ("table", "plain")
    )
    assert f"| Does a table beat none? | undecided | {100 * (ours - theirs):+.1f} [" in page
    assert "Table \\| of 64" in page
    _, _, costs = page.partition("## What a small one as good costs\n\n")
    assert costs.startswith("| arm | recall, rare phrasings | by recall, rare phrasings | seeds | by NLL per answer ")
    assert [line.split(" | ")[0] for line in costs.splitlines()[2:4]] == ["| Table of 100", ""]
    assert "geometric means and 95% intervals over seeds. In the paper: 4." in costs
    assert "Table | of 64: 64 rows." in page
    assert "one line" in (out / "flops.svg").read_text()
    assert "none of 20" in (out / "counts.svg").read_text()
    assert "without slots" not in (out / "slots.svg").read_text()
    assert re.search(r"\*\*It was tried:\*\* \d+\.\d% ± \d+\.\d% against \d\.\d{3}\.", page)
    assert {path.stem for path in out.glob("*.svg")} == {"flops", "course", "sizes", "slots", "counts"}
    brief = facts("brief", file, cwd=tmp_path).stdout.splitlines()
    arms = [line.split(" | ")[0] for line in brief if line.startswith("|")][2:]
    assert arms == ["| Plain", "| Table \\| of 64", "| Table of 100", "| no model: majority"]
    assert brief[0].endswith(" | FLOPs of a small one as good / its own |")
    assert brief[0].startswith("| arm | params | FLOPs / Plain | forward FLOPs / Plain | time / Plain | recall |")
    assert f"{100 * ours:.1f}% ±" in brief[3]
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "flops.svg").write_text("of what was found before")
    (out / "figure-that-was-renamed.svg").write_text("of what was found before")
    assert facts("report", file, cwd=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    again = facts("repeat", file, "--count", "1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.splitlines()[0] == "1 of 11 runs that were made here, of 11 in all"
    assert again.stdout.count(": the same, ") == 1
    altered = out / "runs" / f"{again.stdout.partition(':')[0]}.json"
    there = json.loads(altered.read_text())
    altered.write_text(json.dumps(there | {"curve": []}))
    again = facts("repeat", file, "--count", "1", cwd=tmp_path)
    assert again.returncode == 1
    assert ": DIFFERENT: curve (see " in again.stdout
    kept = tmp_path / "runs" / "facts" / "fixture" / "repeated" / "different" / altered.name
    assert read_record(kept).curve == Record.model_validate(there).curve
    assert again.stderr.splitlines()[-1] == f"error: not what was found before: {altered.stem}"
    for path in (out / "runs").iterdir():
        there = json.loads(path.read_text())
        path.write_text(json.dumps(there | {"made": there["made"] | {"cpu": "another"}}))
    elsewhere = facts("repeat", file, cwd=tmp_path)
    assert elsewhere.returncode == 2
    assert elsewhere.stderr == (
        f"error: {file}: of 11 finished runs none was made with this processor and these packages\n"
    )


def test_an_interrupted_experiment_goes_on_where_it_was(file: Path, tmp_path: Path) -> None:
    long = ('"eval.every_steps" = 2', '"eval.every_steps" = 500\n"train.log_every" = 1')
    write(file, EXPERIMENT.replace(*long).replace('"train.steps" = 2', '"train.steps" = 100000'))
    command = [sys.executable, "-m", "benchmarks.facts", "run", str(file), "--at-once", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True
    )
    runs = [tmp_path / "runs" / "facts" / "fixture" / f"search.plain.{i}" for i in (0, 1)]
    for speed in (run / "speed.jsonl" for run in runs):
        while not (speed.exists() and speed.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
    second = facts("run", file, cwd=tmp_path)
    assert second.returncode == 2
    assert f"another process runs this experiment: {process.pid}, or trainings" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "error: search.plain.0, search.plain.1: interrupted; the same command goes on with them" in errors
    before = [last_step(run) for run in runs]
    assert facts("run", file, "--minutes", "0.02", "--at-once", "2", cwd=tmp_path).returncode == 0
    assert all(last_step(run) > steps for run, steps in zip(runs, before, strict=True))


def last_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def test_a_run_that_diverged_has_no_score(file: Path, tmp_path: Path) -> None:
    jobs, records = Jobs(read_experiment(file), file.parent), Records(tmp_path / "records")
    (tmp_path / "scratch").mkdir()
    runner, job = Runner(jobs, records, tmp_path / "scratch"), jobs.trials("plain")[0]
    well = next(runner.train(lambda: ("", [job])))
    assert well.figure("recall") is not None
    run = read_run(tmp_path / "scratch" / job.name)
    assert run.summary is not None
    ended = replace(run, summary=run.summary.model_copy(update={"ended": "non-finite"}))
    found = record_of(job, ended, MADE)
    assert (found.ended, found.final) == ("non-finite", {})
    assert (found.figure("recall"), found.figure("recalled_bits")) == (None, None)
    # What has finished and was not yet recorded is taken up, not trained again.
    again = next(runner.train(lambda: ("", [job])))
    assert again.differences(well) == []
    assert (again.made["seconds"], again.made["commit"]) == (well.made["seconds"], well.made["commit"])


def test_what_was_begun_otherwise_is_begun_again(file: Path, tmp_path: Path) -> None:
    jobs, records = Jobs(read_experiment(file), file.parent), Records(tmp_path / "records")
    runner, job = Runner(jobs, records, tmp_path / "scratch"), jobs.trials("plain")[0]
    out, _, note = runner.left_by(job)
    runner.scratch.mkdir()
    next(runner.train(lambda: ("", [job])))
    begun = json.loads(note.read_text())
    note.write_text(json.dumps(begun | {"commits": ["before"]}))
    (out / "mark").write_text("")
    gone_on = next(runner.train(lambda: ("", [job])))
    assert gone_on.made["commit"].split(", ") == ["before", *begun["commits"]]
    assert (out / "mark").exists()
    for other in ({"python": "3.0"}, {"fingerprint": "0"}):
        note.write_text(json.dumps(begun | {"with": begun["with"] | other}))
        assert next(runner.train(lambda: ("", [job]))).made["commit"] == begun["commits"][0]
        assert not (out / "mark").exists()
        (out / "mark").write_text("")


def test_a_training_that_fails_is_named_with_what_it_said(file: Path, tmp_path: Path) -> None:
    jobs = Jobs(read_experiment(file), file.parent)
    runner, job = Runner(jobs, Records(tmp_path / "records"), tmp_path), jobs.trials("plain")[0]
    job.plan()
    job.spec.write_text("[model")
    with pytest.raises(TrainingFailedError, match=r"search\.plain\.0: memforge train ended with 2: .*plain\.toml"):
        next(runner.train(lambda: ("", [job])))


def test_where_nothing_can_be_written_is_one_line(file: Path, tmp_path: Path) -> None:
    write(tmp_path / "taken", "")
    for command in ("report", "run"):
        done = facts(command, file, "--out", tmp_path / "taken" / "out", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (4, f"error: {tmp_path / 'taken' / 'out'}: Not a directory\n")


def test_a_run_says_what_code_it_was_begun_with(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    write(tmp_path / "a.py", "a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "--short", "HEAD")
    assert commit_of(tmp_path) == commit
    write(tmp_path / "a.py", "a = 2\n")
    assert commit_of(tmp_path) == f"{commit}-dirty"
