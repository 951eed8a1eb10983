"""Means with intervals, paired differences, and the law that recall follows over the number of slots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    def __add__(self, shift: float) -> "Estimate":
        return Estimate(self.mean + shift, self.low + shift, self.high + shift, self.count)


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


@dataclass(frozen=True)
class Law:
    """share = top / (1 + (half / x) ** slope): a logistic in log x that may end below 1.

    `intervals` are the 95% of top, half and slope from resampled points; `residual` is the root mean square of what the
    law leaves. `stops_at` is the x at which 90% of `top` is reached.
    """

    top: float
    half: float
    slope: float
    residual: float
    intervals: tuple[tuple[float, float], ...]

    def at(self, x: np.ndarray | float) -> np.ndarray | float:
        return logistic(np.log(x), self.top, math.log(self.half), self.slope)

    @property
    def stops_at(self) -> float:
        return float(self.half * 9 ** (1 / self.slope))


def logistic(log_x: np.ndarray | float, top: float, log_half: float, slope: float) -> np.ndarray | float:
    return top / (1 + np.exp(slope * (log_half - log_x)))


def fit(points: Sequence[tuple[float, float]], *, resamples: int = 200) -> Law | None:
    """The law through (x, share) points by least squares; None when there are fewer than four different x."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(set(x.tolist())) < 4:
        return None
    best = _fitted(np.log(x), y)
    if best is None:
        return None
    rng, places = np.random.default_rng(0), [np.flatnonzero(x == at) for at in np.unique(x)]
    found = []
    for _ in range(resamples):
        # Seeds are drawn anew at each x, so that no draw leaves fewer x than the law has parameters.
        drawn = np.concatenate([rng.choice(place, len(place)) for place in places])
        again = _fitted(np.log(x[drawn]), y[drawn])
        found += [] if again is None else [again]
    bounds = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    residual = float(np.sqrt(np.mean((logistic(np.log(x), *best) - y) ** 2)))
    bounds[:, 1] = np.exp(bounds[:, 1])
    intervals = tuple((float(low), float(high)) for low, high in bounds.T)
    return Law(best[0], math.exp(best[1]), best[2], residual, intervals)


def _fitted(log_x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    start = (min(1.0, float(y.max()) * 1.2), float(np.mean(log_x)), 1.0)
    bounds = ((0.0, float(log_x.min()) - 20, 0.01), (1.0, float(log_x.max()) + 20, 20.0))
    try:
        found, _ = optimize.curve_fit(logistic, log_x, y, p0=start, bounds=bounds, maxfev=20_000)
    except RuntimeError:
        return None
    top, log_half, slope = map(float, found)
    return top, log_half, slope
