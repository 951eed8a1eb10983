"""The last thing training and comparing print: one table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from memforge.report.console import console, plain, print_whole
from memforge.report.cost import si, titled_table


def show_runs(summaries: Sequence[dict[str, Any]]) -> None:
    """The table of the runs, then what must be said about their models."""
    print_whole(console(), run_table(summaries))
    for summary in summaries:
        for caveat in summary.get("caveats", ()):
            plain(f"note: {summary['name']}: {caveat}")


def run_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """One row a run: size, cost, what it was shown, what it recalls."""
    facts = all("recall" in s["final"] and "exposures_per_fact" in s for s in summaries)
    columns = ["model", "params", "FLOPs/token", "steps", "loss", "held-out loss"]
    columns += ["facts", "exposures", "recall", "majority", "copy"] if facts else []
    table = titled_table("", columns)
    for s in summaries:
        final = s["final"]
        row = [s["name"], f"{s['params']:,}", si(s["flops_per_token"]), f"{s['steps']:,}"]
        row += [f"{final['loss']:.4f}" if "loss" in final else "", _held_out(final)]
        if facts:
            row += [f"{s['data']['facts']:,}", f"{s['exposures_per_fact']:.1f}", f"{final['recall']:.1%}"]
            row += [f"{s['baselines']['majority']:.1%}", f"{s['baselines']['copy_from_name']:.1%}"]
        table.add_row(*row)
    return table


def _held_out(final: dict[str, float]) -> str:
    """The loss on held-out data, that of each part of a mixture by name."""
    if "held_out_loss" in final:
        return f"{final['held_out_loss']:.4f}"
    parts = {name.partition(".")[2]: value for name, value in final.items() if name.startswith("held_out_loss.")}
    return ", ".join(f"{part} {value:.4f}" for part, value in parts.items())
