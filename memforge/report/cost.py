"""The ledger and the parity verdict as tables."""

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from memforge import __version__
from memforge.cost import CONVENTIONS, EXCLUDED
from memforge.parity import Parity
from memforge.report.console import console, plain, print_whole

_PREFIXES = tuple((10 ** (3 * (i + 1)), prefix) for i, prefix in reversed([*enumerate("kMGTPEZY")]))


def si(value: int | float, unit: str = "") -> str:
    """1,234,567 as "1.235M", with a unit as "1.235 MB"; numbers below 10,000 in full."""
    gap = " " if unit else ""
    if value < 10_000:
        return f"{value:,.6g}{gap}{unit}"
    scale, prefix = next((s, p) for s, p in _PREFIXES if value >= s)
    return f"{value / scale:.4g}{gap}{prefix}{unit}"


def titled_table(title: str, columns: Iterable[str]) -> Table:
    """The look of every table: numbers to the right, no lines."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        min_width=len(title),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def kind_table(cost: dict[str, Any]) -> Table:
    """Parameters and FLOPs by kind."""
    params, flops = cost["params"], cost["flops_per_token"]
    table = titled_table("By kind", ("kind", "params", "active", "FLOPs/token", "share"))
    for kind in dict.fromkeys([*params["by_kind"], *flops["by_kind"]]):  # a tied head has FLOPs and no parameters
        spent = flops["by_kind"].get(kind, 0)
        total, active = params["by_kind"].get(kind, 0), params["active_by_kind"].get(kind, 0)
        table.add_row(kind, f"{total:,}", f"{active:,}", si(spent), f"{spent / flops['total']:.1%}")
    table.add_section()
    table.add_row("total", f"{params['total']:,}", f"{params['active']:,}", si(flops["total"]), "", style="bold")
    return table


def layer_table(cost: dict[str, Any]) -> Table:
    """One row for each run of alike layers. A shared pool is in no layer."""
    table = titled_table("By layer", ("layers", "blocks", "params", "active", "forward/token", "backward/token"))
    table.columns[1].justify = "left"
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer in cost["layers"]:
        names = " + ".join(
            block["kind"] + "".join(f" <- {pool}" for pool in block["reads"]) for block in layer["blocks"]
        )
        flops = layer["flops_per_token"]
        key = (names, layer["params"], layer["active_params"], flops["forward"], flops["backward"])
        groups.setdefault(key, []).append(layer["idx"])
    for (names, params, active, forward, backward), indices in groups.items():
        table.add_row(ranges(indices), names, f"{params:,}", f"{active:,}", si(forward), si(backward))
    for pool in cost["pools"]:
        readers = f"read by {ranges(pool['layers'])}"
        table.add_row(pool["path"], readers, f"{pool['params']:,}", f"{pool['active_params']:,}", "", "")
    return table


def ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5" and [1, 3, 5, 7] as "1, 3 .. 7"."""
    parts, i = [], 0
    while i < len(indices):
        step = indices[i + 1] - indices[i] if i + 1 < len(indices) else 0
        j = i + 1
        while j + 1 < len(indices) and indices[j + 1] - indices[j] == step:
            j += 1
        first, last = indices[i], indices[min(j, len(indices) - 1)]
        if step == 1:
            parts.append(f"{first}-{last}")
        elif step and j - i >= 3:
            parts.append(f"{first}, {indices[i + 1]} .. {last}")
        else:
            parts.append(str(first))
            j = i
        i = j + 1
    return ", ".join(parts)


def parity_table(parity: dict[str, Any]) -> Table:
    """Every axis beside the baseline's; axes without a tolerance are shown, not judged."""
    verdict = "holds" if parity["ok"] else "FAILS"
    table = titled_table(
        f"Parity with {parity['against']} at seq_len {parity['seq_len']}: {verdict}",
        ("axis", "this", "baseline", "ratio", "tolerance", ""),
    )
    for name, axis in parity["axes"].items():
        judged = axis["tolerance"] is not None
        verdict = ("ok" if axis["ok"] else "FAILS") if judged else "not claimed"
        tolerance = f"{axis['tolerance']:g}" if judged else ""
        value, baseline = f"{axis['value']:,}", f"{axis['baseline']:,}"
        table.add_row(name, value, baseline, f"{axis['ratio']:.4f}", tolerance, verdict)
    return table


def memory_table(cost: dict[str, Any], measured: dict[str, Any] | None = None) -> Table:
    """Bytes of a training step, with and without activation checkpointing, beside what was measured."""
    memory = cost["memory"]
    shape = f"{cost['batch']} x {cost['seq_len']} tokens"
    columns = ("", "keeping all", "checkpointing layers", *(("measured (/ predicted)",) if measured else ()))
    table = titled_table(f"Memory of a training step on {shape}", columns)

    def predicted(key: str) -> int:
        replayed = measured is not None and measured["activation_checkpointing"]
        return int(memory[f"{key}_checkpointed" if replayed else key])

    rows: tuple[tuple[str, str, str | None], ...] = (
        ("weights", "weights", None),
        ("gradients", "gradients", None),
        ("optimizer state", "optimizer", None),
        ("activations", "activations", "activations"),
        ("peak", "peak", "peak"),
    )
    for name, key, counted in rows:
        replayed = memory.get(f"{key}_checkpointed", memory[key])
        cells = [si(memory[key], "B"), si(replayed, "B")]
        if measured:
            cells.append(_beside(measured[counted], predicted(key)) if counted else "")
        table.add_row(name, *cells)
    if measured:
        table.add_row("peak, storage by storage", "", "", _beside(measured["peak_tracked"], predicted("peak")))
        table.add_row("process (RSS)", "", "", si(measured["process"], "B"))
    table.add_row("saved file", si(memory["checkpoint"], "B"), "")
    return table


def _beside(measured: int, predicted: int) -> str:
    return f"{si(measured, 'B')} ({measured / predicted:.3f})"


def traffic_table(cost: dict[str, Any]) -> Table:
    """Bytes of parameters that a token and a batch touch, and the rows of each pool."""
    one, batch = cost["bytes_per_token"], cost["bytes_per_batch"]
    table = titled_table(
        "Parameters touched", ("", "per token", "per batch, uniform", "per batch, Zipf", "dense update")
    )
    for what, dense in (("read", ""), ("written", si(batch["dense_update"]["written"], "B"))):
        cells = (one[what], batch["uniform"][what], batch["zipf"][what])
        table.add_row(f"bytes {what}", *(si(cell, "B") for cell in cells), dense)
    for pool in cost["pools"]:
        rows, per_token = pool["rows_touched"], f"{pool['rows_per_token']:,}"
        table.add_row(
            f"rows of {pool['path']}", per_token, f"{rows['uniform']:,}", f"{rows['zipf']:,}", f"{pool['rows']:,}"
        )
    return table


def roofline_table(cost: dict[str, Any]) -> Table:
    """The least milliseconds of a step on each device."""
    columns = ("device", "forward", "backward", "update", "total", "dense update", "memory-bound", "one holds it")
    table = titled_table("Roofline, least milliseconds per step", columns)
    for line in cost["roofline"]:
        seconds = line["seconds"]
        phases = ("forward", "backward", "update", "total", "update_dense")
        table.add_row(
            f"{line['device']} {line['dtype']}",
            *(_milliseconds(seconds[phase]) for phase in phases),
            f"{line['memory_bound']:.0%}",
            "yes" if line["fits"] else "checkpointing" if line["fits_checkpointed"] else "no",
        )
    return table


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def mesh_table(mesh: dict[str, Any]) -> Table:
    """What the fullest rank of a mesh holds."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh["axes"].items() if size > 1) or "one rank"
    table = titled_table(f"The fullest of {mesh['ranks']:,} ranks ({axes})", ("", "parameters", "bytes"))
    table.add_row("dense", f"{mesh['dense_params_per_rank']:,}", "")
    table.add_row("pools", f"{mesh['pool_params_per_rank']:,}", "")
    table.add_row("weights", f"{mesh['params_per_rank']:,}", si(mesh["weight_bytes_per_rank"], "B"))
    table.add_row("gradients", "", si(mesh["gradient_bytes_per_rank"], "B"))
    table.add_row("optimizer state", "", si(mesh["optimizer_bytes_per_rank"], "B"))
    held = ("weight_bytes_per_rank", "gradient_bytes_per_rank", "optimizer_bytes_per_rank")
    table.add_row("together", "", si(sum(mesh[key] for key in held), "B"), style="bold")
    return table


def conventions() -> list[str]:
    return [*CONVENTIONS, f"excluded: {', '.join(EXCLUDED)}"]


def show_tables(tables: Iterable[Table], cost: dict[str, Any], parity: dict[str, Any] | None = None) -> None:
    """Tables with a blank line between them, then what every report must say about the model and its baseline."""
    page = console()
    for i, table in enumerate(tables):
        if i:
            page.print()
        print_whole(page, table)
    for caveat in [*cost["caveats"], *(parity["caveats"] if parity else ())]:
        plain(f"\nnote: {caveat}")


def cost_record(name: str, cost: dict[str, Any], parity: Parity | None) -> dict[str, Any]:
    """The ledger and the verdict as one JSON document."""
    head = {"memforge": __version__, "name": name}
    return {**head, **cost, "parity": None if parity is None else parity.as_dict()}
