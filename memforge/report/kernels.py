"""Compiled kernels as a table."""

from typing import Any

from rich.table import Table

from memforge.report.console import console, print_whole
from memforge.report.cost import titled_table

INSTRUCTIONS = ("load", "store", "fma", "mma", "other")


def show_kernels(records: list[dict[str, Any]]) -> None:
    print_whole(console(), kernel_table(records))


def kernel_table(records: list[dict[str, Any]]) -> Table:
    """One row a kernel and shape: config, registers, spills, shared memory, occupancy, loads, instruction mix."""
    columns = ("kernel", "dtype", "width", "k", "config", "registers", "spills", "shared", "occupancy", "128-bit loads")
    title = f"Kernels on {records[0]['target']}"
    table = titled_table(title, (*columns, *INSTRUCTIONS), left=("dtype", "config"))
    for r in records:
        config = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in r["config"].items())
        wide = "" if r["wide_share"] is None else f"{r['wide_share']:.0%}"
        table.add_row(
            r["op"], r["dtype"], str(r["width"]), str(r["k"]), config.replace("num_", ""), str(r["registers"]),
            str(r["spill_bytes"]), f"{r['shared_bytes']:,}", f"{r['occupancy']:.0%}", wide,
            *(str(r["instructions"][kind]) for kind in INSTRUCTIONS),
        )  # fmt: skip
    return table
