"""Two specs side by side as tables."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from memforge.errors import printable
from memforge.report.cost import si, titled_table
from memforge.report.explain import change
from memforge.spec.load import shown_value


def difference_tables(found: dict[str, Any]) -> Iterator[Table]:
    """The keys that differ, then what follows from them."""
    names = [printable(name) for name in found["names"]]
    model = "the same model" if found["same_model"] else "different models"
    keys = titled_table(f"Keys that differ: {len(found['keys'])} ({model})", ("key", *names))
    for name, values in found["keys"].items():
        keys.add_row(printable(name), *("-" if v is None else printable(shown_value(v)) for v in values))
    yield keys
    axes = titled_table(f"What follows, on 1 x {found['seq_len']:,} tokens", ("", *names, "change"))
    for axis, (before, after) in found["axes"].items():
        axes.add_row(axis, f"{before:,}", f"{after:,}", change(before, after))
    for kind, figures in found["kinds"].items():
        for what, (before, after) in figures.items():
            if before != after:
                axes.add_row(f"  {kind} {what}", f"{before:,}", f"{after:,}", change(before, after))
    for what, (before, after) in found["memory"].items():
        axes.add_row(f"memory {what.replace('_', ' ')}", si(before, "B"), si(after, "B"), change(before, after))
    yield axes
