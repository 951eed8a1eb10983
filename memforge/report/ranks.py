"""What a dry run has found of one rank, beside the ledger."""

from typing import Any

from memforge.report.console import console, print_whole
from memforge.report.cost import si, titled_table


def show_dry_run(name: str, found: dict[str, Any]) -> None:
    """One table: what the rank holds, as it was walked through and as the ledger has it."""
    page, walked, ledger = console(), found["walked"], found["ledger"]
    axes = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    page.print(
        f"{name}  rank {walked['rank']:,} of {found['ranks']:,} ({axes})  sequences of each pass: "
        f"{', '.join(map(str, walked['passes']))}  walked through in {walked['seconds']:.1f} s\n",
        soft_wrap=True,
    )
    table = titled_table("What the rank holds", ("", "walked through", "ledger", "walked / ledger"))
    for what, unit in (("params", ""), ("weights", "B"), ("optimizer", "B"), ("peak", "B")):
        here, there = walked[what], ledger[what]
        table.add_row(what, *(f"{n:,}" if not unit else si(n, unit) for n in (here, there)), f"{here / there:.3f}")
    print_whole(page, table)
