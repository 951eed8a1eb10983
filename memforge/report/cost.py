"""The ledger and the parity verdict as tables."""

from collections.abc import Collection, Iterable, Sequence
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


def titled_table(title: str, columns: Iterable[str], *, left: Collection[str] = ()) -> Table:
    """The look of every table: numbers to the right, what the first column and those of `left` say to the left, no
    lines. No title, no line for it.
    """
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
        table.add_column(column, justify="left" if i == 0 or column in left else "right", no_wrap=True)
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


def swap_table(parity: dict[str, Any]) -> Table:
    """Blocks that stand where the baseline has others: forward and backward FLOPs per token of both."""
    columns = ("layers", "this", "forward", "backward", "baseline", "forward", "backward", "forward ratio", "both")
    table = titled_table(f"Blocks in the place of those of {parity['against']}", columns)
    for swap in parity["swaps"]:
        (f, f0), (b, b0) = swap["forward"], swap["backward"]
        ratios = (f"{x / y:.3f}" if y else "" for x, y in ((f, f0), (f + b, f0 + b0)))
        kinds = swap["kinds"]
        table.add_row(ranges(swap["layers"]), kinds[0], si(f), si(b), kinds[1], si(f0), si(b0), *ratios)
    return table


def comparison_table(name: str, verdicts: Sequence[dict[str, Any]]) -> Table:
    """A model beside several baselines: each axis as it is, and as a ratio to each of them."""
    table = titled_table(f"{name} beside each", ("axis", "this", *(verdict["against"] for verdict in verdicts)))
    for axis, own in verdicts[0]["axes"].items():
        ratios = (f"{verdict['axes'][axis]['ratio']:.4f}" for verdict in verdicts)
        table.add_row(axis, f"{own['value']:,}", *ratios)
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


def time_table(measured: dict[str, Any]) -> Table:
    """Milliseconds of a training step, with its phases, beside what the calibrated machine would take."""
    title = f"Time of a training step on {measured['device']}, {measured['steps']} steps"
    table = titled_table(title, ("milliseconds", "median", "20%", "80%", "predicted", "measured / predicted"))
    for phase, found in measured["seconds"].items():
        cells = [milliseconds(found[key]) for key in ("median", "p20", "p80")]
        if found["predicted"] is not None:
            cells += [milliseconds(found["predicted"]), f"{found['median'] / found['predicted']:.3f}"]
        table.add_row(phase.replace("_", " "), *cells)
    if why := measured["unpredicted"]:
        table.caption, table.caption_justify = f"no prediction: {why}", "left"
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
            *(milliseconds(seconds[phase]) for phase in phases),
            f"{line['memory_bound']:.0%}",
            holds_it(line),
        )
    return table


def milliseconds(seconds: float) -> str:
    """Milliseconds with four digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def mesh_table(mesh: dict[str, Any]) -> Table:
    """What the fullest rank of a mesh holds, with and without activation checkpointing."""
    title = f"The fullest of {mesh['ranks']:,} ranks ({_axes(mesh)})"
    table = titled_table(title, ("", "parameters", "bytes", "checkpointing layers"))
    table.add_row("dense", f"{mesh['dense_params_per_rank']:,}", "", "")
    table.add_row(_pools(mesh), f"{mesh['pool_params_per_rank']:,}", "", "")
    table.add_row("weights", f"{mesh['params_per_rank']:,}", si(mesh["weight_bytes_per_rank"], "B"), "")
    table.add_row("gradients", "", si(mesh["gradient_bytes_per_rank"], "B"), "")
    table.add_row("optimizer state", "", si(mesh["optimizer_bytes_per_rank"], "B"), "")
    held = ("weight_bytes_per_rank", "gradient_bytes_per_rank", "optimizer_bytes_per_rank")
    table.add_row("together", "", si(sum(mesh[key] for key in held), "B"), "", style="bold")
    for name, key in (
        ("activations", "activation_bytes"),
        ("whole parameters", "gathered_bytes"),
        ("their gradients", "scattered_bytes"),
        ("reads of others", "served_bytes"),
        ("peak", "peak_bytes"),
    ):
        again = mesh.get(f"{key}_checkpointed_per_rank")
        cells = (si(mesh[f"{key}_per_rank"], "B"), "" if again is None else si(again, "B"))
        table.add_row(name, "", *cells, style="bold" if name == "peak" else None)
    table.add_row("peak in", "", mesh["peak_in"], mesh["peak_checkpointed_in"])
    return table


def _axes(mesh: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh["axes"].items() if size > 1) or "one rank"


def _pools(mesh: dict[str, Any]) -> str:
    """Pools, and how they are shared out."""
    ways = list(dict.fromkeys(mesh["pools"].values()))
    return f"pools, by {' or '.join(ways)}" if ways else "pools"


def wire_table(cost: dict[str, Any]) -> Table:
    """What a rank sends in a step, by what it is for."""
    mesh, shape = cost["mesh"], f"{cost['batch']} x {cost['seq_len']} tokens"
    columns = ("", "collective", "ranks", "of", "number", "handed in", "sent")
    table = titled_table(f"Bytes on the wire, of one of {mesh['ranks']:,} ranks in a step on its {shape}", columns)
    for row in mesh["wire"]["rows"]:
        mean = " (mean)" if row["expected"] else ""
        table.add_row(
            row["what"],
            row["op"],
            f"{row['ranks']:,}",
            row["group"],
            f"{row['count']:,}",
            si(row["payload_bytes"], "B"),
            f"{si(row['sent_bytes'], 'B')}{mean}",
        )
    table.add_section()
    table.add_row("together", "", "", "", "", "", si(mesh["wire"]["sent_bytes"], "B"), style="bold")
    again = si(mesh["wire"]["sent_bytes_checkpointed"], "B")
    table.add_row("checkpointing layers", "", "", "", "", "", again)
    return table


def rank_roofline_table(mesh: dict[str, Any]) -> Table:
    """The least milliseconds of a step of one rank on each device, sending included."""
    columns = ("device", "computing", "links", "network", "all overlapped", "none overlapped", "one holds it")
    table = titled_table(f"Roofline of one of {mesh['ranks']:,} ranks, least milliseconds per step", columns)
    for line in mesh["roofline"]:
        times = (line["seconds"][name] for name in ("computing", "link", "network", "overlapped", "in_turn"))
        cells = ("unknown" if time is None else milliseconds(time) for time in times)
        table.add_row(line["device"], *cells, holds_it(line))
    return table


def holds_it(line: dict[str, Any]) -> str:
    """Whether a device has the memory for the peak of a step."""
    return "yes" if line["fits"] else "checkpointing" if line["fits_checkpointed"] else "no"


def conventions() -> list[str]:
    return [*CONVENTIONS, f"excluded: {', '.join(EXCLUDED)}"]


def show_tables(tables: Iterable[Table], cost: dict[str, Any], verdicts: Sequence[dict[str, Any]] = ()) -> None:
    """Tables with a blank line between them, then what every report must say about the model and its baselines."""
    page = console()
    for i, table in enumerate(tables):
        if i:
            page.print()
        print_whole(page, table)
    for caveat in dict.fromkeys([*cost["caveats"], *(c for verdict in verdicts for c in verdict["caveats"])]):
        plain(f"\nnote: {caveat}")


def cost_record(name: str, cost: dict[str, Any], verdicts: Sequence[Parity]) -> dict[str, Any]:
    """The ledger and the verdicts as one JSON document; `parity` is the first of `comparisons`."""
    comparisons = [verdict.as_dict() for verdict in verdicts]
    parity = comparisons[0] if comparisons else None
    return {"memforge": __version__, "name": name, **cost, "parity": parity, "comparisons": comparisons}
