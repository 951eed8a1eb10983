"""Means with intervals, paired differences, and the law that recall follows over the number of slots."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval by Student's t; of one seed the interval is unknown."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        return self.count > 1


def estimate(values: Sequence[float]) -> Estimate:
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate:
    """Of two arms, seed by seed: the same facts and order of data on both sides."""
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared])


def reached_at(line: Sequence[tuple[float, float]], y: float) -> float:
    """The x at which a line through points, straight in log x, first reaches y: 0 if it starts there, inf if never."""
    points = sorted(line)
    if points[0][1] >= y:
        return 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= y:
            return float(x0 * (x1 / x0) ** ((y - y0) / (y1 - y0)))
    return math.inf


@dataclass(frozen=True)
class Law:
    """share = floor + (top - floor) / (1 + (half / x) ** slope): a logistic in log x from a floor that is given.

    It is through the points of all seeds. `intervals` are the 95% of top, half and slope over seeds, each of which has
    a law of its own: points of one seed share facts, and are not independent. There are none where a seed has no law.
    `residual` is the root mean square of what the law leaves, `largest` the largest x it was fitted to.
    """

    floor: float
    top: float
    half: float
    slope: float
    residual: float
    largest: float
    intervals: tuple[Estimate, Estimate, Estimate] | None = None

    def at(self, x: Any) -> Any:
        return logistic(np.log(x), self.floor, self.top, math.log(self.half), self.slope)

    @property
    def stops_at(self) -> float | None:
        """The x of 90% of the way to the top; None where it is beyond the points or no top is seen."""
        x = float(self.half * 9 ** (1 / self.slope))
        seen = self.intervals is not None and self.intervals[0].high < 1
        return x if seen and x <= self.largest else None


def logistic(log_x: Any, floor: float, top: float, log_half: float, slope: float) -> Any:
    return floor + (top - floor) / (1 + np.exp(slope * (log_half - log_x)))


def law_of(seeds: Mapping[int, Mapping[float, float]], floor: float = 0.0) -> Law | None:
    """The law through the shares of each seed by x; None of fewer than four x, or where no law is found."""
    law = _fit([point for of_seed in seeds.values() for point in of_seed.items()], floor)
    each = [_fit([*of_seed.items()], floor) for of_seed in seeds.values()]
    found = [one for one in each if one is not None]
    if law is None or len(found) < len(each) or len(each) < 2:
        return law
    half = estimate([math.log(one.half) for one in found])
    with np.errstate(over="ignore"):
        mean, low, high = (float(np.exp(value)) for value in (half.mean, half.low, half.high))
    top, slope = estimate([one.top for one in found]), estimate([one.slope for one in found])
    return replace(law, intervals=(top, Estimate(mean, low, high, half.count), slope))


def _fit(points: Sequence[tuple[float, float]], floor: float) -> Law | None:
    """By least squares."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(np.unique(x)) < 4 or x.min() <= 0:
        return None
    log_x = np.log(x)
    start = (max(floor, min(1.0, float(y.max()) * 1.2)), float(np.mean(log_x)), 1.0)
    bounds = ((floor, float(log_x.min()) - 20, 0.01), (1.0, float(log_x.max()) + 20, 20.0))
    try:
        found, _ = optimize.curve_fit(
            lambda log_x, *law: logistic(log_x, floor, *law), log_x, y, p0=start, bounds=bounds
        )
    except (RuntimeError, ValueError):
        return None
    top, log_half, slope = (float(value) for value in found)
    residual = float(np.sqrt(np.mean((logistic(log_x, floor, *found) - y) ** 2)))
    return Law(floor, top, math.exp(log_half), slope, residual, float(x.max()))


@dataclass(frozen=True)
class Line:
    """Straight in log2 x: what a doubling adds, over seeds that have a line each, and the root mean square of what the
    line through the points of all seeds leaves.
    """

    gain: Estimate
    residual: float


def line_of(seeds: Mapping[int, Mapping[float, float]]) -> Line | None:
    """The lines through the shares of each seed by x, by least squares. None of a single x."""
    if any(len(of_seed) < 2 for of_seed in seeds.values()) or not seeds:
        return None
    gains = [float(np.polyfit(np.log2([*of_seed]), [*of_seed.values()], 1)[0]) for of_seed in seeds.values()]
    x, y = np.array([point for of_seed in seeds.values() for point in of_seed.items()]).T
    left = y - np.polyval(np.polyfit(np.log2(x), y, 1), np.log2(x))
    return Line(estimate(gains), float(np.sqrt(np.mean(left**2))))


def pooled_deviation(groups: Iterable[Sequence[float]]) -> float | None:
    """The standard deviation within groups, all of them together; None where no group has two values."""
    squares = [(np.var(group) * len(group), len(group) - 1) for group in groups if len(group) > 1]
    if not squares:
        return None
    of_all, freedom = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(of_all / freedom)
