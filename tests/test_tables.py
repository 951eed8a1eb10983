"""Training by rows: the gradients of autograd, eager, checkpointed and compiled; what was not read is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PEER, REPO, SMALL, write
from torch import Tensor

from memforge.build import build_model
from memforge.plan import Plan, TrainPlan, make_plan
from memforge.spec import load_spec
from memforge.training import train
from memforge.training.checkpoint import open_run
from memforge.training.optimizer import Stepper
from memforge.training.schedule import PEAK
from memforge_kernels.row_update import segment_sum


def planned(path: Path, *overrides: str) -> tuple[Plan, TrainPlan]:
    plan = make_plan(load_spec(write(path / "s.toml", SMALL.replace("[data]", PEER + "[data]")), overrides=overrides))
    assert plan.run.train is not None
    return plan, plan.run.train


def window(plan: Plan, run: TrainPlan) -> Tensor:
    shape = (run.batch_size, run.seq_len + 1)
    return torch.randint(plan.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def gradients(stepper: Stepper) -> dict[str, Tensor]:
    """Of every parameter, those of tables as whole tables."""
    found = {name: p.grad for name, p in stepper.model.named_parameters() if p.grad is not None}
    if stepper.tables is not None:
        for name, table in stepper.tables.tables.items():
            grad = stepper.tables.optimizer._gradient(table)
            found[name] = torch.zeros_like(table).index_copy(0, grad.touched, segment_sum(grad))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_by_rows_are_those_of_autograd(tmp_path: Path, checkpointing: bool) -> None:
    results = []
    for update in ("dense", "lazy"):
        plan, run = planned(tmp_path, f"train.value_update={update}")
        model = build_model(plan.model, seed=3).train()
        stepper = Stepper(model, plan.model, run)
        model.checkpoint_layers = checkpointing and update == "lazy"
        assert (stepper.tables is None) == (update == "dense")
        loss, norm, _ = stepper.backward(window(plan, run))
        results.append((loss, norm, gradients(stepper)))
    (loss, norm, dense), (other_loss, other_norm, rows) = results
    assert torch.equal(loss, other_loss)
    assert float(norm) == pytest.approx(float(other_norm), rel=1e-5)
    assert dense.keys() == rows.keys()
    assert {"pool.facts.values", "layers.1.peer.pool.down", "layers.1.peer.pool.up"} <= rows.keys()
    for name, grad in dense.items():
        assert (rows[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_steps_by_rows_leave_the_rest_alone_and_clip_all_together(tmp_path: Path) -> None:
    plan, run = planned(tmp_path, "train.clip_norm=0.01", "pool.facts.num_sub_keys=40", "train.weight_decay=0")
    model = build_model(plan.model, seed=3).train()
    stepper = Stepper(model, plan.model, run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = stepper.backward(window(plan, run)).norm
    assert stepper.tables is not None
    values = model.get_parameter("pool.facts.values")
    touched = stepper.tables.optimizer._gradient(values).touched
    expected = {name: grad * (0.01 / (float(norm) + 1e-6)) for name, grad in gradients(stepper).items()}
    stepper.update(norm, PEAK)
    rest = torch.ones(len(values), dtype=torch.bool).index_fill(0, touched, False)
    assert rest.any()
    assert torch.equal(values.detach()[rest], before["pool.facts.values"][rest])
    for name, p in model.named_parameters():
        grad = expected[name]
        # The first step of Adam: lr * g / (|g| + eps).
        step = 1e-3 * grad / (grad.abs() + 1e-8)
        assert (before[name] - step - p.detach()).abs().max() <= 2e-6, name


COMPILED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_tables import gradients, planned, window
from memforge.build import build_model
from memforge.training.optimizer import Stepper
plan, run = planned(Path(sys.argv[2]))
results = []
for compiled in (False, True):
    stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
    if compiled:
        stepper.forward = torch.compile(stepper.forward, fullgraph=True)
    loss, norm, _ = stepper.backward(window(plan, run))
    results.append((float(loss), float(norm), gradients(stepper)))
(loss, norm, eager), (other_loss, other_norm, compiled) = results
assert abs(loss - other_loss) <= 1e-5 * loss and abs(norm - other_norm) <= 1e-4 * norm, results
for name, grad in eager.items():
    assert (compiled[name] - grad).norm() <= 1e-4 * grad.norm(), name
print("the same")
"""


def test_a_compiled_step_with_a_fresh_cache_reads_and_learns_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        cwd=REPO,
    )
    assert done.stdout == "the same\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    "settings",
    [
        ("value_update=lazy_row_step",),
        ("value_update=catch_up",),
        ("value_optimizer=sgd", "value_learning_rate=0.1"),
        ("value_rounding=stochastic", "value_learning_rate=1e-2"),
        ("value_rounding=master", "value_learning_rate=1e-2"),
    ],
)
def test_every_way_of_updating_pools_trains(tmp_path: Path, settings: tuple[str, ...]) -> None:
    overrides = [f"train.{setting}" for setting in (*settings, "compile=off", "steps=30", "learning_rate=1e-2")]
    if "rounding" in settings[0]:
        overrides.append("pool.facts.dtype=bfloat16")
    plan, _ = planned(tmp_path, *overrides)
    summary = train(plan, tmp_path / "run")
    assert summary["final"]["loss"] < 5.0  # it starts at 5.7
    _, model, _, _ = open_run(tmp_path / "run", "cpu")
    start = build_model(plan.model, seed=0).get_parameter("pool.facts.values")
    values = model.get_parameter("pool.facts.values")
    assert values.dtype == start.dtype
    assert (values != start).any(dim=1).float().mean() > 0.5
