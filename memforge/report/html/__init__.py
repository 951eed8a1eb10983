"""Profiles and runs as HTML files that need no network: drawn figures, and every number in tables."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from memforge.report.cost import conventions, holds_it, milliseconds, ranges, si
from memforge.report.html import figures
from memforge.report.html.curves import RunFigures
from memforge.report.run import Run, read_run, run_record


def profile_page(record: dict[str, Any]) -> str:
    """The page of one profile record, as `profile --json` prints it."""
    kinds = list(dict.fromkeys([*record["params"]["by_kind"], *record["flops_per_token"]["by_kind"]]))
    return (
        _environment()
        .get_template("profile.html.j2")
        .render(
            r=record,
            kinds=kinds,
            shares=figures.shares(record, kinds),
            layers=figures.layers(record),
            roofline=figures.roofline(record),
            memory=figures.memory(record),
            conventions=conventions(),
            measured=record.get("measured"),
        )
    )


def run_page(run: Path | Run) -> str:
    """The page of a run, or of a run directory. Raises StorageError when that is damaged."""
    read = run if isinstance(run, Run) else read_run(run)
    record = run_record(read)
    shown = RunFigures(read, record)
    template = _environment().get_template("run.html.j2")
    return template.render(r=record, figures=shown, samples=shown.samples(), num_samples=len(read.samples))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("memforge.report.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "si": si,
        "ranges": ranges,
        "milliseconds": milliseconds,
        "holds_it": holds_it,
        "number": lambda n: f"{n:,}",
    }
    environment.globals["gauge"] = figures.gauge
    return environment
