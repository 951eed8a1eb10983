"""Means with intervals, paired differences, and the law that recall follows over the number of slots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

    `intervals` are the 95% of top, half and slope by the curvature of the squares at the fit; `residual` is the root
    mean square of what the law leaves. `largest` is the largest x it was fitted to.
    """

    floor: float
    top: float
    half: float
    slope: float
    residual: float
    intervals: tuple[tuple[float, float], ...]
    largest: float

    def at(self, x: Any) -> Any:
        return logistic(np.log(x), self.floor, self.top, math.log(self.half), self.slope)

    @property
    def stops_at(self) -> float | None:
        """The x of 90% of the way to the top; None where it is beyond the points or no top is seen."""
        x = float(self.half * 9 ** (1 / self.slope))
        return x if x <= self.largest and self.intervals[0][1] < 1 else None


def logistic(log_x: Any, floor: float, top: float, log_half: float, slope: float) -> Any:
    return floor + (top - floor) / (1 + np.exp(slope * (log_half - log_x)))


def fit(points: Sequence[tuple[float, float]], floor: float = 0.0) -> Law | None:
    """The law through (x, share) points by least squares; None of fewer than four x, or where no law is found."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(np.unique(x)) < 4 or x.min() <= 0:
        return None
    log_x = np.log(x)
    start = (min(1.0, float(y.max()) * 1.2), float(np.mean(log_x)), 1.0)
    bounds = ((floor, float(log_x.min()) - 20, 0.01), (1.0, float(log_x.max()) + 20, 20.0))
    try:
        found, covariance = optimize.curve_fit(
            lambda log_x, *law: logistic(log_x, floor, *law), log_x, y, p0=start, bounds=bounds
        )
    except (RuntimeError, ValueError):
        return None
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 3) * np.sqrt(np.diag(covariance))
    if not np.isfinite(reach).all():
        return None
    (top, log_half, slope), low, high = found, found - reach, found + reach
    with np.errstate(over="ignore"):
        half_interval = float(np.exp(low[1])), float(np.exp(high[1]))
    intervals = (float(low[0]), min(1.0, float(high[0]))), half_interval, (float(low[2]), float(high[2]))
    residual = float(np.sqrt(np.mean((logistic(log_x, floor, *found) - y) ** 2)))
    return Law(floor, float(top), math.exp(log_half), float(slope), residual, intervals, float(x.max()))
