"""Training: the same twice, saved whole, interrupted cleanly, never spoilt."""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, memforge, write
from torch import nn

from memforge.build import build_model
from memforge.errors import DeviceError, NonFiniteError, StorageError, UsageError
from memforge.plan import Plan, make_plan
from memforge.spec import load_spec
from memforge.training import train
from memforge.training.checkpoint import checkpoints, load_weights, open_run
from memforge.training.data import HeldOut, load_corpus
from memforge.training.data.corpus import Ragged
from memforge.training.evaluate import evaluate, evaluate_run
from memforge.training.evaluate import generate as continue_tokens
from memforge.training.execution import why_not_compiled
from memforge.training.optimizer import Stepper


def plan_with(path: Path, *overrides: str) -> Plan:
    return make_plan(load_spec(write(path, SMALL), overrides=overrides))


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_runs_with_one_seed_are_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=5", "eval.every_steps=2")
    for name in ("one", "two"):
        train(plan, tmp_path / name)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    assert [row["step"] for row in rows_of(tmp_path / "one")] == [1, 2, 3, 4, 5]
    weights = [(checkpoints(tmp_path / n)[-1] / "model.safetensors").read_bytes() for n in ("one", "two")]
    assert weights[0] == weights[1]
    other = plan_with(tmp_path / "s.toml", "train.steps=5", "train.seed=1")
    train(other, tmp_path / "three")
    assert rows_of(tmp_path / "three") != rows_of(tmp_path / "one")


@pytest.mark.parametrize("model", ["dense", "memory", "moe"])
def test_two_compiled_runs_are_the_same_bytes(tmp_path: Path, model: str) -> None:
    """At the demo's size Inductor's loops run in parallel; in these ten steps they once differed every time."""
    spec = REPO / "specs" / "demo" / f"{model}.toml"
    hashes = set()
    for name in ("one", "two"):
        options = ("--set", "train.steps=10", "--set", "train.compile=on", "--set", "eval.max_prompts=8")
        done = memforge("train", spec, "--out", tmp_path / name, *options, timeout=600)
        assert done.returncode == 0, done.stderr
        hashes.add((checkpoints(tmp_path / name)[-1] / "model.safetensors").read_bytes())
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("cxx", "option", "code", "said"),
    [
        ("no-such-compiler", "auto", 0, "no C++ compiler: training is eager"),
        ("false", "auto", 0, "torch.compile does not work here, training is eager"),
        ("false", "on", 3, 'train.compile = "on"'),
    ],
)
def test_without_a_working_compiler_training_is_eager_and_says_so(
    tmp_path: Path, cxx: str, option: str, code: int, said: str
) -> None:
    options = ("train.steps=100", f"train.compile={option}", "model.num_layers=4", "train.batch_size=1")
    done = memforge(
        "train", write(tmp_path / "s.toml", SMALL), "--out", tmp_path / "run",
        *(x for o in options for x in ("--set", o)), CXX=cxx, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run").exists() is (code == 0)


def test_a_library_that_was_cut_off_is_to_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "x.main.so"
    path.touch()
    with pytest.raises(OSError) as caught:
        ctypes.CDLL(str(path))
    assert (
        why_not_compiled(caught.value)
        == f"{path}: file too short (what a compilation that was killed has left: delete that file)"
    )
    assert why_not_compiled(RuntimeError("no g++\nat all")) == "no g++"


def test_a_run_can_be_evaluated_and_continued_from(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    done = memforge("train", spec, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 4
    assert summary["exposures_per_fact"] == pytest.approx(
        4 * 4 * 49 * 72 / 12 / summary["data"]["tokens_per_epoch"], rel=1e-9
    )
    (scored,) = json.loads(memforge("eval", tmp_path / "run", "--json").stdout)
    for key in ("recall", "held_out_loss"):
        assert scored["final"][key] == summary["final"][key]
    text = memforge("generate", tmp_path / "run", "--prompt", "Flights to", "--max-tokens", "5")
    assert text.stdout.startswith("Flights to")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    here = str(tmp_path)
    assert all(here not in f.read_text() for f in (tmp_path / "run").glob("*.json*"))


def test_training_lowers_the_loss_of_every_kind(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=60", "train.compile=off", "train.learning_rate=1e-2")
    train(plan, tmp_path / "run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(300), rel=0.25)
    assert losses[-1] < 0.6 * losses[0]


def test_a_non_finite_step_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(tmp_path / "s.toml")
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda *args: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match=r"step 1: .*gradient norm nan; the update was not made"):
        train(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exit_code_5_from_the_command_line(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    # Decay of 10 at rate 10 multiplies every matrix by -99 a step: infinite after some twenty steps.
    options = ("train.learning_rate=10", "train.weight_decay=10", "train.steps=60", "train.compile=off")
    done = memforge("train", spec, "--out", tmp_path / "run", *(x for o in options for x in ("--set", o)))
    assert done.returncode == 5
    assert "the update was not made" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_so(tmp_path: Path, number: signal.Signals, code: int) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    run = tmp_path / "run"
    command = ["train", str(spec), "--out", str(run), "--set", "train.steps=100000", "--set", "train.compile=off"]
    process = subprocess.Popen(
        [sys.executable, "-m", "memforge", *command], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "saved" in stderr
    assert "Traceback" not in stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    assert summary["steps"] >= rows_of(run)[-1]["step"] > 0
    assert summary["checkpoint"] == checkpoints(run)[-1].name == f"step-{summary['steps']:08d}"
    assert memforge("eval", run).returncode == 0


def test_a_log_on_a_full_disk_does_not_stop_a_run(tmp_path: Path) -> None:
    command = ["train", str(write(tmp_path / "s.toml", SMALL)), "--out", str(tmp_path / "run")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "memforge", *command], stderr=full, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "done"


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    command = ["train", str(spec), "--out", str(tmp_path / "run"), "--set", "train.steps=500"]
    process = subprocess.Popen([sys.executable, "-m", "memforge", *command], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "compiling" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert [p.name for p in tmp_path.iterdir()] == ["s.toml"]


def test_an_existing_run_is_kept_unless_overwritten(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=1")
    train(plan, tmp_path / "run")
    with pytest.raises(StorageError, match="exists already"):
        train(plan, tmp_path / "run")
    precious = write(tmp_path / "mine" / "thesis.tex", "years of work")
    done = memforge("train", tmp_path / "s.toml", "--out", tmp_path / "mine", "--overwrite")
    assert done.returncode == 4
    assert precious.read_text() == "years of work"


def test_overwriting_deletes_a_run_and_only_when_the_new_one_can_start(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=1")
    train(plan, tmp_path / "run")
    bad = plan_with(tmp_path / "s.toml", "data.num_facts=1000000")
    with pytest.raises(UsageError, match="holds"):
        train(bad, tmp_path / "run", overwrite=True)
    assert checkpoints(tmp_path / "run")
    train(plan_with(tmp_path / "s.toml", "train.steps=2"), tmp_path / "run", overwrite=True)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000002"]
    write(tmp_path / "run" / "notes.txt", "mine")
    with pytest.raises(StorageError, match="not only a run"):
        train(plan, tmp_path / "run", overwrite=True)


def test_a_new_run_that_fails_at_its_first_step_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=1")
    train(plan, tmp_path / "run")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda *args: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError):
        train(plan, tmp_path / "run", overwrite=True)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(NonFiniteError):
        train(plan, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_weights_are_saved_before_anything_that_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.steps=3")

    def fail(*args: object) -> None:
        raise MemoryError("scores")

    with monkeypatch.context() as patch:
        patch.setattr("memforge.training.account.corpus_scores", fail)
        with pytest.raises(MemoryError):
            train(plan, tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000003"]
    scored = evaluate_run(tmp_path / "run", data_root=tmp_path, device="cpu")
    assert "recall" in scored["final"]

    norm_of, calls = nn.utils.get_total_norm, []

    def late_nan(*args: object) -> torch.Tensor:
        calls.append(1)
        return norm_of(*args) if len(calls) < 3 else torch.tensor(math.nan)

    monkeypatch.setattr("torch.nn.utils.get_total_norm", late_nan)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(plan, tmp_path / "late")
    assert [p.name for p in checkpoints(tmp_path / "late")] == ["step-00000002"]
    assert json.loads((tmp_path / "late" / "summary.json").read_text())["ended"] == "non-finite"
    assert rows_of(tmp_path / "late")[-1]["step"] == 2


def test_steps_are_those_of_adamw_written_by_hand(tmp_path: Path) -> None:
    """Three steps with a schedule, a tight clip, two rates, decay and the router's loss against plain formulas."""
    plan = plan_with(
        tmp_path / "s.toml", "train.steps=3", "train.warmup_steps=2", "train.clip_norm=0.05", "train.compile=off",
        "train.value_learning_rate=0.02", "train.weight_decay=0.3",
    )  # fmt: skip
    run = plan.run.train
    assert run is not None
    train(plan, tmp_path / "run")
    trained = load_weights(checkpoints(tmp_path / "run")[-1], plan)

    model = build_model(plan.model, seed=0).train()
    corpus = load_corpus(plan, tmp_path)
    stream = corpus.stream(49, 0)
    rows = {row.path: row for row in plan.model.params}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step, share in enumerate((0.5, 1.0, 1.0)):
        window = torch.from_numpy(stream.windows(step * 4, 4)).long()
        logits, losses = model(window[:, :-1])
        assert set(losses) == {"load_balance"}
        cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        grads = torch.autograd.grad(cross_entropy + losses["load_balance"], list(model.parameters()))
        scale = min(1.0, 0.05 / (torch.cat([g.flatten() for g in grads]).norm().item() + 1e-6))
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
            rate = (0.02 if rows[name].group == "values" else 1e-3) * share
            first, second = moments[name]
            first.mul_(0.9).add_(grad * scale, alpha=0.1)
            second.mul_(0.95).add_((grad * scale).square(), alpha=0.05)
            m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            with torch.no_grad():
                p.mul_(1 - rate * (0.3 if rows[name].decay else 0.0)).sub_(rate * m / (v.sqrt() + 1e-8))
    for name, p in model.named_parameters():
        # Adam divides gradients near eps by themselves, so rounding there is worth up to a step: a tenth of one is not.
        assert (trained[name] - p).abs().max() < 0.1 * 1e-3, name


def test_models_larger_than_the_machine_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "model.dim=65536", "pool.facts.num_sub_keys=65536")
    with pytest.raises(
        DeviceError,
        match=r"weights, gradients and optimizer state\) takes [\d,.]+ GB; cpu has",
    ):
        train(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_build_directory_trains_as_it_was_built(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    assert memforge("build", spec, "--out", tmp_path / "b").returncode == 0
    assert memforge("train", tmp_path / "b", "--out", tmp_path / "run").returncode == 0
    plan = (tmp_path / "b" / "plan.json").read_text()
    assert (tmp_path / "run" / "plan.json").read_text() == plan
    (tmp_path / "b" / "plan.json").write_text(plan.replace('"hidden_dim": 24', '"hidden_dim": 25'))
    done = memforge("train", tmp_path / "b", "--out", tmp_path / "run2")
    assert (done.returncode, "changed after it was written" in done.stderr) == (4, True)
    assert not (tmp_path / "run2").exists()


def test_plans_that_cannot_be_trained_say_what_is_missing(tmp_path: Path) -> None:
    bare = make_plan(load_spec(write(tmp_path / "bare.toml", SMALL.partition("[data]")[0])))
    with pytest.raises(UsageError, match=r"\[data\] and \[train\]"):
        train(bare, tmp_path / "run")
    with pytest.raises(StorageError, match="no such run"):
        open_run(tmp_path / "absent", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_mistyped_directory_is_not_taken_for_a_spec(tmp_path: Path) -> None:
    for options in ((), ("--resume", "auto")):
        done = memforge("train", "run7", *options, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, "error: run7: no such spec, build or run directory\n")
    assert "missing.toml:1:1: no such file" in memforge("train", "missing.toml", cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir())


def test_parameters_are_grouped_by_the_plan(tmp_path: Path) -> None:
    plan = plan_with(tmp_path / "s.toml", "train.value_learning_rate=0.5", "train.weight_decay=0.2")
    assert plan.run.train is not None
    model = build_model(plan.model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for o in Stepper(model, plan.model, plan.run.train).optimizers for group in o.param_groups]
    by_setting = {(g["peak"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert by_setting[0.5, 0.0] == {"pool.facts.values"}
    assert "layers.0.memory.query.bias" in by_setting[1e-3, 0.0]
    assert "layers.0.memory.sub_keys" in by_setting[1e-3, 0.2]
    assert sum(map(len, by_setting.values())) == len(names)


class Table(nn.Module):
    """Predicts token + 1 with certainty."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.size = size

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return nn.functional.one_hot((tokens + 1) % self.size, self.size) * self.scale, {}


def test_recall_counts_whole_answers_only() -> None:
    sequences = [[3, 4, 5, 6], [3, 9, 5, 6, 7], [2, 3, 5], [7, 8]]
    held = HeldOut(Ragged.of(sequences), torch.tensor([2, 2, 1, 1]).numpy(), exact_match=True)
    scores, *others = (evaluate(Table(20), held, batch_size=b, max_prompts=10) for b in (64, 1, 3))
    assert all(other == pytest.approx(scores) for other in others)
    # The second is right from its third token on except 9 -> 5; the third ends in 5 instead of 4.
    assert scores["recall"] == 0.5
    num_tokens, num_wrong = 2 + 3 + 2 + 1, 2
    assert scores["held_out_loss"] == pytest.approx(num_wrong * 50 / num_tokens, rel=1e-6)


def test_greedy_generation_follows_the_model_to_the_end_token() -> None:
    assert continue_tokens(Table(6), [2], max_tokens=10, max_seq_len=8, temperature=0, seed=0) == [3, 4, 5]
    assert continue_tokens(Table(60), [2], max_tokens=3, max_seq_len=2, temperature=0, seed=0) == [3, 4, 5]
