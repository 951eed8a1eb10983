"""Pictures of an experiment, the same to the byte for the same numbers."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.facts.experiment import Figure
from benchmarks.facts.statistics import Law, estimate

# Of Okabe and Ito: told apart by those who see fewer colours; then the same dashed, with other marks.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKS = "osD^vPX*p"
DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str


def draw(
    figure: Figure,
    lines: Mapping[str, Sequence[Point]],
    law: Law | None,
    path: Path,
    names: tuple[str, str],
    shown: Callable[[str, float], str],
) -> None:
    """Means over seeds with their 95% intervals, joined line by line."""
    settings = {"svg.hashsalt": "memforge", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(7.6, 4.4), layout="constrained")
        axes = canvas.add_subplot()
        for i, (name, points) in enumerate(lines.items()):
            color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
            dash = DASHES[i // len(COLORS) % len(DASHES)]
            at: dict[float, list[float]] = defaultdict(list)
            for point in points:
                at[point.x].append(point.y)
            x = sorted(at)
            found = [estimate(at[value]) for value in x]
            mean = [one.mean for one in found]
            reach = [one.high - one.mean if one.known else 0.0 for one in found]
            axes.errorbar(
                x,
                mean,
                yerr=reach,
                label=name,
                capsize=3,
                linewidth=1.5,
                markersize=5,
                color=color,
                marker=mark,
                linestyle=dash,
            )
            if figure.join == "study":
                for label in dict.fromkeys(point.label for point in points):
                    own = [point for point in points if point.label == label]
                    where = (fmean(p.x for p in own), fmean(p.y for p in own))
                    axes.annotate(label, where, xytext=(6, -10), textcoords="offset points", fontsize=8)
        if law is not None:
            low, high = axes.get_xlim() if not figure.log_x else (min(_xs(lines)), max(_xs(lines)))
            x_law = np.geomspace(max(low, 1e-9), high, 200)
            axes.plot(x_law, law.at(x_law), color="#888888", linestyle="--", linewidth=1, label="fitted law")
        if figure.log_x:
            axes.set_xscale("log", base=2)
        if figure.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(figure.x, value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(figure.y, value)))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1 or figure.lines or law is not None:
            axes.legend(frameon=False, fontsize=8)
        canvas.savefig(path, format="svg", metadata={"Date": None})


def _xs(lines: Mapping[str, Sequence[Point]]) -> list[float]:
    return [point.x for points in lines.values() for point in points]
