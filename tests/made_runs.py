"""Run directories as training leaves them, of numbers that follow from the step."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import PEER, SMALL, write

from memforge.plan import Plan, make_plan
from memforge.report.run import read_run, run_record
from memforge.spec import load_spec

MEMORIES = ("layers.0.memory", "layers.1.peer", "layers.2.memory")
POOL, ROUTER = "pool.facts.values", "layers.3.moe"
TOKENS_PER_STEP = 192


def planned(folder: Path, *overrides: str) -> Plan:
    """A model with a shared pool, one of single-neuron experts and a router."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = write(folder / "spec.toml", SMALL.replace("[data]", PEER + "[data]"))
    return make_plan(load_spec(spec, overrides=overrides))


def metrics(step: int, last: int, noise: random.Random) -> dict[str, float]:
    """A row of a run that learns: every number follows from the step, up to some noise."""
    done = step / last
    row = {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": 0.4 + 6 * math.exp(-6 * done) + noise.random() * 0.2,
        "grad_norm": 1.5 + noise.random() * (20 if noise.random() < 0.01 else 1),
        "learning_rate": 1e-3 * min(1, 10 * done) * (1 - 0.9 * done),
        "value_learning_rate": 1e-2 * min(1, 10 * done),
    }
    for i, path in enumerate(MEMORIES):
        used = 0.9 - 0.2 * i * done + 0.03 * noise.random()
        figures = (
            used,
            min(1.0, used + done / 4),
            3.2 - i * done / 2,
            0.5 + i * done,
            0.1 + 0.15 * i * done,
            0.3 + done / 9,
        )
        names = ("slots_used", "slots_ever", "entropy", "kl", "top_1pct", "read_norm")
        row |= {f"{path}.{name}": figure for name, figure in zip(names, figures, strict=True)}
    row |= {f"{POOL}.moved": 0.02 * (1 - 0.9 * done), f"{POOL}.lost": 0.1 * done}
    row |= {f"{ROUTER}.load_max": 1.2 + noise.random() / 5, f"{ROUTER}.load_entropy": 1.3}
    return row


def speed(step: int, *, started: bool, since: int) -> dict[str, Any]:
    row = {"step": step, "seconds": (step - since) * 0.05, "training_seconds": step * 0.05}
    row |= {"tokens_per_second": 3840.0 + step % 7, "mfu": 0.31}
    row |= {"memory_bandwidth": 0.42, "waiting_for_data": 0.01}
    return row | ({"started": True} if started else {})


def make_run(
    folder: Path,
    rows: int = 40,
    *,
    starts: tuple[int, ...] = (1,),
    every: int = 1,
    ended: str | None = "done",
    **given: Any,
) -> Path:
    """A run directory of `rows` logged steps whose processes began at `starts`; each row of metrics holds `given`."""
    last, noise = rows * every, random.Random(0)
    plan = planned(folder, f"train.steps={last}")
    run = folder / "run"
    run.mkdir()
    (run / "plan.json").write_text(plan.to_json())
    steps = [every * (i + 1) for i in range(rows)]
    scored = {steps[round(i * (rows - 1) / 8)] for i in range(9)}
    with (run / "metrics.jsonl").open("w") as file:
        for step in steps:
            row = metrics(step, last, noise)
            row |= (
                {"held_out_loss": 0.7 + 5 * math.exp(-5 * step / last), "recall": step / last / 2}
                if step in scored
                else {}
            )
            file.write(json.dumps(row | given) + "\n")
    with (run / "speed.jsonl").open("w") as file:
        for step in steps:
            since = max(start for start in starts if start <= max(step, starts[0]))
            file.write(json.dumps(speed(step, started=step in starts, since=since)) + "\n")
    texts = [
        {"step": steps[i], "prompt": "Flights to ", "text": f"<b>{i}</b> land & take off"}
        for i in range(0, rows, max(rows // 15, 1))
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    write(run / "run.json", json.dumps({"format_version": 2, "run_id": "abacus"}))
    write(run / f"step-{last:08d}" / "manifest.json", json.dumps({"step": last, "memforge": "9.9.9"}))
    if ended is not None:
        (run / "summary.json").write_text(json.dumps(summary(plan, last, ended)))
    return run


def summary(plan: Plan, steps: int, ended: str) -> dict[str, Any]:
    return {
        "name": plan.name,
        "model_hash": plan.model.model_hash,
        "steps": steps,
        "epochs": 2.5,
        "params": 1,
        "active_params": 1,
        "flops_per_token": 123456,
        "data": {"kind": "facts", "facts": 12, "corpus_sha256": "ab" * 32},
        "baselines": {"majority": 0.125},
        "final": {"loss": 0.5},
        "training_seconds": 4000.0,
        "checkpoint": f"step-{steps:08d}",
        "ended": ended,
        "exposures_per_fact": 7.5,
        "caveats": [],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, edit: Callable[[int, dict[str, Any]], None]) -> None:
    """Edit each row of a file of lines."""
    rows = lines(path)
    for i, row in enumerate(rows):
        edit(i, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record_of(run: Path) -> dict[str, Any]:
    return run_record(read_run(run))
