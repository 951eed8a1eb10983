"""One key explained, and two specs compared, as text."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from memforge.errors import printable
from memforge.explain import Explanation
from memforge.report.cost import titled_table
from memforge.spec.load import shown_value

# Longer lists of parameters and ops end with how many more there are.
SHOWN = 8


def explanation_lines(found: Explanation) -> Iterator[str]:
    """What stands above the table of effects."""
    for path, value, origin in found.places:
        yield f"{path} = {printable(shown_value(value))}"
        yield f"  from      {printable(origin)}"
    for name, text in (("meaning", found.meaning), ("unit", found.unit), ("allowed", found.allowed)):
        if text:
            yield f"  {name:9} {text}"
    for name, paths in (("shapes", found.parameters), ("ops", found.ops)):
        if paths:
            more = [f"and {len(paths) - SHOWN} more"] if len(paths) > SHOWN else []
            yield f"  {name:9} {', '.join([*paths[:SHOWN], *more])}"
    if not found.of_model:
        yield "  changes   nothing in the model: it is about data, training or a claim"
    elif not found.effects:
        yield "  changes   not shown: no other value was tried"
    elif not found.parameters and not found.ops:
        yield "  changes   no shape and no FLOPs of the model"


def effect_table(found: Explanation) -> Table:
    """Each axis with another value of the key, and by how much it differs."""
    axes = found.effects[0].axes
    columns = [cell for axis in axes for cell in (axis, "change")]
    table = titled_table(f"{found.key} at another value", ("value", *columns))
    for effect in found.effects:
        cells = []
        for before, after in effect.axes.values():
            cells += [f"{after:,}", change(before, after)]
        table.add_row(f"{effect.place} = {printable(shown_value(effect.value))}", *cells)
    return table


def change(before: float, after: float) -> str:
    """As a share of what it was."""
    if before == after:
        return "none"
    return f"{after / before - 1:+.3%}" if before else "new"


def explanation_record(found: Explanation) -> dict[str, Any]:
    return {
        "key": found.key,
        "meaning": found.meaning,
        "unit": found.unit,
        "allowed": found.allowed,
        "places": [{"path": path, "value": value, "from": origin} for path, value, origin in found.places],
        "parameters": list(found.parameters),
        "ops": list(found.ops),
        "effects": [
            {
                "places": e.place,
                "value": e.value,
                "axes": {axis: {"now": a, "then": b} for axis, (a, b) in e.axes.items()},
            }
            for e in found.effects
        ],
    }
