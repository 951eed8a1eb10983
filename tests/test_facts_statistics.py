"""Intervals, the law over slots and where lines reach a height, of benchmarks/facts."""

import math

import numpy as np
import pytest

from benchmarks.facts.statistics import difference, estimate, law_of, logistic, reached_at, spread_of


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [estimate(rng.normal(3.0, 2.0, 3).tolist()) for _ in range(2000)]
    assert np.mean([one.low <= 3.0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)
    paired = difference({1: 5.0, 2: 7.0, 3: 1.0}, {1: 4.0, 2: 6.0, 4: 0.0})
    assert (paired.mean, paired.low, paired.high, paired.count) == (1.0, 1.0, 1.0, 2)
    assert not estimate([1.0]).known


def test_where_a_line_reaches_a_height_in_log_x() -> None:
    line = [(8.0, 0.5), (1.0, 0.1), (2.0, 0.3)]
    assert reached_at(line, 0.3) == 2.0
    assert reached_at(line, 0.4) == pytest.approx(4.0)
    assert (reached_at(line, 0.05), reached_at(line, 0.6)) == (0.0, math.inf)


def test_the_law_is_found_in_what_follows_it_from_its_floor() -> None:
    law = law_of(shares(np.random.default_rng(2), 2.0 ** np.arange(8, 22, 2), (0.1, 0.8, 5000.0, 0.7), 0.005), 0.1)
    assert law is not None
    assert law.top == pytest.approx(0.8, abs=0.03)
    assert law.half == pytest.approx(5000, rel=0.15)
    assert law.slope == pytest.approx(0.7, rel=0.1)
    assert law.intervals is not None
    for found, interval in zip((0.8, 5000.0, 0.7), law.intervals, strict=True):
        assert interval.low < found < interval.high
    assert law.stops_at is not None
    assert law.at(law.stops_at) == pytest.approx(0.1 + 0.9 * (law.top - 0.1))


def test_intervals_of_the_law_hold_its_top_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(3), []
    for _ in range(200):
        law = law_of(shares(rng, 2.0 ** np.arange(12, 20, 2), (0.1, 0.5, 2.0**14, 1.0), 0.005), 0.1)
        assert law is not None
        assert law.intervals is not None
        held.append(law.intervals[0].low <= 0.5 <= law.intervals[0].high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.05)


def shares(
    rng: np.random.Generator, x: np.ndarray, law: tuple[float, float, float, float], noise: float
) -> dict[int, dict[float, float]]:
    """Of three seeds, scattered about a law: floor, top, half, slope."""
    floor, top, half, slope = law
    y = [logistic(np.log(x), floor, top, np.log(half), slope) + rng.normal(0, noise, len(x)) for _ in range(3)]
    return {seed: dict(zip(x.tolist(), of_seed.tolist(), strict=True)) for seed, of_seed in enumerate(y)}


def test_two_single_runs_differ_as_seldom_by_chance_as_is_said() -> None:
    found = spread_of([[1.0, 3.0], [10.0, 10.0, 10.0], [5.0]])
    assert found is not None
    assert found.deviation == pytest.approx(math.sqrt(2 / 3))
    assert spread_of([[1.0], [2.0]]) is None
    rng, beyond = np.random.default_rng(4), []
    for _ in range(2000):
        spread, (one, other) = spread_of([rng.normal(0, 2, 3).tolist()]), rng.normal(0, 2, 2)
        assert spread is not None
        beyond.append(abs(one - other) > spread.apart)
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.015)


def test_a_law_lies_between_the_ends_of_its_intervals() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        law = law_of(shares(rng, 2.0 ** np.arange(10, 22, 2), (0.0, 0.9, 2.0**16, 0.8), 0.03))
        assert law is not None
        assert law.intervals is not None
        for number, interval in zip((law.top, law.half, law.slope), law.intervals, strict=True):
            assert interval.low <= number <= interval.high


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 0.1), (2.0, 0.2), (4.0, 0.3)],
        [(float(2**i), 0.1 * i) for i in range(1, 6)],  # a line in log x has no top
        [(0.0, 0.1), (1.0, 0.1), (2.0, 0.2), (4.0, 0.3), (8.0, 0.3)],
    ],
)
def test_no_end_is_claimed_that_the_points_do_not_show(points: list[tuple[float, float]]) -> None:
    law = law_of({1: dict(points), 2: dict(points)})
    assert law is None or law.stops_at is None
