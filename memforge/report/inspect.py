"""What `memforge inspect` prints: where a run stands, how its memories are used, and what slots hold."""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from memforge.errors import printable
from memforge.report.console import console, plain, print_whole
from memforge.report.cost import si, titled_table
from memforge.report.run import Run

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
LOSS_WIDTH, MIN_LOSS_WIDTH, TREND_WIDTH = 60, 8, 12
LEGEND = "used: since the row before; entropy: of log(slots); KL: to an even spread; top 1%: weight on the most read"


def show_run(run: Run, record: dict[str, Any]) -> None:
    """Where the run stands, tables of its layers, and the warnings last, where they are read."""
    page = console()
    for line in _heading(record):
        page.print(line, soft_wrap=True)
    page.print()
    print_whole(page, _standing(run, record))
    for table, legend in _tables(run, record):
        page.print()
        print_whole(page, table)
        if legend:
            page.print(legend, style="dim", soft_wrap=True)
    for caveat in record["caveats"]:
        plain(f"\nnote: {caveat}")
    if record["warnings"]:
        page.print()
    for warning in record["warnings"]:
        page.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _tables(run: Run, record: dict[str, Any]) -> Iterator[tuple[Table, str]]:
    """The tables that have rows, and what must be said below each."""
    if record["layers"]:
        told = any(layer["slots_used"] is not None for layer in record["layers"])
        yield layer_table(run, record), LEGEND if told else "the run has recorded nothing of how they are read"
    if record["pools"]:
        yield pool_table(record), ""
    if record["routers"]:
        yield router_table(record), ""


def _heading(record: dict[str, Any]) -> Iterator[str]:
    yield f"{record['name']}  {record['state']}"
    flops = record["flops_per_token"]
    cost = "" if flops is None else f"  {si(flops)} FLOPs/token"
    yield (
        f"{record['params']:,} parameters, {record['active_params']:,} active{cost}  "
        f"model {record['model_hash'][:12]}  run {record['run_hash'][:12]}"
    )


def _standing(run: Run, record: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in _standing_rows(run, record):
        table.add_row(name, value)
    return table


def _standing_rows(run: Run, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    step, steps = record["step"], record["steps"]
    yield "step", f"{step:,}" + ("" if not steps else f" of {steps:,} ({step / steps:.0%})")
    if record["tokens"] is not None:
        yield "tokens", f"{record['tokens']:,}"
    losses = run.metrics.series("loss")
    if losses:
        yield "loss", f"{record['loss']:.4f}"
        if len(losses) > 1:
            yield "", sparkline(losses.values, _loss_width())
            yield "", f"{losses.values[0]:.4f} at step {losses.steps[0]:,} to {losses.values[-1]:.4f}"
    for name, value in record["scores"].items():
        if value is not None:
            yield score_name(name), f"{value:.1%}" if name.startswith("recall") else f"{value:.4f}"
    yield from _speed_rows(record)


def _speed_rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    speed = record["speed"]
    if speed["tokens_per_second"] is not None:
        yield "speed", f"{speed['tokens_per_second']:,.0f} tokens/s"
    for name, key in (
        ("MFU", "mfu"),
        ("memory bandwidth", "memory_bandwidth"),
        ("waiting for data", "waiting_for_data"),
    ):
        if speed[key] is not None:
            yield name, share(speed[key])
    if record["seconds"] is not None:
        resumed = len(record["starts"]) - 1
        again = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed > 0 else ""
        yield "time", duration(record["seconds"]) + again


def score_name(column: str) -> str:
    """held_out_loss.code as "held-out loss, code"."""
    score, _, part = column.partition(".")
    return {"held_out_loss": "held-out loss"}.get(score, score) + (f", {printable(part)}" if part else "")


def layer_table(run: Run, record: dict[str, Any]) -> Table:
    """One row for each layer that reads a pool: how much of it is used, and how evenly."""
    columns = ("layer", "slots", "used", "trend", "ever", "entropy", "KL", "top 1%", "read norm")
    table = titled_table("Memory layers", columns)
    table.columns[3].justify = "left"
    for layer in record["layers"]:
        used = run.metrics.series(f"{layer['path']}.slots_used").values
        table.add_row(
            layer["path"],
            si(layer["slots"]),
            share(layer["slots_used"]),
            sparkline(used, TREND_WIDTH, low=0.0) if used else "",
            share(layer["slots_ever"]),
            share(layer["entropy_share"]),
            number(layer["kl"]),
            share(layer["top_1pct"]),
            number(layer["read_norm"]),
        )
    return table


def pool_table(record: dict[str, Any]) -> Table:
    """How far the touched rows of each pool tensor move in an update, and what rounding loses of it."""
    table = titled_table("Pools, last update", ("tensor", "moved", "lost"))
    for pool in record["pools"]:
        table.add_row(pool["tensor"], share(pool["moved"]), share(pool["lost"]))
    return table


def router_table(record: dict[str, Any]) -> Table:
    """How evenly each router spreads tokens among its experts."""
    table = titled_table("Routers", ("layer", "busiest / even", "entropy"))
    for router in record["routers"]:
        table.add_row(router["path"], number(router["load_max"]), number(router["load_entropy"]))
    return table


def share(value: float | None) -> str:
    """0.1234 as "12.3%", a tiny one with two digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.1%}" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2g}%"


def number(value: float | None) -> str:
    """Four digits, nothing for None."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """3,725 as "1 h 02 min", 75 as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def sparkline(values: Sequence[float], width: int, *, low: float | None = None) -> str:
    """At most `width` characters as high as the means of as many stretches, from `low` or the least to the greatest."""
    width = min(width, len(values))
    ends = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    floor, top = min(means) if low is None else low, max(means)
    levels = BLOCKS if _has_blocks() else ASCII
    scale = (len(levels) - 1) / (top - floor) if top > floor else 0.0
    return "".join(levels[max(round((mean - floor) * scale), 0)] for mean in means)


def _has_blocks() -> bool:
    """Whether stdout can show block characters. Python makes UTF-8 of the C locale, whose terminals know ASCII only."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
    if locale in ("C", "POSIX"):
        return False
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _loss_width() -> int:
    """A curve that is folded cannot be read, so it is as narrow as the terminal, beside its label."""
    screen = Console()
    if not screen.is_terminal:
        return LOSS_WIDTH
    return min(max(screen.width - len("waiting for data  "), MIN_LOSS_WIDTH), LOSS_WIDTH)


def show_tokens(found: dict[str, Any]) -> None:
    """For each token, the slots that each layer read most for it."""
    table = titled_table(f"Slots read most, of {found['name']} at {found['checkpoint']}", ("token", *found["layers"]))
    for column in table.columns:
        column.justify = "left"
    for token in found["tokens"]:
        cells = (_slots(token["reads"][path]) for path in found["layers"])
        table.add_row(quoted(token["text"]), *cells)
    print_whole(console(), table)


def _slots(reads: Sequence[dict[str, Any]]) -> str:
    return "  ".join(f"{read['slot']}:{read['weight']:.2f}" for read in reads)


def show_readers(found: dict[str, Any]) -> None:
    """For each layer, the tokens in context that read one slot most."""
    plain(f"Slot {found['slot']} of {found['of']}, in {found['num_tokens']:,} tokens")
    for path, tokens in found["layers"].items():
        plain(f"\n{path}" + ("" if tokens else ": no token reads it"))
        for token in tokens:
            context = f"{quoted(token['before'])[1:-1]}[{quoted(token['text'])[1:-1]}]{quoted(token['after'])[1:-1]}"
            plain(f"  {token['weight']:6.3f}  {context}")


def quoted(text: str) -> str:
    """A token's text so that its spaces show, in characters that stdout can encode."""
    encoding = sys.stdout.encoding or "ascii"
    return f"'{printable(text)}'".encode(encoding, "backslashreplace").decode(encoding)
