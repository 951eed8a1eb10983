"""The profile as one HTML file that needs no network: drawn figures, and every number in tables."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from memforge.report.cost import conventions, milliseconds, ranges, si
from memforge.report.html import figures


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


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("memforge.report.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si, "ranges": ranges, "milliseconds": milliseconds, "number": lambda n: f"{n:,}"}
    environment.globals["gauge"] = figures.gauge
    return environment
