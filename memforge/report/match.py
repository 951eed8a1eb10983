"""The candidates of a match as a table."""

from collections.abc import Sequence

from rich.table import Table

from memforge.cost import as_number
from memforge.match import Candidate, Match
from memforge.report.cost import titled_table


def match_table(name: str, baseline: str, seq_len: int, found: Match, candidates: Sequence[Candidate]) -> Table:
    """One row a candidate, best first: its values, and each axis as a ratio to the baseline's."""
    judged = [axis for axis in found.best.axes if axis.tolerance is not None]
    title = f"{name} matched to {baseline} at seq_len {seq_len}"
    columns = [f.key.name for f in found.free]
    columns += [cell for axis in judged for cell in (axis.name, f"/ {as_number(axis.baseline):,}")]
    table = titled_table(title, [*columns, ""])
    for candidate in candidates:
        cells = [f"{value:,}" for value in candidate.values]
        for axis in candidate.axes:
            if axis.tolerance is not None:
                cells += [f"{as_number(axis.value):,}", f"{axis.ratio:.5f}"]
        table.add_row(*cells, "ok" if candidate.ok else "outside")
    return table
