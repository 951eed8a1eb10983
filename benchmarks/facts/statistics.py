"""Means with intervals, paired differences, and the law that a share follows over the number of slots."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval by Student's t, which is unknown of one seed; of none so is the mean."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        return self.count > 1

    @property
    def p_value(self) -> float:
        """Of no difference from 0, two-sided. Of one seed it is 1."""
        if not self.known:
            return 1.0
        error = (self.high - self.mean) / float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1))
        return 2 * float(stats.t.sf(abs(self.mean) / error, self.count - 1)) if error else float(self.mean == 0)


def estimate(values: Sequence[float]) -> Estimate:
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate:
    """Of two arms, seed by seed: the same facts and order of data on both sides."""
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared])


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several p-values, tested together, are below 5% by Holm's correction."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    kept = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > (1 - CONFIDENCE) / (len(p_values) - rank):
            break
        kept[i] = True
    return kept


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

    Points of one seed share facts, and are not independent: each seed has a law of its own, these are the means (of
    half that of its logarithm), and `intervals` their 95% over seeds. Where a seed has no law it is through the points
    of all, and there are none. `residual` is the root mean square of what the law leaves of all points, `largest` the
    largest x.
    """

    floor: float
    top: float
    half: float
    slope: float
    residual: float = math.nan
    largest: float = math.nan
    intervals: tuple[Estimate, Estimate, Estimate] | None = None

    def at(self, x: Any) -> Any:
        return logistic(np.log(x), self.floor, self.top, math.log(self.half), self.slope)

    @property
    def stops_at(self) -> float | None:
        """The x of 90% of the way to the top; None where it is beyond the points or no top below 1 is seen."""
        x = float(self.half * 9 ** (1 / self.slope))
        seen = self.intervals is not None and self.intervals[0].high < 1
        return x if seen and x <= self.largest else None

    def beside(self, points: Sequence[tuple[float, float]]) -> "Law":
        """The same law, with what it leaves of these points."""
        x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        return replace(self, residual=float(np.sqrt(np.mean((self.at(x) - y) ** 2))), largest=float(x.max()))


def logistic(log_x: Any, floor: float, top: float, log_half: float, slope: float) -> Any:
    return floor + (top - floor) / (1 + np.exp(slope * (log_half - log_x)))


def law_of(seeds: Mapping[int, Mapping[float, float]], floor: float = 0.0) -> Law | None:
    """The law through the shares of each seed by x; None of fewer than four x, or where no law is found."""
    points = [point for of_seed in seeds.values() for point in of_seed.items()]
    each = [_fit([*of_seed.items()], floor) for of_seed in seeds.values()]
    found = [one for one in each if one is not None]
    if len(found) < len(each) or len(each) < 2:
        law = _fit(points, floor)
        return None if law is None else law.beside(points)
    top, slope = estimate([one.top for one in found]), estimate([one.slope for one in found])
    log_half = estimate([math.log(one.half) for one in found])
    with np.errstate(over="ignore"):
        mean, low, high = (float(np.exp(value)) for value in (log_half.mean, log_half.low, log_half.high))
    half = Estimate(mean, low, high, log_half.count)
    return Law(floor, top.mean, half.mean, slope.mean, intervals=(top, half, slope)).beside(points)


# Where the search for a law starts: at slopes of which one is near enough for the least squares to be found.
SLOPES = (0.3, 1.0, 3.0)


def _fit(points: Sequence[tuple[float, float]], floor: float) -> Law | None:
    """By least squares."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(np.unique(x)) < 4 or x.min() <= 0:
        return None
    log_x, least, law = np.log(x), math.inf, None
    bounds = ((floor, float(log_x.min()) - 20, 0.01), (1.0, float(log_x.max()) + 20, 20.0))
    for slope in SLOPES:
        start = (max(floor, min(1.0, float(y.max()) * 1.2)), float(np.mean(log_x)), slope)
        try:
            found, _ = optimize.curve_fit(
                lambda log_x, *law: logistic(log_x, floor, *law), log_x, y, p0=start, bounds=bounds
            )
        except (RuntimeError, ValueError):
            continue
        left = float(np.sum((logistic(log_x, floor, *found) - y) ** 2))
        if left < least:
            top, log_half, slope = (float(value) for value in found)
            least, law = left, Law(floor, top, math.exp(log_half), slope)
    return law


@dataclass(frozen=True)
class Spread:
    """The standard deviation of single values, and what two of them differ by where they do at 95% confidence."""

    deviation: float
    apart: float


def spread_of(groups: Iterable[Sequence[float]]) -> Spread | None:
    """Within groups, all of them together; None where no group has two values."""
    squares = [(np.var(group) * len(group), len(group) - 1) for group in groups if len(group) > 1]
    if not squares:
        return None
    of_all, freedom = (float(sum(column)) for column in zip(*squares, strict=True))
    deviation = math.sqrt(of_all / freedom)
    return Spread(deviation, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(2) * deviation)
