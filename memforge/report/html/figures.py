"""The geometry of the figures: where every mark of a profile stands. The template draws them and chooses no number."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from memforge.report.cost import ranges, si

# All lengths are in the units of an SVG viewBox.
ROW, TEXT_DROP = 22, 15
# A model of more layers is drawn by runs of alike ones.
MAX_ROWS = 64


@dataclass(frozen=True)
class Box:
    """A rectangle of one kind of block, or a part of a bar."""

    kind: str
    x: float
    width: float
    label: str


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    label: str


@dataclass(frozen=True)
class LayerRow:
    """One line of the architecture: its boxes, and a bar for each measure."""

    label: str
    y: float
    boxes: tuple[Box, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Arc:
    """From a pool to a layer that reads it."""

    path: str
    kind: str
    label: str


@dataclass(frozen=True)
class LayerFigure:
    width: float
    height: float
    columns: tuple[tuple[float, str], ...]
    rows: tuple[LayerRow, ...]
    arcs: tuple[Arc, ...]


ARCS, BOXES, BOXES_WIDTH, BOX_GAP, BARS, BAR, BAR_GAP = 96, 190, 170, 6, 376, 100, 70
MEASURES = ("forward FLOPs per token", "backward", "bytes read per token", "parameters")
UNITS = ("", "", "B", "")
PHASES = ("forward", "backward")


def layers(record: dict[str, Any]) -> LayerFigure:
    """Embedding, layers in order, head, and the shared pools with arcs to their readers."""
    lines = [*_lines(record)]
    most = [max(line.values[i] for line in lines) or 1 for i in range(len(MEASURES))]
    rows, place = [], {}
    for number, line in enumerate(lines):
        y = (number + 1) * ROW
        for idx in line.layers:
            place[idx] = y
        boxes = [
            Box(kind, BOXES + i * (wide + BOX_GAP), wide, kind)
            for wide in [(BOXES_WIDTH - BOX_GAP * (len(line.kinds) - 1)) / len(line.kinds)]
            for i, kind in enumerate(line.kinds)
        ]
        bars = [
            Bar(BARS + i * (BAR + BAR_GAP), BAR * value / most[i], si(value, unit) if value else "")
            for i, (value, unit) in enumerate(zip(line.values, UNITS, strict=True))
        ]
        rows.append(LayerRow(line.label, y, tuple(boxes), tuple(bars)))
    pools = record["pools"]
    arcs = []
    for number, pool in enumerate(pools):
        source = rows[len(rows) - len(pools) + number].y + ROW / 2
        for idx in dict.fromkeys(place[idx] for idx in pool["layers"]):
            target, x = idx + ROW / 2, BOXES - 4
            bend = x - min(ARCS - 8, 18 + (source - target) / 7) * 1.3
            path = f"M{x:g} {source:g} C{bend:.1f} {source:g} {bend:.1f} {target:g} {x:g} {target:g}"
            arcs.append(Arc(path, pool["kind"], f"{pool['path']} is read by layers {ranges(pool['layers'])}"))
    columns = [(BARS + i * (BAR + BAR_GAP), name) for i, name in enumerate(MEASURES)]
    width = BARS + len(MEASURES) * (BAR + BAR_GAP)
    return LayerFigure(width, (len(lines) + 1) * ROW + 6, tuple(columns), tuple(rows), tuple(arcs))


@dataclass(frozen=True)
class _Line:
    label: str
    kinds: tuple[str, ...]
    values: tuple[float, float, float, float]
    layers: tuple[int, ...] = ()


def _lines(record: dict[str, Any]) -> Iterator[_Line]:
    params, flops, read = record["params"], record["flops_per_token"], record["bytes_per_token"]["read_by_kind"]

    def end(kind: str) -> _Line:
        spent = [flops["outside_layers"][phase] if kind == "head" else 0 for phase in PHASES]
        return _Line(kind, (kind,), (spent[0], spent[1], read.get(kind, 0), params["by_kind"].get(kind, 0)))

    yield end("embedding")
    runs: list[list[dict[str, Any]]] = []
    for layer in record["layers"]:
        alike = runs and len(record["layers"]) > MAX_ROWS and _look(runs[-1][-1]) == _look(layer)
        if alike:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for run in runs:
        indices = [layer["idx"] for layer in run]
        kinds = tuple(block["kind"] for block in run[0]["blocks"])
        held = [sum(layer[key] for layer in run) for key in ("bytes_read", "params")]
        spent = [sum(layer["flops_per_token"][phase] for layer in run) for phase in PHASES]
        label = f"layer {indices[0]}" if len(run) == 1 else f"layers {ranges(indices)}"
        yield _Line(label, kinds, (spent[0], spent[1], held[0], held[1]), tuple(indices))
    yield end("head")
    for pool in record["pools"]:
        yield _Line(pool["path"], (pool["kind"],), (0, 0, pool["bytes_read"], pool["params"]))


def _look(layer: dict[str, Any]) -> tuple[Any, ...]:
    blocks = tuple((block["kind"], tuple(block["reads"])) for block in layer["blocks"])
    return blocks, layer["params"], layer["flops_per_token"]["total"]


@dataclass(frozen=True)
class ShareBar:
    """A whole, divided among kinds; parts too narrow for their label have none."""

    name: str
    total: str
    parts: tuple[Box, ...]


SHARE_WIDTH = 640


def shares(record: dict[str, Any], kinds: Sequence[str]) -> tuple[ShareBar, ...]:
    params, one = record["params"], record["bytes_per_token"]
    wholes = (
        ("parameters", "", params["by_kind"]),
        ("active per token", "", params["active_by_kind"]),
        ("FLOPs per token", "", record["flops_per_token"]["by_kind"]),
        ("bytes read per token", "B", one["read_by_kind"]),
    )
    return tuple(_share_bar(name, unit, by_kind, kinds) for name, unit, by_kind in wholes)


def _share_bar(name: str, unit: str, by_kind: dict[str, float], kinds: Sequence[str]) -> ShareBar:
    total, x, parts = sum(by_kind.values()), 0.0, []
    for kind in kinds:
        width = SHARE_WIDTH * by_kind.get(kind, 0) / total
        if width > 0:
            share = f"{by_kind[kind] / total:.0%}"
            parts.append(Box(kind, x, width, share if width > 34 else ""))
        x += width
    return ShareBar(name, si(total, unit), tuple(parts))


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Roof:
    device: str
    path: str
    x: float
    y: float


@dataclass(frozen=True)
class Mark:
    kind: str
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class RooflineFigure:
    device: str
    width: float
    height: float
    left: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    roofs: tuple[Roof, ...]
    marks: tuple[Mark, ...]


PLOT_WIDTH, PLOT_HEIGHT, PLOT_LEFT, PLOT_BOTTOM, PLOT_TOP, PLOT_RIGHT = 720, 360, 62, 318, 16, 700


def roofline(record: dict[str, Any]) -> RooflineFigure | None:
    """FLOPs per byte of each kind against what the first device reaches; the roofs of all devices."""
    lines = record["roofline"]
    if not lines:
        return None
    first = lines[0]
    points = {
        kind: (work["flops"] / work["bytes"], work["flops"] / first["by_kind"][kind])
        for kind, work in first["work"].items()
        if work["flops"] and work["bytes"] and first["by_kind"][kind]
    }
    ridges = [line["flops_per_second"] / line["bytes_per_second"] for line in lines]
    intensities = [*(x for x, _ in points.values()), *ridges]
    low, high = math.log10(min(intensities)) - 0.4, math.log10(max(intensities)) + 0.5
    peak = math.log10(max(line["flops_per_second"] for line in lines)) + 0.2
    floor = min(math.log10(line["bytes_per_second"]) + low for line in lines)

    def at_x(value: float) -> float:
        return PLOT_LEFT + (math.log10(value) - low) / (high - low) * (PLOT_RIGHT - PLOT_LEFT)

    def at_y(value: float) -> float:
        return PLOT_BOTTOM - (math.log10(value) - floor) / (peak - floor) * (PLOT_BOTTOM - PLOT_TOP)

    roofs = []
    for line, ridge in zip(lines, ridges, strict=True):
        left, right = 10**low, 10**high
        corners = [
            (left, left * line["bytes_per_second"]),
            (ridge, line["flops_per_second"]),
            (right, line["flops_per_second"]),
        ]
        path = "M" + " L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in corners)
        roofs.append(Roof(line["device"], path, PLOT_RIGHT, at_y(line["flops_per_second"])))
    marks = [
        Mark(
            kind, at_x(x), at_y(y), f"{kind}: {si(round(x, 1))} FLOPs per byte, {si(y, 'FLOP/s')} of {first['device']}"
        )
        for kind, (x, y) in points.items()
    ]
    return RooflineFigure(
        device=first["device"],
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        left=PLOT_LEFT,
        bottom=PLOT_BOTTOM,
        x_ticks=tuple(Tick(at_x(10.0**e), si(10.0**e)) for e in range(math.ceil(low), math.floor(high) + 1)),
        y_ticks=tuple(Tick(at_y(10.0**e), si(10.0**e)) for e in range(math.ceil(floor), math.floor(peak) + 1)),
        roofs=_apart(roofs),
        marks=tuple(marks),
    )


def _apart(roofs: list[Roof]) -> tuple[Roof, ...]:
    """Labels that would cover each other are moved down."""
    placed, last = [], -math.inf
    for roof in sorted(roofs, key=lambda r: r.y):
        last = max(roof.y - 5, last + 13)
        placed.append(Roof(roof.device, roof.path, roof.x, last))
    return tuple(placed)


@dataclass(frozen=True)
class MemoryBar:
    name: str
    y: float
    parts: tuple[Box, ...]
    peak: float
    label_x: float
    label: str


@dataclass(frozen=True)
class MemoryFigure:
    width: float
    height: float
    bars: tuple[MemoryBar, ...] = field(default=())


MEMORY_LEFT, MEMORY_WIDTH = 150, 430
HELD = ("weights", "gradients", "optimizer", "activations")


def memory(record: dict[str, Any]) -> MemoryFigure:
    """What a training step holds, keeping all activations and checkpointing; not all of it is alive at the peak."""
    held = record["memory"]
    forms = (("keeping all", ""), ("checkpointing layers", "_checkpointed"))
    longest = max(max(sum(_held(held, end).values()), held[f"peak{end}"]) for _, end in forms)
    bars = []
    for i, (name, end) in enumerate(forms):
        x, parts = float(MEMORY_LEFT), []
        for what, size in _held(held, end).items():
            width = MEMORY_WIDTH * size / longest
            parts.append(Box(what, x, width, f"{what}: {si(size, 'B')}"))
            x += width
        peak = held[f"peak{end}"]
        at = MEMORY_LEFT + MEMORY_WIDTH * peak / longest
        bars.append(MemoryBar(name, i * 34 + 4, tuple(parts), at, max(x, at) + 6, f"peak {si(peak, 'B')}"))
    return MemoryFigure(MEMORY_LEFT + MEMORY_WIDTH + 130, 34 * len(forms) + 4, tuple(bars))


def _held(held: dict[str, Any], end: str) -> dict[str, float]:
    return {what: held.get(f"{what}{end}", held[what]) for what in HELD}


@dataclass(frozen=True)
class Gauge:
    """A ratio on a line around 1, with the band that is allowed."""

    width: float
    band: tuple[float, float] | None
    one: float
    mark: float


def gauge(ratio: float, tolerance: float | None, width: float = 160) -> Gauge:
    """A ratio beyond the ends of the line stands at its end."""
    reach = max(0.02, 2 * (tolerance or 0), min(abs(ratio - 1) * 1.25, 1.0))

    def at(value: float) -> float:
        return min(max((value - 1 + reach) / (2 * reach), 0), 1) * width

    band = None if tolerance is None else (at(1 - tolerance), at(1 + tolerance) - at(1 - tolerance))
    return Gauge(width, band, at(1), at(ratio))
