"""A run directory as plain data: rows as columns of numbers, where the run stands, what a reader should worry about."""

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from memforge.blocks.base import KindPlan
from memforge.errors import StorageError
from memforge.plan import ModelPlan, Plan, read_plan
from memforge.storage import storage_errors

METRICS, SPEED, SAMPLES, SUMMARY, RUN = "metrics.jsonl", "speed.jsonl", "samples.jsonl", "summary.json", "run.json"
SPEEDS = ("tokens_per_second", "mfu", "memory_bandwidth", "waiting_for_data")
LAYER_MEASURES = ("slots_used", "slots_ever", "entropy", "kl", "top_1pct", "read_norm")
STEP = re.compile(r"step-([0-9]{8,})")  # the directory of a checkpoint
UNENDED = "running, or killed"

# A memory is judged by the slots it never read once it has made so many reads for each of them: spread evenly, these
# would miss one slot in 22,000 (exp(-10)).
READS_PER_SLOT = 10
# Of a memory that was read so often, half of its parameters have had no gradient.
FEW_SLOTS = 0.5
# Falling: the last quarter of the rows against the quarter before; a share of some thousand slots varies by less.
FALLING, MIN_ROWS_FOR_TREND = 0.95, 8
# Half of the weight on 1% of the slots: a table of a hundredth of the size would do as well for half of what is read.
TOP_HEAVY = 0.5
# At twice an even share, experts of capacity factor 1.25, a common one, drop more than a third of that expert's tokens.
BUSY_EXPERT = 2.0
# Rounding to nearest loses what is below half a unit in the last place; above this share, rows visibly stop learning.
LOST_UPDATES = 0.2
# A tenth of the device's time is more than what most changes of a model's speed are about.
WAITING = 0.1


@dataclass(frozen=True)
class Series:
    """Values at steps, both of one length; NaN only where gaps were asked for."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Rows:
    """Rows of numbers as columns, each as long as `steps`, which ascend; NaN where a row has no such number."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(default_factory=dict)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Append a row. A resumed run makes steps again: rows from this step on give way to it."""
        while self.steps and self.steps[-1] >= step:
            self._drop_last()
        for name, value in numbers.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = array("d")
            if len(column) < len(self.steps):
                self._fill(column)
            column.append(value)
        self.steps.append(step)

    def finish(self) -> None:
        """Make all columns equally long."""
        for column in self.columns.values():
            self._fill(column)

    def series(self, name: str, *, gaps: bool = False) -> Series:
        """The column's numbers and their steps; with `gaps`, also the rows that have none."""
        column = self.columns.get(name)
        if column is None:
            return Series((), ())
        if gaps:
            return Series(self.steps, column)
        kept = [(s, v) for s, v in zip(self.steps, column, strict=True) if v == v]
        return Series([s for s, _ in kept], [v for _, v in kept])

    def latest(self, name: str) -> float | None:
        """The last number of a column."""
        return next((v for v in reversed(self.columns.get(name, ())) if v == v), None)

    def named(self, start: str) -> list[str]:
        """The columns of a score: `start` itself and `start.PART` of a mixture."""
        return [name for name in self.columns if name == start or name.startswith(f"{start}.")]

    def _drop_last(self) -> None:
        self.steps.pop()
        for column in self.columns.values():
            del column[len(self.steps) :]

    def _fill(self, column: "array[float]") -> None:
        column.extend([math.nan] * (len(self.steps) - len(column)))


class RunSummary(BaseModel):
    """summary.json as far as it is reported; newer fields are let through, absent ones are None."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    steps: int | None = None
    epochs: float | None = None
    exposures_per_fact: float | None = None
    flops_per_token: int | float | None = None
    data: dict[str, Any] = {}
    baselines: dict[str, float] = {}
    training_seconds: float | None = None
    final: dict[str, float] = {}
    checkpoint: str | None = None
    ended: str | None = None
    caveats: list[str] = []


class Sample(BaseModel):
    """A text that the model wrote while it was trained."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """All that a run directory says, without its weights. `starts` are the steps of each process's first row."""

    directory: str
    plan: Plan
    metrics: Rows
    speed: Rows
    starts: tuple[int, ...]
    samples: tuple[Sample, ...]
    summary: RunSummary | None
    facts: dict[str, Any]


def read_run(directory: Path) -> Run:
    """The run in a directory, finished, under way or killed. Raises StorageError when it has no plan or is damaged."""
    if not directory.is_dir():
        raise StorageError(f"{directory}: no such run directory")
    plan = read_plan(directory / "plan.json")
    metrics, speed, starts = Rows(), Rows(), list[int]()
    for _, row in _rows(directory / METRICS):
        metrics.add(*row)
    for started, row in _rows(directory / SPEED):
        speed.add(*row)
        starts = [step for step in starts if step < row[0]] + ([row[0]] if started else [])
    metrics.finish()
    speed.finish()
    samples = tuple(_sample(*line) for line in _lines(directory / SAMPLES))
    summary = _document(directory / SUMMARY)
    return Run(
        directory=str(directory),
        plan=plan,
        metrics=metrics,
        speed=speed,
        starts=tuple(starts),
        samples=samples,
        summary=None if summary is None else _validated(RunSummary, summary, directory / SUMMARY),
        facts={**(_document(directory / RUN) or {}), **_versions(directory)},
    )


def _versions(directory: Path) -> dict[str, Any]:
    """The packages that wrote the newest checkpoint."""
    # Steps have at least eight digits: longer ones are of later steps.
    found = max(directory.glob("step-*/manifest.json"), key=lambda path: (len(path.parent.name), path), default=None)
    manifest = (found and _document(found)) or {}
    return {name: manifest[name] for name in ("memforge", "torch") if name in manifest}


def _lines(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """The objects in a file of lines, with their numbers. A last line that was cut short is left out."""
    if not path.exists():
        return
    with storage_errors(path), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                record = json.loads(raw, parse_constant=_not_json)
            except (ValueError, RecursionError) as error:
                if not raw.endswith(b"\n"):
                    return
                raise _damaged(path, number, "not JSON") from error
            if not isinstance(record, dict):
                raise _damaged(path, number, "not an object")
            yield path, number, record


def _not_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def _damaged(path: Path, number: int, why: str) -> StorageError:
    return StorageError(f"{path}:{number}: damaged: {why}")


def _rows(path: Path) -> Iterator[tuple[bool, tuple[int, dict[str, float]]]]:
    """Whether a process started with a row, and its step and numbers."""
    for _, number, record in _lines(path):
        step = record.pop("step", None)
        if type(step) is not int or not 0 <= step < 2**63:
            raise _damaged(path, number, "no step")
        started = record.pop("started", False) is True
        yield started, (step, dict(_numbers(path, number, record)))


def _numbers(path: Path, number: int, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if type(value) is float or type(value) is int:
            try:
                finite = math.isfinite(value)
            except OverflowError:
                finite = False
            if not finite:
                raise _damaged(path, number, f"`{name}` is not finite")
            yield name, float(value)
        elif isinstance(value, dict | list):
            raise _damaged(path, number, f"`{name}` is not a number")


def _sample(path: Path, number: int, record: dict[str, Any]) -> Sample:
    try:
        return Sample.model_validate(record)
    except ValidationError as error:
        raise _damaged(path, number, f"`{error.errors()[0]['loc'][0]}`") from None


def _document(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no such file."""
    if not path.exists():
        return None
    with storage_errors(path):
        raw = path.read_bytes()
    try:
        record = json.loads(raw, parse_constant=_not_json)
    except (ValueError, RecursionError):
        raise StorageError(f"{path}: damaged: not JSON") from None
    if not isinstance(record, dict):
        raise StorageError(f"{path}: damaged: not an object")
    return record


def _validated(kind: type[RunSummary], record: dict[str, Any], path: Path) -> RunSummary:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StorageError(f"{path}: damaged at `{where}`") from None


def readers(plan: ModelPlan) -> list[KindPlan]:
    """The blocks that read a pool, in order."""
    return [part for part in plan.sublayers() if part.pool_path() is not None]


def num_slots(plan: ModelPlan, reader: KindPlan) -> int:
    """Rows of the pool that a block reads."""
    return next(row.shape[0] for row in plan.params if row.owner == reader.pool_path())


def run_record(run: Run) -> dict[str, Any]:
    """Where a run stands, as `inspect --json` prints it; None is what its files do not say."""
    plan, metrics, train = run.plan, run.metrics, run.plan.run.train
    step = _last_step(run)
    tokens = metrics.latest("tokens")
    layers = [_layer_record(run, reader) for reader in readers(plan.model)]
    record = {
        "run": run.directory,
        "name": plan.name,
        "model_hash": plan.model.model_hash,
        "run_hash": plan.run.run_hash,
        "state": _state(run),
        "params": sum(row.numel for row in plan.model.params),
        "active_params": sum(row.active for row in plan.model.params),
        "flops_per_token": None if run.summary is None else run.summary.flops_per_token,
        "step": step,
        "steps": None if train is None else train.steps,
        "tokens": None if tokens is None else int(tokens),
        "loss": metrics.latest("loss"),
        "scores": _last_scores(run),
        "grad_norm": metrics.latest("grad_norm"),
        "learning_rate": metrics.latest("learning_rate"),
        "value_learning_rate": metrics.latest("value_learning_rate"),
        "speed": {name: run.speed.latest(name) for name in SPEEDS},
        "seconds": _seconds(run),
        "starts": list(run.starts),
        "layers": layers,
        "pools": list(_pool_records(run)),
        "routers": list(_router_records(run)),
        "caveats": list(plan.model.caveats()),
    }
    return record | {"warnings": list(_warnings(run, record))}


def scores(run: Run) -> list[str]:
    """The columns of held-out scores, losses first."""
    return [*run.metrics.named("held_out_loss"), *run.metrics.named("recall")]


def _last_scores(run: Run) -> dict[str, float | None]:
    """The newest of each score. A run that stopped at its budget has scored itself in its summary only."""
    found = {name: run.metrics.latest(name) for name in scores(run)}
    if run.summary is None or _state(run) == UNENDED:
        return found
    return found | {n: v for n, v in run.summary.final.items() if n.partition(".")[0] in ("held_out_loss", "recall")}


def _last_step(run: Run) -> int:
    return max([*run.metrics.steps[-1:], *run.speed.steps[-1:]], default=0)


def _state(run: Run) -> str:
    """How the run ended; the summary of a run that was resumed since is of an earlier step."""
    summary = run.summary
    if summary is None or (summary.steps is not None and _last_step(run) > summary.steps):
        return UNENDED
    return UNENDED if summary.ended == "running" else summary.ended or "ended"


def _seconds(run: Run) -> float | None:
    """Seconds of training in all processes."""
    if run.summary is not None and run.summary.training_seconds is not None and _state(run) != UNENDED:
        return run.summary.training_seconds
    return run.speed.latest("training_seconds")


def _layer_record(run: Run, reader: KindPlan) -> dict[str, Any]:
    slots = num_slots(run.plan.model, reader)
    found = {name: run.metrics.latest(f"{reader.path}.{name}") for name in LAYER_MEASURES}
    entropy = found["entropy"]
    share = None if entropy is None or slots < 2 else entropy / math.log(slots)
    return {"path": reader.path, "pool": reader.pool_path(), "slots": slots, **found, "entropy_share": share}


def tensors(run: Run) -> list[str]:
    """The pool tensors whose movement the run has recorded, in the plan's order."""
    return [row.path for row in run.plan.model.params if f"{row.path}.moved" in run.metrics.columns]


def routers(run: Run) -> list[KindPlan]:
    """The blocks whose load the run has recorded, in order."""
    return [part for part in run.plan.model.sublayers() if f"{part.path}.load_max" in run.metrics.columns]


def _pool_records(run: Run) -> Iterator[dict[str, Any]]:
    for path in tensors(run):
        yield {"tensor": path, **{name: run.metrics.latest(f"{path}.{name}") for name in ("moved", "lost")}}


def _router_records(run: Run) -> Iterator[dict[str, Any]]:
    for part in routers(run):
        measures = ("load_max", "load_entropy")
        yield {"path": part.path, **{name: run.metrics.latest(f"{part.path}.{name}") for name in measures}}


def _warnings(run: Run, record: dict[str, Any]) -> Iterator[str]:
    """What a reader should worry about, in plain words."""
    yield from _loss_warnings(run, record)
    for layer in record["layers"]:
        yield from _layer_warnings(run, layer, record["tokens"] or 0)
    for router in record["routers"]:
        if router["load_max"] is not None and router["load_max"] > BUSY_EXPERT:
            yield f"{router['path']}: its busiest expert gets {router['load_max']:.1f} times an even share"
    for pool in record["pools"]:
        if pool["lost"] is not None and pool["lost"] > LOST_UPDATES:
            yield (
                f"{pool['tensor']}: {pool['lost']:.0%} of the elements of updated rows did not change: the updates are "
                "too small for 16 bits and are lost"
            )
    waiting = record["speed"]["waiting_for_data"]
    if waiting is not None and waiting > WAITING:
        yield f"training waits for data {waiting:.0%} of the time"


def _loss_warnings(run: Run, record: dict[str, Any]) -> Iterator[str]:
    losses = run.metrics.series("loss", gaps=True)
    missing = [step for step, loss in zip(losses.steps, losses.values, strict=True) if loss != loss]
    if run.metrics.steps and not losses:
        missing = list(run.metrics.steps)
    if missing:
        rows = "1 row has" if len(missing) == 1 else f"{len(missing):,} rows have"
        yield f"the loss was not finite: {rows} none, the last at step {missing[-1]:,}"
    elif record["state"] == "non-finite":
        yield f"the run ended at step {record['step']:,} because its loss or gradients were not finite"
    skipped = run.metrics.latest("skipped")
    if skipped:
        yield f"steps were left out because their gradients were not finite: {skipped:,.0f}"


def _layer_warnings(run: Run, layer: dict[str, Any], tokens: int) -> Iterator[str]:
    path, ever, top = layer["path"], layer["slots_ever"], layer["top_1pct"]
    reader = next(part for part in readers(run.plan.model) if part.path == path)
    reads = reader.pool_reads()
    reads_per_slot = tokens * reads.draws * reads.rows / layer["slots"] if reads is not None else math.inf
    trend = trend_of(run.metrics.series(f"{path}.slots_used").values)
    if ever is not None and ever < FEW_SLOTS and reads_per_slot >= READS_PER_SLOT and trend is not None:
        before, now = trend
        if now < FALLING * before:
            yield (
                f"{path}: only {ever:.1%} of {layer['slots']:,} slots were ever read, and the share in use is falling "
                f"({before:.1%} to {now:.1%})"
            )
    if top is not None and top > TOP_HEAVY:
        yield f"{path}: the most read 1% of its slots take {top:.0%} of the weight"


def trend_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the third and the last quarter of the values; None of too few of them."""
    if len(values) < MIN_ROWS_FOR_TREND:
        return None
    quarter = len(values) // 4
    return sum(values[-2 * quarter : -quarter]) / quarter, sum(values[-quarter:]) / quarter
