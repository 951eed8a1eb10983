"""Pictures of an experiment, the same to the byte for the same numbers."""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.facts.experiment import Figure
from benchmarks.facts.shown import is_share, name_of, shown
from benchmarks.facts.statistics import Estimate, Law, estimate

# Of Okabe and Ito: told apart by those who see fewer colours; then the same dashed, with other marks, hollow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKS = "osD^vPX*p"
DASHES = ("-", "--", ":")
# Points that are nearer than so, as a ratio, stand side by side and share a tick.
NEAR = 1.1
MAX_TICKS, MAX_INSIDE = 8, 5

Point = tuple[float, float]


def draw(figure: Figure, lines: Mapping[str, Sequence[Point]], law: Law | None) -> str:
    """Means over seeds with their 95% intervals, joined line by line, as SVG; of rows of runs, those of the last."""
    settings: dict[Any, Any] = {
        "svg.hashsalt": "memforge",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(7.6, 4.4), layout="constrained")
        axes = canvas.add_subplot()
        ends = {name: draw_line(axes, figure, lines, name, i) for i, name in enumerate(lines)}
        x_of_all = sorted({x for points in lines.values() for x, _ in points})
        if law is not None:
            x_law = np.geomspace(x_of_all[0], x_of_all[-1], 200)
            axes.plot(x_law, law.at(x_law), color="#888888", linestyle="--", linewidth=1, label="fitted law")
        draw_axes(axes, figure, x_of_all)
        if len(lines) > MAX_INSIDE:
            handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            top_down = sorted(ends, key=lambda name: -ends[name])
            canvas.legend(
                [handles[name] for name in top_down], top_down, loc="outside right upper", frameon=False, fontsize=8
            )
        elif len(lines) > 1 or figure.lines or law is not None:
            axes.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        canvas.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def draw_line(axes: Axes, figure: Figure, lines: Mapping[str, Sequence[Point]], name: str, i: int) -> float:
    """The line `name`, which is number `i` of `lines`, and the height at which it ends."""
    at: dict[float, list[float]] = defaultdict(list)
    for x, y in lines[name]:
        at[x].append(y)
    found = {x: estimate(at[x]) for x in sorted(at)}
    last = max(found)
    reach = [
        reached(one, is_share(figure.y)) if figure.join != "runs" or x == last else (0.0, 0.0)
        for x, one in found.items()
    ]
    again, color = divmod(i, len(COLORS))
    axes.errorbar(
        [x * aside(lines, name, x) if figure.join == "arms" and figure.log_x else x for x in found],
        [one.mean for one in found.values()],
        yerr=np.transpose(reach),
        label=name,
        capsize=3,
        linewidth=1.5,
        markersize=5,
        color=COLORS[color],
        marker=MARKS[i % len(MARKS)],
        markerfacecolor="white" if again else COLORS[color],
        linestyle=DASHES[again % len(DASHES)],
    )
    return found[last].mean


def draw_axes(axes: Axes, figure: Figure, x_of_all: Sequence[float]) -> None:
    if figure.log_x:
        axes.set_xscale("log", base=10)
        mark(axes, x_of_all)
    if figure.log_y:
        axes.set_yscale("log")
    elif is_share(figure.y):
        high = min(axes.get_ylim()[1], 1.03)
        axes.set_ylim(-0.03 * high, high)  # from nothing: what differs little looks so
    axes.set_xlabel(name_of(figure.x))
    axes.set_ylabel(name_of(figure.y))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(figure.x, value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(figure.y, value)))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def reached(found: Estimate, share: bool) -> Point:
    """How far an interval reaches below and above its mean: of a share, to nothing and to all at most."""
    if not found.known:
        return 0.0, 0.0
    low, high = (max(found.low, 0.0), min(found.high, 1.0)) if share else (found.low, found.high)
    return found.mean - low, high - found.mean


def aside(lines: Mapping[str, Sequence[Point]], name: str, x: float) -> float:
    """What a point is moved by, so that others at its x do not hide it."""
    here = [other for other, points in lines.items() if any(near(x, other_x) for other_x, _ in points)]
    of_all = [x for points in lines.values() for x, _ in points]
    step = (max(of_all) / min(of_all)) ** 0.012
    return float(step ** (here.index(name) - (len(here) - 1) / 2))


def near(x: float, other: float) -> bool:
    return 1 / NEAR < x / other < NEAR


def mark(axes: Axes, x_of_all: Iterable[float]) -> None:
    """Ticks where the points are, if those are few; else at 1, 2 and 5 of every decade."""
    ticks: list[float] = []
    for x in x_of_all:
        if not ticks or not near(x, ticks[-1]):
            ticks.append(x)
    few = len(ticks) <= MAX_TICKS
    axes.xaxis.set_major_locator(FixedLocator(ticks) if few else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
