"""Axes of the ledger over sizes: polynomials of degree two through a grid of exact values, and where they meet 1."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

# The value of each free key, in their order.
Point = tuple[int, ...]
# c0 + c1 * x + c2 * x * x
Polynomial = tuple[float, float, float]
# A polynomial that should be 1, and by how much it may differ.
Curve = tuple[Polynomial, float]
# A tolerance of 0 asks for equality; it must still say which of two candidates is nearer.
TINY = 1e-12


@dataclass(frozen=True)
class Surface:
    """An axis over the baseline's as a polynomial through a grid of exact values: Lagrange's form along each key."""

    nodes: tuple[tuple[int, ...], ...]
    values: Mapping[Point, float]
    tolerance: float

    def at(self, point: Sequence[float]) -> float:
        return _value(self.along_last(point[:-1]), point[-1])

    def curve(self, first: Sequence[float]) -> Curve:
        """The polynomial in the last key, with the others at `first`, and how far from 1 it may be."""
        return self.along_last(first), self.tolerance

    def along_last(self, first: Sequence[float]) -> Polynomial:
        """Coefficients of the polynomial in the last key, with the others at `first`."""
        bases = [_lagrange(nodes, x) for nodes, x in zip(self.nodes, first, strict=False)]
        sums = []
        for last in self.nodes[-1]:
            total = 0.0
            for indices in product(*(range(len(nodes)) for nodes in self.nodes[:-1])):
                weight = math.prod(basis[i] for basis, i in zip(bases, indices, strict=True))
                key = (*(nodes[i] for nodes, i in zip(self.nodes, indices, strict=False)), last)
                total += weight * self.values[key]
            sums.append(total)
        return _coefficients(self.nodes[-1], sums)


def score(curves: Sequence[Curve], x: float) -> float:
    """The largest difference from 1, as shares of the tolerances."""
    return max(abs(_value(curve, x) - 1) / (tolerance or TINY) for curve, tolerance in curves)


def turns(curves: Sequence[Curve]) -> Iterator[float]:
    """Where the largest difference can be least: one curve meets 1 or is nearest to it, or two are equally far off."""
    off = [tuple((c - (i == 0)) / (tol or TINY) for i, c in enumerate(curve)) for curve, tol in curves]
    pairs = [(a, b) for i, a in enumerate(off) for b in off[:i]]
    sums = [tuple(x + sign * y for x, y in zip(a, b, strict=True)) for a, b in pairs for sign in (1, -1)]
    for c0, c1, c2 in (*off, *sums):
        yield from _roots(c0, c1, c2)


def _roots(c0: float, c1: float, c2: float) -> Iterator[float]:
    if abs(c2) * 2**40 < abs(c1):  # a rounding error of the fit, not a square
        c2 = 0.0
    if c2 == 0:
        if c1 != 0:
            yield -c0 / c1
        return
    square = c1 * c1 - 4 * c2 * c0
    if square < 0:
        yield -c1 / (2 * c2)  # where it is nearest
        return
    q = -(c1 + math.copysign(math.sqrt(square), c1)) / 2
    yield q / c2
    if q != 0:
        yield c0 / q


def _value(coefficients: Polynomial, x: float) -> float:
    c0, c1, c2 = coefficients
    return c0 + x * (c1 + x * c2)


def _lagrange(nodes: Sequence[int], x: float) -> list[float]:
    """The weight of the value at each node in the polynomial at x."""
    return [math.prod((x - b) / (a - b) for b in nodes if b != a) for a in nodes]


def _coefficients(nodes: Sequence[int], values: Sequence[float]) -> Polynomial:
    """c0, c1, c2 of the polynomial through up to three points."""
    c0 = c1 = c2 = 0.0
    for a, value in zip(nodes, values, strict=True):
        others = [b for b in nodes if b != a]
        scale = value / math.prod(a - b for b in others)
        if len(others) == 2:
            c0, c1, c2 = c0 + scale * others[0] * others[1], c1 - scale * sum(others), c2 + scale
        elif len(others) == 1:
            c0, c1 = c0 - scale * others[0], c1 + scale
        else:
            c0 += scale
    return c0, c1, c2
