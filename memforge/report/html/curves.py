"""What the page of a run shows: its charts, the numbers behind them, and its facts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memforge.blocks.base import KindPlan
from memforge.report.cost import si
from memforge.report.html.charts import SMALL, WIDE, Chart, Look, chart
from memforge.report.inspect import duration, number, score_name, share
from memforge.report.run import Rows, Run, Sample, readers, routers, scores, tensors

# Rows of a table of numbers: enough to read a curve from, and a page of a deep model stays within some megabytes.
TABLE_ROWS = 100
# The newest texts that are shown; a sample every thousand steps makes hundreds.
SAMPLES = 12

PERCENT, PLAIN = Look(percent=True, from_zero=True), Look(from_zero=True)
Cell = tuple[float, str] | None


@dataclass(frozen=True)
class Numbers:
    """A table behind charts. `left_out` says which rows are not in it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: str


@dataclass(frozen=True)
class Group:
    """Charts that belong together, and their numbers in tables with a name."""

    title: str
    charts: tuple[Chart, ...]
    tables: tuple[tuple[str, Numbers], ...]


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, its name in the rows, and how its values are shown."""

    head: str
    name: str
    look: Look = PLAIN


def numbers(rows: Rows, columns: Sequence[Column], *, file: str = "metrics.jsonl") -> Numbers:
    """The columns at no more than TABLE_ROWS steps, evenly chosen among the rows that have any of them."""
    found = [rows.columns[column.name] for column in columns]
    having = [i for i in range(len(rows.steps)) if any(column[i] == column[i] for column in found)]
    chosen = having
    if len(having) > TABLE_ROWS:
        chosen = [having[i * (len(having) - 1) // (TABLE_ROWS - 1)] for i in range(TABLE_ROWS)]
    left_out = f"{len(chosen)} of {len(having):,} rows; {file} has all" if len(chosen) < len(having) else ""

    def cell(column: Column, i: int) -> Cell:
        value = rows.columns[column.name][i]
        return (value, column.look.shown(value)) if value == value else None

    made = tuple(((rows.steps[i], f"{rows.steps[i]:,}"), *(cell(column, i) for column in columns)) for i in chosen)
    return Numbers(("step", *(column.head for column in columns)), made, left_out)


class RunFigures:
    """Everything that the page of a run draws."""

    def __init__(self, run: Run, record: dict[str, Any]) -> None:
        self.run, self.record = run, record
        steps = [*run.metrics.steps, *run.speed.steps] or [0]
        self.steps = (min(steps), max(steps))

    def tiles(self) -> Iterator[Tile]:
        """Where the run stands, in large print."""
        r, speed = self.record, self.record["speed"]
        of = f"of {r['steps']:,}, {r['step'] / r['steps']:.0%}" if r["steps"] else ""
        yield Tile("Step", f"{r['step']:,}", of)
        if r["tokens"] is not None:
            yield Tile("Tokens", si(r["tokens"]), f"{r['tokens']:,}")
        losses = self.run.metrics.series("loss")
        if losses:
            yield Tile("Loss", f"{losses.values[-1]:.4f}", f"from {losses.values[0]:.4f}")
        yield from self._score_tiles()
        if speed["tokens_per_second"] is not None:
            rates = sorted(self.run.speed.series("tokens_per_second").values)
            yield Tile(
                "Tokens per second",
                si(round(speed["tokens_per_second"])),
                f"median {si(round(rates[len(rates) // 2]))}",
            )
        if speed["mfu"] is not None:
            yield Tile("MFU", share(speed["mfu"]), "of peak FLOPs")
        if r["seconds"] is not None:
            processes = len(r["starts"])
            yield Tile("Training time", duration(r["seconds"]), f"in {processes} processes" if processes > 1 else "")

    def _score_tiles(self) -> Iterator[Tile]:
        for name in scores(self.run):
            found = self.run.metrics.series(name)
            if not found or "." in name:  # the parts of a mixture are in the chart's table
                continue
            recall = name == "recall"
            best = max(found.values) if recall else min(found.values)
            shown = (f"{v:.1%}" if recall else f"{v:.4f}" for v in (found.values[-1], best))
            yield Tile(score_name(name).capitalize(), next(shown), f"best {next(shown)}")

    def loss(self) -> list[Group]:
        """Training and held-out loss on one axis, what is recalled on another."""
        metrics = self.run.metrics
        held_out, recall = metrics.named("held_out_loss"), metrics.named("recall")
        lines = [("training loss", metrics.series("loss", gaps=True))]
        lines += [(score_name(name), metrics.series(name)) for name in held_out]
        columns = [Column(score_name(name), name, Look()) for name in held_out]
        columns += [Column(score_name(name), name, PERCENT) for name in recall]
        charts = [self._chart("Loss", lines, WIDE, Look(log=True))]
        if recall:
            shown = [(score_name(name), metrics.series(name)) for name in recall]
            charts.append(self._chart("Recall of held-out facts", shown, WIDE, PERCENT))
        groups = self._group("Loss", charts, [Column("training loss", "loss", Look())])
        # Most rows have no scores: in one table with the loss, few of those that have would be chosen.
        scored = [("Scores", numbers(metrics, columns))] if columns else []
        return [replace(group, tables=(*group.tables, *scored)) for group in groups]

    def optimization(self) -> list[Group]:
        """Learning rates and the norm of gradients."""
        names = {"learning_rate": "dense parameters", "value_learning_rate": "value pools"}
        rates = [(name, self.run.metrics.series(column)) for column, name in names.items()]
        norm = [("gradient norm", self.run.metrics.series("grad_norm"))]
        charts = [
            self._chart("Learning rate", rates, SMALL, PLAIN),
            self._chart("Gradient norm before clipping", norm, SMALL, Look(log=True)),
        ]
        columns = [Column(f"learning rate, {name}", column) for column, name in names.items()]
        columns += [Column("gradient norm", "grad_norm"), Column("steps left out", "skipped")]
        return self._group("Optimization", charts, columns)

    def speed(self) -> list[Group]:
        """Tokens per second, and how much of the device that takes."""
        columns = (
            Column("tokens per second", "tokens_per_second"),
            Column("MFU", "mfu", PERCENT),
            Column("memory bandwidth", "memory_bandwidth", PERCENT),
            Column("waiting for data", "waiting_for_data", PERCENT),
        )
        rows = self.run.speed
        charts = [
            self._chart(c.head[0].upper() + c.head[1:], [(c.head, rows.series(c.name))], SMALL, c.look) for c in columns
        ]
        return self._group("Speed", charts, [Column("seconds", "seconds"), *columns], rows=rows, file="speed.jsonl")

    def layers(self) -> list[Group]:
        """Small charts of each layer that reads a pool."""
        return [group for reader in readers(self.run.plan.model) for group in self._layer(reader)]

    def _layer(self, reader: KindPlan) -> list[Group]:
        path = reader.path
        columns = [
            Column("since the last row", f"{path}.slots_used", PERCENT),
            Column("ever read", f"{path}.slots_ever", PERCENT),
            Column("entropy", f"{path}.entropy"),
            Column("KL to uniform", f"{path}.kl"),
            Column("top 1% of slots", f"{path}.top_1pct", PERCENT),
            Column("read norm / residual norm", f"{path}.read_norm"),
        ]
        used, ever, _, kl, top, norm = ((c.head, self.run.metrics.series(c.name)) for c in columns)
        charts = [
            self._chart("Share of slots read", [used, ever], SMALL, PERCENT),
            self._chart("KL of the reads to an even spread", [kl], SMALL, PLAIN),
            self._chart("Weight on the most read 1% of slots", [top], SMALL, PERCENT),
            self._chart("Norm of the read / of the residual", [norm], SMALL, PLAIN),
        ]
        return self._group(path, charts, columns)

    def pools(self) -> list[Group]:
        """How far rows move in an update, and what 16 bits lose of it."""
        groups = []
        for path in tensors(self.run):
            columns = [Column("moved", f"{path}.moved"), Column("lost", f"{path}.lost", PERCENT)]
            moved, lost = ((c.head, self.run.metrics.series(c.name)) for c in columns)
            charts = [
                self._chart("Norm of update / of its rows", [moved], SMALL, Look(from_zero=True, log=True)),
                self._chart("Elements lost to rounding", [lost], SMALL, PERCENT),
            ]
            groups += self._group(path, charts, columns)
        return groups

    def routers(self) -> list[Group]:
        """How evenly tokens are spread among experts."""
        groups = []
        for part in routers(self.run):
            columns = [
                Column("busiest expert / even", f"{part.path}.load_max"),
                Column("entropy", f"{part.path}.load_entropy"),
            ]
            busiest, entropy = ((c.head, self.run.metrics.series(c.name)) for c in columns)
            charts = [
                self._chart("Load of the busiest expert, 1 is even", [busiest], SMALL, PLAIN),
                self._chart("Entropy of the load, nats", [entropy], SMALL, PLAIN),
            ]
            groups += self._group(part.path, charts, columns)
        return groups

    def _chart(self, title: str, lines: Sequence[tuple[str, Any]], frame: Any, look: Look) -> Chart | None:
        return chart(title, lines, frame=frame, steps=self.steps, look=look, starts=self.run.starts)

    def _group(
        self,
        title: str,
        charts: Sequence[Chart | None],
        columns: Sequence[Column],
        *,
        rows: Rows | None = None,
        file: str = "metrics.jsonl",
    ) -> list[Group]:
        """The group of the charts that have something to show; none where none has."""
        drawn = tuple(chart for chart in charts if chart is not None)
        rows = rows or self.run.metrics
        there = [column for column in columns if column.name in rows.columns]
        return [Group(title, drawn, ((title, numbers(rows, there, file=file)),))] if drawn else []

    def layer_table(self) -> list[tuple[str, tuple[Cell, ...]]]:
        """The last numbers of each layer that reads a pool."""
        shares = dict.fromkeys(("slots_used", "slots_ever", "entropy_share"), share)
        looks = shares | {"kl": number, "top_1pct": share, "read_norm": number}
        return [
            (
                layer["path"],
                (
                    (layer["slots"], f"{layer['slots']:,}"),
                    *(None if layer[key] is None else (layer[key], shown(layer[key])) for key, shown in looks.items()),
                ),
            )
            for layer in self.record["layers"]
        ]

    def samples(self) -> list[Sample]:
        """The newest texts, newest first."""
        return list(reversed(self.run.samples[-SAMPLES:]))

    def facts(self) -> list[tuple[str, str]]:
        """What the run is: hashes, sizes, data, baselines, and what run.json says of where it ran."""
        r, summary = self.record, self.run.summary
        found: list[tuple[str, Any]] = [
            ("state", r["state"]),
            ("model hash", r["model_hash"]),
            ("run hash", r["run_hash"]),
            ("parameters", r["params"]),
            ("active parameters", r["active_params"]),
        ]
        if summary is not None:
            found += [("FLOPs per token", summary.flops_per_token), ("epochs", summary.epochs)]
            found += [("exposures per fact", summary.exposures_per_fact), ("checkpoint", summary.checkpoint)]
            found += [(f"data, {name.replace('_', ' ')}", value) for name, value in _flat(summary.data)]
            found += [(f"baseline, {name.replace('_', ' ')}", value) for name, value in summary.baselines.items()]
        found += _flat(self.run.facts)
        return [(name, _fact(value)) for name, value in found if value is not None]


def _flat(record: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a record of records, by dotted names."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) or math.isinf(value) else f"{value:,.6g}"
