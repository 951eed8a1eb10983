"""Runs that are taken up again: the same bytes as without a break, from the checkpoint that was asked for."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, memforge, write

from memforge.errors import DeviceError, InterruptedRunError, StorageError, UsageError
from memforge.plan import Plan, make_plan
from memforge.spec import load_spec
from memforge.training import Budget, Reporter, train
from memforge.training.checkpoint import checkpoints
from memforge.training.loop import _Trainer

# Passes that are added up, several epochs in new orders, sparse updates, dropout, restarts of keys, scores and samples.
EVERYTHING = (
    "train.micro_batch_size=3", "train.dropout=0.1", "train.value_update=catch_up", "train.revive_every=7",
    "train.log_every=4", "train.checkpoint_every=5", "eval.every_steps=10", "eval.sample_tokens=6", "train.compile=off",
)  # fmt: skip


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_spec(write(path / "s.toml", SMALL), overrides=[*EVERYTHING, *overrides]))


def contents(run: Path) -> dict[str, bytes]:
    """All that must be the same: the last checkpoint, and what was logged of what was learned."""
    last = checkpoints(run)[-1]
    found = {f"{last.name}/{file.name}": file.read_bytes() for file in last.iterdir() if file.name != "manifest.json"}
    manifest = json.loads((last / "manifest.json").read_text())
    del manifest["run_id"], manifest["seal"]
    found["manifest"] = json.dumps(manifest).encode()
    return found | {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "tokenizer.json")}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def killed_run_equals(tmp_path: Path, kills: int, seed: int, *overrides: str) -> None:
    plan = planned(tmp_path, *overrides)
    write(tmp_path / "plan.json", plan.to_json())
    train(plan, tmp_path / "whole")
    driver = Path(__file__).parent / "kill_runs.py"
    command = [
        sys.executable,
        str(driver),
        str(tmp_path / "plan.json"),
        str(tmp_path / "killed"),
        str(kills),
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills
    assert plan.run.train is not None
    epochs = json.loads((tmp_path / "killed" / "summary.json").read_text())["epochs"]
    assert epochs > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_kills_change_nothing(tmp_path: Path, in_background: str) -> None:
    """Twice five kills at random moments, with checkpoints written in line and beside the training."""
    killed_run_equals(tmp_path, 5, 1, "train.steps=150", f"train.async_checkpoints={in_background}")


@pytest.mark.slow
@pytest.mark.parametrize("in_background", ["false", "true"])
@pytest.mark.parametrize("rule", ["lazy", "catch_up"])
def test_two_hundred_kills_change_nothing(tmp_path: Path, rule: str, in_background: str) -> None:
    killed_run_equals(
        tmp_path, 50, 2, "train.steps=1500", f"train.async_checkpoints={in_background}", f"train.value_update={rule}"
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_budget_stops_and_the_rest_follows(tmp_path: Path, workers: int) -> None:
    plan = planned(tmp_path, "train.steps=12", f"train.data_workers={workers}")
    train(planned(tmp_path, "train.steps=12"), tmp_path / "whole")
    tokens = 4 * 48
    for number, budget in enumerate((Budget(max_steps=3), Budget(max_tokens=7 * tokens - 1), Budget(max_minutes=0))):
        summary = train(plan, tmp_path / "parts", resume="auto" if number else None, budget=budget)
        assert summary["ended"] == "budget"
        assert summary["steps"] == (3, 7, 7)[number]
        assert "held_out_loss" in summary["final"]
    assert train(plan, tmp_path / "parts", resume="auto")["ended"] == "done"
    found, expected = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if found[name] != value] in ([], ["manifest"])


def test_a_finished_run_stays_as_it_is_and_can_be_made_longer(tmp_path: Path) -> None:
    for schedule in ("linear", "constant"):
        plan = planned(tmp_path, "train.steps=6", f"train.schedule={schedule}")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        train(plan, tmp_path / "run")
        before = contents(tmp_path / "run")
        train(plan, tmp_path / "run", resume="auto")
        assert contents(tmp_path / "run") == before
    with pytest.raises(UsageError, match=r"train.steps = 5: the run is at step 6 already"):
        train(planned(tmp_path, "train.steps=5", "train.schedule=constant"), tmp_path / "run", resume="auto")
    assert contents(tmp_path / "run") == before
    notes = Notes()
    longer = planned(tmp_path, "train.steps=12", "train.schedule=constant")
    train(longer, tmp_path / "run", resume="auto", reporter=notes)
    assert any("train.steps: 6 -> 12" in note for note in notes.notes)
    train(longer, tmp_path / "other")
    assert contents(tmp_path / "run") == contents(tmp_path / "other")


def test_a_signal_is_not_kept_waiting_by_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in a step after which the model would be scored; the row is written when the run goes on."""
    plan = planned(tmp_path, "train.steps=20")
    train(plan, tmp_path / "whole")
    advance, score = _Trainer.advance, _Trainer.score

    def signalled(self: _Trainer, batches: object) -> None:
        advance(self, batches)
        if self.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    def scored(self: _Trainer, **given: bool) -> dict[str, float]:
        raise AssertionError("scored after the signal")

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "advance", signalled)
        patch.setattr(_Trainer, "score", scored)
        with pytest.raises(InterruptedRunError):
            train(plan, tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000010"
    assert '"step": 10,' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert _Trainer.score is score
    train(plan, tmp_path / "run", resume="auto")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_spec_that_cannot_start_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(planned(tmp_path, "train.steps=6"), tmp_path / "run", budget=Budget(max_steps=3))
    before = (tmp_path / "run" / "plan.json").read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DeviceError, match="wandb"):
        train(planned(tmp_path, "train.steps=6", "train.wandb=mine"), tmp_path / "run", resume="auto")
    assert (tmp_path / "run" / "plan.json").read_bytes() == before
    train(planned(tmp_path, "train.steps=6"), tmp_path / "run", resume="auto")


def test_what_may_pass_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint would cost steps: where the newest cannot be read just now, that is an error."""
    plan = planned(tmp_path, "train.steps=12")
    train(plan, tmp_path / "run")

    def stale(path: Path) -> str:
        raise OSError(116, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("memforge.training.checkpoint.file_sha256", stale)
        with pytest.raises(StorageError, match="Stale file handle"):
            train(plan, tmp_path / "run", resume="auto")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000005", "step-00000010", "step-00000012"]


def test_an_older_checkpoint_can_be_chosen_and_the_later_ones_are_kept_aside(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.steps=12")
    train(plan, tmp_path / "run")
    before = contents(tmp_path / "run")
    for target in ("step=5", str(tmp_path / "run" / "step-00000005")):
        train(plan, tmp_path / "run", resume=target)
        assert contents(tmp_path / "run") == before
    aside = [p.name for p in (tmp_path / "run").glob(".abandoned-*")]
    assert len(aside) == 4
    assert all((tmp_path / "run" / name / "manifest.json").is_file() for name in aside)


def test_what_is_not_there_is_never_a_fresh_start(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.steps=6")
    train(plan, tmp_path / "run")
    cases = {
        ("none", "auto"): "no such run",
        ("none", "step=5"): "no such run",
        ("run", "step=4"): r"step-00000004: no such checkpoint; it has step-00000005, step-00000006",
        ("run", "step-00000099"): "no such checkpoint; it has step",
    }
    for (name, target), message in cases.items():
        with pytest.raises(StorageError, match=message):
            train(plan, tmp_path / name, resume=target)
    assert not (tmp_path / "none").exists()
    for target in ("step=x", "newest", "step="):
        with pytest.raises(UsageError, match="expected"):
            train(plan, tmp_path / "run", resume=target)
    write(tmp_path / "mine" / ".tmp-thesis", "years of work")
    with pytest.raises(StorageError, match="not a run"):
        train(plan, tmp_path / "mine", resume="auto")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [".tmp-thesis"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.steps=6")
    train(plan, tmp_path / "whole")
    for leave in ((), ("run.json",), ("run.json", "plan.json", "tokenizer.json", "metrics.jsonl")):
        run = tmp_path / f"killed-{len(leave)}"
        run.mkdir()
        write(run / ".lock", "process 1 on elsewhere\n")
        for name in leave:
            shutil.copy(tmp_path / "whole" / name, run / name)
        (run / ".tmp-step-00000005-x").mkdir()
        train(plan, run, resume="auto")
        assert contents(run) == contents(tmp_path / "whole")
        assert not list(run.glob(".tmp-*"))


CHANGES = (
    "model.dim=64", "model.norm_eps=1e-4", "ffn.hidden_dim=40", "pool.facts.num_sub_keys=9", "train.batch_size=5",
    "train.learning_rate=2e-3", "train.seed=1", "train.dropout=0.2", "train.micro_batch_size=2", "data.num_facts=13",
    "train.weight_decay=0.2", "train.value_update=lazy", "train.clip_norm=0.5", "train.revive_every=8",
    "train.precision=bfloat16", "train.seq_len=40", "train.warmup_steps=2",
)  # fmt: skip


def test_a_changed_spec_is_refused_with_the_keys(tmp_path: Path) -> None:
    train(planned(tmp_path, "train.steps=2"), tmp_path / "run")
    before = contents(tmp_path / "run")
    for change in CHANGES:
        key, _, value = change.partition("=")
        name = key.rpartition(".")[2]
        with pytest.raises(UsageError, match=rf"not the one of this run: .*{name}: .* -> .*{value[:1]}"):
            train(planned(tmp_path, "train.steps=2", change), tmp_path / "run", resume="auto")
    both = planned(tmp_path, "train.steps=2", "train.seed=1", "train.learning_rate=3e-3")
    with pytest.raises(UsageError, match=r"train.learning_rate: 0.001 -> 0.003; .*train.seed: 0 -> 1"):
        train(both, tmp_path / "run", resume="auto")
    assert contents(tmp_path / "run") == before


def test_changed_data_and_logs_are_noticed(tmp_path: Path) -> None:
    text = SMALL.replace('kind = "facts"\nnum_facts = 12', 'kind = "text"\npath = "t.txt"')
    write(tmp_path / "t.txt", "the quick brown fox jumps over the lazy dog. " * 400)
    plan = make_plan(load_spec(write(tmp_path / "s.toml", text), overrides=["train.steps=4", "train.log_every=2"]))
    train(plan, tmp_path / "run", data_root=tmp_path)
    write(tmp_path / "t.txt", "the quick brown fox jumps over the lazy cat. " * 400)
    with pytest.raises(StorageError, match="data is not what this run was trained on"):
        train(plan, tmp_path / "run", data_root=tmp_path, resume="auto")
    write(tmp_path / "t.txt", "the quick brown fox jumps over the lazy dog. " * 400)
    log = tmp_path / "run" / "metrics.jsonl"
    kept = log.read_text()
    log.write_text(kept.replace("loss", "l0ss"))
    with pytest.raises(StorageError, match=r"metrics.jsonl: is not what it was"):
        train(plan, tmp_path / "run", data_root=tmp_path, resume="auto")
    log.unlink()
    notes = Notes()
    train(plan, tmp_path / "run", data_root=tmp_path, resume="auto", reporter=notes)
    assert any("metrics.jsonl is gone" in note for note in notes.notes)


def test_auto_falls_back_on_an_older_checkpoint_and_a_named_one_does_not(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.steps=12")
    train(plan, tmp_path / "run")
    before = contents(tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    weights = newest / "optimizer.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 3] ^= 16
    weights.write_bytes(raw)
    with pytest.raises(StorageError, match=r"step-00000012/optimizer.safetensors: the content does not match"):
        train(plan, tmp_path / "run", resume="step=12")
    notes = Notes()
    train(plan, tmp_path / "run", resume="auto", reporter=notes)
    assert any("optimizer.safetensors" in note and "trying the one before" in note for note in notes.notes)
    assert contents(tmp_path / "run") == before
    assert len(list((tmp_path / "run").glob(".bad-step-00000012-*"))) == 1


def test_a_run_that_was_killed_can_be_scored_and_looked_at(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.steps=12")
    done = train(plan, tmp_path / "run", budget=Budget(max_steps=7))
    run = tmp_path / "run"
    # As a kill after step 7 would leave it: the last summary is that of the checkpoint before.
    shutil.rmtree(run / done["checkpoint"])
    summary = json.loads((run / "summary.json").read_text())
    write(run / "summary.json", json.dumps(summary | {"ended": "running", "steps": 5, "checkpoint": "step-00000005"}))
    scored = memforge("eval", run, "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)[0]["checkpoint"] == "step-00000005"
    looked = memforge("inspect", run)
    assert looked.returncode == 0, looked.stderr
    assert "running, or killed" in looked.stdout


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    run = tmp_path / "run"
    options = ("--set", "train.steps=100000", "--set", "train.compile=off", "--set", "train.log_every=1")
    command = [sys.executable, "-m", "memforge", "train", str(spec), "--out", str(run), *options]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for more in (("--resume", "auto"), ("--overwrite",)):
            done = memforge("train", spec, "--out", run, *options, *more)
            assert done.returncode == 4, done.stderr
            assert f"process {first.pid} on {os.uname().nodename} is writing to this run" in done.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    assert memforge("train", run, "--resume", "auto", "--max-steps", 1).returncode == 0


def test_the_command_line_resumes_a_run_by_its_directory_and_by_a_path(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    run = tmp_path / "run"
    options = ("--set", "train.steps=8", "--set", "train.checkpoint_every=2")
    assert memforge("train", spec, "--out", run, *options, "--max-steps", 3).returncode == 0
    again = memforge("train", run, "--resume", run / "step-00000002", "--max-steps", 5)
    assert again.returncode == 0, again.stderr
    assert "going on from step 2 of 8" in again.stderr
    done = memforge("train", spec, "--out", run, *options, "--resume", "auto", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ended"] == "done"
    wrong = memforge("train", spec, "--resume", "auto")
    assert (wrong.returncode, "which run?" in wrong.stderr) == (2, True)
    both = memforge("train", spec, "--out", run, "--resume", "auto", "--overwrite")
    assert (both.returncode, "give one of them" in both.stderr) == (2, True)
