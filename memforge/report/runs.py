"""The last thing training and comparing print: one table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from memforge.report.console import console, plain, print_whole
from memforge.report.cost import si


def show_runs(summaries: Sequence[dict[str, Any]]) -> None:
    """The table of the runs, then what must be said about their models."""
    print_whole(console(), run_table(summaries))
    for summary in summaries:
        for caveat in summary.get("caveats", ()):
            plain(f"note: {summary['name']}: {caveat}")


def run_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """One row a run: size, cost, what it was shown, what it recalls."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    facts = all("recall" in s["final"] for s in summaries)
    columns = ["model", "params", "FLOPs/token", "steps", "loss", "held-out loss"]
    columns += ["facts", "exposures", "recall", "majority", "copy"] if facts else []
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for s in summaries:
        final = s["final"]
        row = [s["name"], f"{s['params']:,}", si(s["flops_per_token"]), f"{s['steps']:,}"]
        row += [f"{final['loss']:.4f}", f"{final.get('held_out_loss', float('nan')):.4f}"]
        if facts:
            row += [f"{s['data']['facts']:,}", f"{s['exposures_per_fact']:.1f}", f"{final['recall']:.1%}"]
            row += [f"{s['baselines']['majority']:.1%}", f"{s['baselines']['copy_from_name']:.1%}"]
        table.add_row(*row)
    return table
