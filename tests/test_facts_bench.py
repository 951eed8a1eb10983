"""The experiment of benchmarks/facts on a fixture: every stage by its command, and the report it writes."""

import json
import math
import os
import random
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

from benchmarks.facts.answers import Price
from benchmarks.facts.corpora import require, sha256
from benchmarks.facts.experiment import Settings, read_experiment
from benchmarks.facts.found import Found
from benchmarks.facts.jobs import Jobs, plan_of
from benchmarks.facts.records import Records, read_record, record_of
from benchmarks.facts.runner import Runner, commit_of, state
from benchmarks.facts.shown import told_settings
from memforge.errors import CheckFailedError, DeviceError, StorageError, UsageError
from memforge.report.run import read_run

DENSE = """\
[model]
name = "plain"
dim = 16
num_layers = 2
vocab_size = 300
max_seq_len = 96

[attention]
num_heads = 2

[ffn]
hidden_dim = 40

[data]
kind = "facts"
num_facts = 20
rare_share = 0.2

[train]
steps = 3
batch_size = 2
learning_rate = 1e-2
compile = "off"

[eval]
max_prompts = 8
sample_tokens = 0
"""
MEMORY = """\
extends = "plain.toml"

[model]
name = "table"

[[place]]
layers = "middle"
block = { kind = "memory", num_sub_keys = 8, num_heads = 1, top_k = 2, key_dim = 8 }
"""
EXPERIMENT = """\
name = "fixture"
title = "A fixture"
baseline = "plain"
tolerance = 0.2
threads = 1

[set]
"data.num_facts" = 20
"data.num_unseen" = 5
"eval.every_steps" = 2

[search]
trials = 2
seed = 9
measure = "held_out_loss"
best = "least"
set = { "data.num_facts" = 10, "data.num_unseen" = 0, "train.steps" = 2 }

[arm.plain]
spec = "plain.toml"
label = "Plain"
search = [{ "train.learning_rate" = 1e-3 }, { "train.learning_rate" = 1e-2 }]

[arm.table]
spec = "table.toml"
label = "Table | of 64"
note = "64 rows."
search = { "train.value_learning_rate" = [1e-2, 1e-1] }

[arm.table-large]
spec = "table.toml"
label = "Table of 100"
set = { "place.0.block.num_sub_keys" = 10 }
tuned_as = "table"

[study.core]
title = "All of them"
arms = ["plain", "table", "table-large"]
seeds = [1, 2]

[study.counts]
arms = ["table"]
seeds = [1]
vary = { "data.num_facts" = [12, 20] }

[study.sizes]
arms = ["table", "table-large"]
seeds = [1]

[[question]]
text = "Does a table beat none?"
study = "core"
arm = "table"
than = "plain"
paper = "4.0 against 3.0"
paper_says = "more"

[worth]
title = "a small one as good"
along = ["plain", "table"]
measure = "recall.rare"
paper = "4"

[figure.flops]
title = "Recall by FLOPs"
study = "core"
x = "flops_per_token"
y = "held_out_loss"
lines = { "one line" = ["plain", "table"] }

[figure.course]
title = "Over training"
study = "core"
x = "train_flops"
y = "recall"
join = "runs"

[figure.sizes]
title = "Over slots"
study = "sizes"
x = "slots"
y = "slots_used"
join = "study"

[figure.slots]
title = "Over slots, or none"
study = "core"
x = "slots"
y = "recall"

[ablation.sizes]
title = "Sizes"
study = "sizes"
paper_measure = "their loss"
paper = { table = "2.11", table-large = "2.10" }

[findings]
"It was tried:" = "{table recall} against {table.data.num_facts-12 held_out_loss}."
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "plain.toml", DENSE)
    write(tmp_path / "table.toml", MEMORY)
    return write(tmp_path / "fixture.toml", EXPERIMENT)


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
    assert not list((tmp_path / "runs" / "facts" / "fixture").glob("*seed*")), "runs that are recorded are not kept"

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
    assert headings[6:14] == [
        *("## All of them", "### Recall by FLOPs", "### Over training", "### Over slots, or none"),
        *("## counts", "## sizes", "### Sizes", "### Over slots"),
    ]
    guesses = [line.split(" | ")[:2] for line in page.partition("## counts")[2].splitlines() if "no model" in line]
    assert [guess[1] for guess in guesses[:2]] == ["12", "20"]
    ours, theirs = (
        np.mean([read_record(out / "runs" / f"{arm}.seed-{seed}.json").final["recall"] for seed in (1, 2)])
        for arm in ("table", "plain")
    )
    assert f"| Does a table beat none? | **undecided** | {100 * (ours - theirs):+.1f} [" in page
    assert "Table \\| of 64" in page
    _, _, costs = page.partition("## What a small one as good costs\n\n")
    assert costs.startswith("| arm | recall, rare phrasings | by recall, rare phrasings | seeds | by NLL per answer ")
    assert [line.split(" | ")[0] for line in costs.splitlines()[2:4]] == ["| Table of 100", ""]
    assert "geometric means and 95% intervals over seeds. In the paper: 4." in costs
    assert "Table | of 64: 64 rows." in page
    assert "one line" in (out / "flops.svg").read_text()
    assert re.search(r"\*\*It was tried:\*\* \d+\.\d% ± \d+\.\d% against \d\.\d{3}\.", page)
    assert {path.name for path in out.glob("*.svg")} == {"flops.svg", "course.svg", "sizes.svg", "slots.svg"}
    brief = facts("brief", file, cwd=tmp_path).stdout.splitlines()
    arms = [line.split(" | ")[0] for line in brief if line.startswith("|")][2:]
    assert arms == ["| Plain", "| Table \\| of 64", "| Table of 100", "| no model: majority"]
    assert brief[0].endswith(" | a small one as good, times its FLOPs |")
    assert f"{100 * ours:.1f}% ±" in brief[3]
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "flops.svg").write_text("of what was found before")
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
    assert ": DIFFERENT: curve, " in again.stdout
    assert again.stderr.splitlines()[-1] == f"error: not what was found before: {altered.stem}"
    for path in (out / "runs").iterdir():
        there = json.loads(path.read_text())
        path.write_text(json.dumps(there | {"made": there["made"] | {"cpu": "another"}}))
    elsewhere = facts("repeat", file, cwd=tmp_path)
    assert elsewhere.returncode == 2
    assert elsewhere.stderr == (
        f"error: {file}: of 11 finished runs none was made with this processor and these packages\n"
    )


def test_what_an_arm_is_worth_is_told_seed_by_seed_where_it_is_beyond_the_line() -> None:
    assert str(Price({1: 2.0, 2: 8.0}, 1.0, 8.0)).startswith("4.0 [")
    assert str(Price({1: 2.0}, 1.0, 8.0)) == "2.0"
    beyond = Price({1: 0.0, 2: math.inf, 3: 0.0}, 1.0, 8.0)
    assert str(beyond) == "less than 1.0 / more than 8.0"
    assert beyond.seeds == "less than 1.0, more than 8.0, less than 1.0"


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
    assert "another process runs this experiment" in second.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "error: search.plain.0, search.plain.1: interrupted; the same command goes on with them" in errors
    before = [last_step(run) for run in runs]
    assert facts("run", file, "--minutes", "0.02", "--at-once", "2", cwd=tmp_path).returncode == 0
    assert all(last_step(run) > steps for run, steps in zip(runs, before, strict=True))


def last_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def made(file: Path) -> tuple[Jobs, Records]:
    """The experiment with records that were not trained."""
    experiment = read_experiment(file)
    jobs, records = Jobs(experiment, file.parent), Records(file.parent / "records")
    while (now := state(jobs, records)).left:
        for job in now.left:
            text = json.dumps(
                {
                    "name": job.name, "arm": job.arm, "fingerprint": job.fingerprint, "model_hash": "0",
                    "settings": dict(job.settings), "ended": "done", "params": 1, "active_params": 1, "slots": 0,
                    "flops_per_token": 1.0, "forward_flops_per_token": 1.0, "steps": 1, "tokens": 1, "data": {},
                    "baselines": {}, "exposures_per_fact": None, "final": {"held_out_loss": random.random()},
                    "curve": [], "usage": {}, "made": {"seconds": 2.0 if job.arm == "plain" else 8.0},
                }
            )  # fmt: skip
            write(records.path(job.name), text)
    return jobs, records


def test_a_finding_names_runs_that_there_are(file: Path) -> None:
    jobs, records = made(file)
    found = Found(jobs.experiment, jobs, state(jobs, records))
    with pytest.raises(UsageError, match=r"findings: {tabel recall}: tabel is no run, but for its seed"):
        found.told("{tabel recall}")
    records.path("table.data.num_facts-12.seed-1").unlink()
    assert Found(jobs.experiment, jobs, state(jobs, records)).told("{table.data.num_facts-12 recall}") == (
        "(not trained yet)"
    )


def test_an_experiment_that_extends_another_has_found_nothing_yet(file: Path) -> None:
    above = read_experiment(write(file.parent / "more.toml", 'extends = "fixture.toml"\ntitle = "More"\n'))
    assert (above.title, list(above.arm), above.findings, above.notes) == (
        "More",
        list(read_experiment(file).arm),
        {},
        {},
    )
    assert read_experiment(file).findings


def test_the_findings_of_the_headline_are_of_runs_that_there_are() -> None:
    headline = REPO / "benchmarks" / "facts" / "headline.toml"
    jobs = Jobs(read_experiment(headline), headline.parent)
    found = Found(jobs.experiment, jobs, state(jobs, Records(headline.parent / "results" / "headline" / "runs")))
    told = [found.told(text) for text in jobs.experiment.findings.values()]
    assert told
    assert not any("{" in text for text in told)


def test_how_long_the_rest_takes_is_told_by_what_is_done(file: Path) -> None:
    jobs, records = made(file)
    assert state(jobs, records).how_far(2) == "11 done, 0 left"
    for name in ("plain.seed-1", "table.seed-2", "table-large.seed-1", "table-large.seed-2"):
        records.path(name).unlink()
    # Three steps each: of the plain arm 2 s, of the table 8 s, of the large one as of the seven that are done.
    now = state(jobs, records)
    usual = (3 * 2 + 4 * 8) / 7
    assert now.seconds_left() == pytest.approx(3 * (2 + 8 + 2 * usual))
    assert replace(now, waiting=1).seconds_left() is None


def test_records_of_an_arm_that_has_changed_are_refused_by_name(file: Path) -> None:
    _, records = made(file)
    write(file, EXPERIMENT.replace('"place.0.block.num_sub_keys" = 10', '"place.0.block.num_sub_keys" = 12'))
    with pytest.raises(
        CheckFailedError,
        match=r"2 finished runs .*: table-large\.seed-1, table-large\.seed-2; .* rm .*table-large\.seed-1",
    ):
        state(Jobs(read_experiment(file), file.parent), records)
    write(file.parent / "table.toml", MEMORY.replace("key_dim = 8", "key_dim = 12"))
    write(file, EXPERIMENT)
    plan_of.cache_clear()
    with pytest.raises(CheckFailedError, match=r"search\.table\.0, search\.table\.1"):
        state(Jobs(read_experiment(file), file.parent), records)


def test_an_arm_is_renamed_or_removed_in_the_file_alone(file: Path) -> None:
    _, records = made(file)
    write(file, EXPERIMENT.replace("table", "lookup").replace("lookup.toml", "table.toml"))
    now = state(Jobs(read_experiment(file), file.parent), records)
    assert {job.arm for job in now.left} == {"lookup"}
    assert {record.arm for record in now.done.values()} == {"plain"}


def test_a_study_varies_what_the_search_chose_and_shares_the_run_of_the_choice(file: Path) -> None:
    write(file, EXPERIMENT.replace('"data.num_facts" = [12, 20]', '"train.value_learning_rate" = [1e-3, 1e-2]'))
    jobs = Jobs(read_experiment(file), file.parent)
    chosen = {"table": {"train.value_learning_rate": 1e-2}}
    (_, _, slow), (_, _, same) = jobs.of_study("counts", chosen)
    assert slow.name == "table.train.value_learning_rate-0.001.seed-1"
    assert slow.plan().run.train.value_learning_rate == 1e-3
    _, _, of_core = next(jobs.of_study("core", chosen))
    assert (same.name, same.fingerprint) == (of_core.name, of_core.fingerprint) == ("table.seed-1", same.fingerprint)
    write(file, EXPERIMENT.replace('"data.num_facts" = [12, 20]', '"train.value_learning_rate" = [1e-2, 1e-1]'))
    assert state(*made(file)).waiting == 0, "a run that studies share does not wait for the search any more"


def test_what_says_how_a_run_is_kept_is_no_change_of_it(file: Path) -> None:
    jobs, records = made(file)
    plan_of.cache_clear()
    text = EXPERIMENT.replace("tolerance = 0.2", "tolerance = 0.3")
    write(file, text.replace("[set]", '[set]\n"train.checkpoint_minutes" = 3.0'))
    assert len(state(Jobs(read_experiment(file), file.parent), records).done) == len(state(jobs, records).done)
    write(file, EXPERIMENT.replace("[set]", '[corpora]\nairports = "00"\n\n[set]\n"data.source" = "airports"'))
    with pytest.raises(CheckFailedError, match=r"search\.plain\.0"):
        state(Jobs(read_experiment(file), file.parent), records)


def test_other_facts_than_those_pinned_are_refused_with_what_mends_it() -> None:
    with pytest.raises(DeviceError, match=r"airports: the installed facts are others .*`make data` installs"):
        require({"airports": "0" * 64})
    require({"airports": sha256("airports")})
    with pytest.raises(UsageError, match=r"corpora\.taxon: sources are airports, taxa"):
        require({"taxon": ""})


def test_a_run_that_diverged_has_no_score(file: Path, tmp_path: Path) -> None:
    jobs, records = Jobs(read_experiment(file), file.parent), Records(tmp_path / "records")
    (tmp_path / "scratch").mkdir()
    runner, job = Runner(jobs, records, tmp_path / "scratch"), jobs.trials("plain")[0]
    well = next(runner.train(lambda: ("", [job])))
    assert well.figure("recall") is not None
    run = read_run(tmp_path / "scratch" / job.name)
    assert run.summary is not None
    ended = replace(run, summary=run.summary.model_copy(update={"ended": "non-finite"}))
    found = record_of(job, ended, {})
    assert (found.ended, found.final) == ("non-finite", {})
    assert (found.figure("recall"), found.figure("recalled_bits")) == (None, None)
    # What has finished and was not yet recorded is taken up, not trained again.
    again = next(runner.train(lambda: ("", [job])))
    assert again.differences(well) == []


def test_where_nothing_can_be_written_is_one_line(file: Path, tmp_path: Path) -> None:
    write(tmp_path / "taken", "")
    for command in ("report", "run"):
        done = facts(command, file, "--out", tmp_path / "taken" / "out", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (4, f"error: {tmp_path / 'taken' / 'out'}: Not a directory\n")


def test_a_record_that_is_damaged_is_named(file: Path) -> None:
    jobs, records = made(file)
    write(records.path("search.plain.0"), "{")
    with pytest.raises(StorageError, match=r"search\.plain\.0\.json: damaged; delete it"):
        state(jobs, records)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline = "plain"', 'baseline = "none"', "baseline: none is none of plain, table, table-large"),
        ('{ "train.learning_rate" = 1e-3 }', '{ "train.steps" = 3 }', "arm.plain: `search` sets other keys"),
        ("trials = 2", "trials = 3", "arm.plain.search: 2 trials, and search.trials = 3 for all"),
        ('tuned_as = "table"', 'tuned_as = "table-large"', "arm.table-large.tuned_as: table-large is none of"),
        ('tuned_as = "table"', "", "arm.table-large: an arm has either `search` or `tuned_as`"),
        ('than = "plain"', 'than = "plane"', "question: plane is none of"),
        ('["plain", "table"] }', '["plain", "tables"] }', "figure.flops.lines: tables is none of plain, table"),
        ('study = "sizes"', 'study = "size"', "figure.sizes.study: size is none of"),
        ("seeds = [1, 2]", "seeds = []", "study.core.seeds: List should have at least 1 item"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "study.core.seeds: one is there twice"),
        ('x = "slots"', 'x = "slot"', "figure.sizes.x: slot is none of"),
        ("{table recall}", "{table recal}", "findings.It was tried:: recal is none of"),
        ('measure = "held_out_loss"', 'measure = "recal"', "search.measure: recal is none of"),
        ('y = "recall"', 'y = "recalled_bits"', "figure.course.y: recalled_bits is none of"),
        ('"data.num_facts" = [12, 20]', '"train.seed" = [1]', "study.counts.vary: train.seed is set by the arm"),
        ("vary = {", 'set = { "train.value_learning_rate" = 1e-3 }\nvary = {', "study.counts.set: .* is set by"),
        ("[search]", "[search", "Expected ']' at the end of a table declaration"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(file: Path, old: str, new: str, message: str) -> None:
    write(file, EXPERIMENT.replace(old, new))
    with pytest.raises(UsageError, match=f".*fixture.toml: .*{message}".replace("[", r"\[").replace("]", r"\]")):
        read_experiment(file)


def test_a_key_of_a_spec_that_is_misspelt_is_refused_with_the_training_that_sets_it(file: Path) -> None:
    write(file, EXPERIMENT.replace('"train.steps" = 2', '"train.stepz" = 2'))
    with pytest.raises(UsageError, match=r"search\.plain\.0: --set:\d+:\d+: unknown key `stepz`"):
        Jobs(read_experiment(file), file.parent).require_parity()


def test_an_arm_that_is_not_what_it_claims_trains_nothing(file: Path) -> None:
    write(file, EXPERIMENT.replace('label = "Plain"', 'label = "P"\ntimes = 2'))
    with pytest.raises(CheckFailedError, match=r"arm\.plain: 1\.0000 times the FLOPs of plain, and times = 2 \+- 20%"):
        Jobs(read_experiment(file), file.parent).require_parity()


def test_settings_are_told_by_their_kind() -> None:
    settings: Settings = {"train.schedule": "wsd", "train.steps": 1500, "train.learning_rate": 1e-3, "a.layers": [1, 2]}
    assert told_settings(settings) == "schedule wsd, steps 1,500, learning rate 0.001, layers [1, 2]"


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


def test_bits_are_those_of_whole_answers_beyond_what_names_give_away() -> None:
    finished = sorted((REPO / "benchmarks/facts/results/headline/runs").glob("search.*.json"))
    record = read_record(finished[0])
    facts, bits = record.data["facts"], record.data["answer_bits"]
    assert record.figure("recalled_bits") == pytest.approx(record.final["recall"] * facts * bits)
    tested = record.model_copy(update={"final": {**record.final, "recall.unseen": 0.25}})
    assert tested.figure("recalled_bits") == pytest.approx((record.final["recall"] - 0.25) * facts * bits)
    assert tested.figure("bits_per_param") == pytest.approx(tested.figure("recalled_bits") / record.params)
    prior = record.model_copy(
        update={"final": {"held_out_loss": bits * math.log(2) / record.data["answer_tokens"]}}
    )  # no better than how frequent each answer is
    assert prior.figure("foretold_bits") == pytest.approx(0, abs=1e-6 * facts)
