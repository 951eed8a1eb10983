"""Solving for parity: integer values of one to three free keys at which a model matches a baseline.

Parameters and FLOPs are products of sizes, so along each free key an axis is a polynomial of degree two at most (up to
what is rounded up, such as capacities). A polynomial through a few exact ledgers is searched; what it finds is then
priced by the ledger itself, and only those figures are reported.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import combinations, islice, product
from typing import Any, cast

from memforge.blocks.base import KindSpec
from memforge.cost import estimate
from memforge.errors import CheckFailedError, Diagnostic, KeyPath, SpecError, UsageError, printable
from memforge.parity import Axis
from memforge.plan import ModelPlan, make_model_plan
from memforge.spec import Spec, with_values
from memforge.spec.document import Source
from memforge.spec.keys import Key, field_of, find_key, known_keys, value_of
from memforge.surface import TINY, Curve, Point, Surface, score, turns

OPTION = "--free"
MAX_FREE = 3
# How far from its present value a key is searched, unless a range is given.
REACH = 64
DEFAULT_TOLERANCE = 0.005
# Values of the enumerated keys that are tried in a round; the last key is solved for at each.
TRIED = 2048
# Between them the best ones are followed by steps that halve, from half of a value to less than one in a million.
KEPT, HALVINGS = 4, 21
# Candidates that are priced exactly in a round, and rounds: where an axis is not a polynomial, the next one is fitted
# around what the last one found.
PRICED, ROUNDS = 16, 3
# Layers that a suggestion prices: about a second's worth.
SUGGESTED_LAYERS = 2_500
# Points that the spec refuses before the next valid one is given up on.
REFUSED = 256
# Points whose validity is looked at in a round of the search, at 0.1 ms each.
CHECKED = 4096


@dataclass(frozen=True)
class Free:
    """A key to solve for: multiples of `step` from `low` to `high`."""

    key: Key
    low: int
    high: int
    step: int
    current: int

    @property
    def count(self) -> int:
        return self.high // self.step - self.first // self.step + 1

    @property
    def first(self) -> int:
        return -(-self.low // self.step) * self.step

    def nearest(self, value: float) -> int:
        """The allowed value closest to a real one."""
        return min(max(round(value / self.step) * self.step, self.first), self.high // self.step * self.step)

    def around(self, value: float) -> set[int]:
        """The allowed values on both sides of a real one."""
        return {self.nearest(value - self.step / 2), self.nearest(value + self.step / 2)}

    def spread(self, count: int) -> list[int]:
        """At most about `count` values over the range, closer together where they are small."""
        if self.count <= count:
            return list(range(self.first, self.high + 1, self.step))
        lowest = max(self.first, self.step)
        ratio = (self.high / lowest) ** (1 / (count - 1))
        return sorted({self.first, *(self.nearest(lowest * ratio**i) for i in range(count))})


@dataclass(frozen=True)
class Candidate:
    """Values of the free keys, and every axis there, priced by the ledger."""

    values: Point
    axes: tuple[Axis, ...]

    @property
    def score(self) -> float:
        """The largest |ratio - 1| as a share of its tolerance: at most 1 where the models match."""
        return max(_off(axis) for axis in self.axes if axis.tolerance is not None)

    @property
    def ok(self) -> bool:
        return all(axis.ok is not False for axis in self.axes)


@dataclass(frozen=True)
class Match:
    """The best candidates, best first."""

    free: tuple[Free, ...]
    candidates: tuple[Candidate, ...]
    evaluations: int

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def parse_free(spec: Spec, text: str, multiple_of: int = 1) -> Free:
    """KEY or KEY=LOW..HIGH. Raises SpecError at the character that is wrong."""
    name, equals, bounds = text.partition("=")
    key = find_key(spec, name, OPTION)
    values = key.values(spec)
    if not all(type(value) is int for value in values):
        shown = ", ".join(str(value) for value in dict.fromkeys(map(str, values)))
        raise _at(text, 0, f"`{printable(key.name)}` is not an integer: {printable(shown)}")
    if len(set(values)) > 1:
        shown = ", ".join(f"{'.'.join(map(str, p))} = {v}" for p, v in zip(key.places, values, strict=True))
        raise _at(text, 0, f"`{printable(key.name)}` has several values: {shown}", "name one of them")
    lowest, highest = _bounds(spec, key)
    current = values[0]
    low, high = current // REACH, max(current, 1) * REACH
    if equals:
        given = [part.strip() for part in bounds.split("..")]
        if len(given) != 2 or not all(part.isdecimal() and len(part) <= 12 for part in given):
            raise _at(text, len(name) + 1, f"expected KEY=LOW..HIGH, got {printable(bounds[:40]) or 'nothing'}")
        low, high = int(given[0]), int(given[1])
    free = Free(key, max(lowest, low), min(highest, high), multiple_of, current)
    if free.count < 1:
        allowed = f"{lowest:,} to {highest:,}"
        multiples = f" in multiples of {multiple_of}" if multiple_of > 1 else ""
        raise _at(text, 0, f"nothing to search from {low:,} to {high:,}{multiples}: allowed are {allowed}")
    return free


def solve(
    spec: Spec,
    baseline_name: str,
    baseline: ModelPlan,
    free: Sequence[Free],
    tolerances: Mapping[str, float],
    seq_len: int,
    *,
    priced: int = PRICED,
    rounds: int = ROUNDS,
) -> Match:
    """Values of the free keys that bring every axis of `tolerances` closest to the baseline's, at `seq_len` tokens.

    Raises UsageError for no key, too many or the same one twice, SpecError when the spec is valid at none of the values
    that were tried.
    """
    if not 1 <= len(free) <= MAX_FREE:
        raise UsageError(f"give one to {MAX_FREE} keys with {OPTION}, not {len(free)}")
    places = [place for f in free for place in f.key.places]
    if len(set(places)) < len(places):
        raise UsageError(f"{OPTION}: {', '.join(f.key.name for f in free)} name the same key more than once")
    lengths = ((spec.model.name, spec.model.max_seq_len), (baseline_name, baseline.max_seq_len))
    for who, longest in lengths:
        if seq_len > longest:
            raise UsageError(f"{who} takes at most {longest} tokens (model.max_seq_len), not {seq_len}")
    free = sorted(free, key=lambda f: f.count)  # the one with the most values is solved for
    ledger = _Ledger(spec, tuple(free), baseline, tolerances, seq_len)
    centre = tuple(f.current for f in free)
    for number in range(rounds):
        known = len(ledger.priced)
        surfaces = _fit(ledger, centre)
        if number == 0:
            _require_effects(ledger, surfaces)
        for point in ledger.valid_of(_search(ledger, surfaces), priced):
            ledger.price(point)
        ranked = ledger.ranked()
        if not ranked:
            break
        exact = all(
            math.isclose(surfaces[axis.name].at(ranked[0].values), axis.ratio, rel_tol=1e-9)
            for axis in ranked[0].axes
            if axis.name in surfaces
        )
        if exact or len(ledger.priced) == known:
            break
        centre = ranked[0].values
    candidates = ledger.ranked()
    if not candidates:
        raise ledger.refusal or UsageError(f"{OPTION}: the spec is valid at no value that was tried")
    return Match(tuple(free), tuple(candidates), len(ledger.priced))


def changes(match: Match) -> dict[KeyPath, int]:
    """The best candidate as values of keys."""
    return {place: v for f, v in zip(match.free, match.best.values, strict=True) for place in f.key.places}


def suggest(
    spec: Spec, baseline_name: str, baseline: ModelPlan, tolerances: Mapping[str, float], seq_len: int
) -> list[str] | None:
    """One or two keys on which the two match, those that move the judged axes most first; None where none do.

    Nobody asked for it: it gives up rather than take seconds on a deep model.
    """
    ranked = _by_influence(spec, tolerances, seq_len)
    left = SUGGESTED_LAYERS // spec.model.num_layers - len(ranked)
    for names in (*((name,) for name in ranked), *combinations(ranked[:3], 2)):
        if left <= 0:
            return None
        try:
            free = [parse_free(spec, name) for name in names]
            found = solve(spec, baseline_name, baseline, free, tolerances, seq_len, priced=2, rounds=1)
        except (SpecError, UsageError):
            left -= 1
            continue
        if found.best.ok:
            return list(names)
        left -= found.evaluations
    return None


def _by_influence(spec: Spec, tolerances: Mapping[str, float], seq_len: int) -> list[str]:
    """Names of the sizes of blocks and pools, by how far a quarter more of each moves the judged axes and no others."""
    now = estimate(make_model_plan(spec), seq_len=seq_len, devices=()).exact_axes()
    influence: dict[tuple[KeyPath, ...], tuple[float, str]] = {}
    for name, places in known_keys(spec).items():
        values = Key(name, places).values(spec)
        table = value_of(spec, places[0][:-1])
        if not isinstance(table, KindSpec) or len(set(values)) > 1 or type(values[0]) is not int:
            continue
        if len(influence) * spec.model.num_layers > SUGGESTED_LAYERS // 4:
            break
        try:
            more = with_values(spec, dict.fromkeys(places, max(values[0] + 1, round(values[0] * 1.25 / 2) * 2)))
        except SpecError:
            continue
        moved = estimate(make_model_plan(more), seq_len=seq_len, devices=()).exact_axes()
        moves = {axis: abs(float(moved[axis] / now[axis]) - 1) for axis in now}
        # What is judged should move; of parameters and FLOPs, the other one should not.
        effect = sum(moves[axis] for axis in tolerances)
        effect -= sum(moves[axis] for axis in ("params", "flops") if axis not in tolerances) / 2
        if any(moved[axis] != now[axis] for axis in tolerances):
            influence[places] = (effect, name)  # KIND.FIELD comes after the key as it stands
    return [name for _, name in sorted(influence.values(), reverse=True)]


def require_match(match: Match, name: str, baseline: str) -> None:
    """Raises CheckFailedError with the nearest candidate where no candidate is within the tolerances."""
    if match.best.ok:
        return
    at = ", ".join(f"{f.key.name} = {v:,}" for f, v in zip(match.free, match.best.values, strict=True))
    off = "; ".join(str(axis) for axis in match.best.axes if axis.ok is False)
    ranges = ", ".join(f"{f.key.name} {f.first:,} to {f.high:,}" for f in match.free)
    raise CheckFailedError(f"no match of {name} with {baseline} for {ranges}: the nearest is {at}, where {off}")


class _Ledger:
    """Exact axes at points, each priced once; what the spec refuses has none."""

    def __init__(
        self,
        spec: Spec,
        free: tuple[Free, ...],
        baseline: ModelPlan,
        tolerances: Mapping[str, float],
        seq_len: int,
    ) -> None:
        self.spec, self.free, self.tolerances, self.seq_len = spec, free, tolerances, seq_len
        self.baseline = estimate(baseline, seq_len=seq_len, devices=()).exact_axes()
        self.priced: dict[Point, Candidate | None] = {}
        self.specs: dict[Point, Spec | None] = {}
        self.refusal: SpecError | None = None

    def spec_at(self, point: Point) -> Spec | None:
        if point not in self.specs:
            changes: dict[KeyPath, Any] = {}
            for free, value in zip(self.free, point, strict=True):
                changes |= dict.fromkeys(free.key.places, value)
            try:
                self.specs[point] = with_values(self.spec, changes)
            except SpecError as refusal:
                self.refusal, self.specs[point] = refusal, None
        return self.specs[point]

    def valid_of(self, points: Iterable[Point], count: int) -> list[Point]:
        """The first `count` of the points at which the spec is valid, unless too many are not."""
        looked_at = islice(points, count + REFUSED)
        return list(islice((point for point in looked_at if self.spec_at(point) is not None), count))

    def valid_near(self, point: Point, i: int) -> Iterator[int]:
        """The nearest values of key i, on both sides, at which the spec is valid with the others as in `point`."""
        free = self.free[i]
        for way in (1, -1):
            steps = (point[i] + way * j * free.step for j in range(REFUSED))
            inside = (v for v in steps if free.first <= v <= free.high)
            found = (v for v in inside if self.spec_at((*point[:i], v, *point[i + 1 :])) is not None)
            yield from islice(found, 1)

    def valid_around(self, point: Point, i: int) -> Iterator[int]:
        """Values of key i at which the spec is valid with the others as in `point`: twice and half of its own first."""
        free = self.free[i]
        targets = (free.nearest(point[i] * factor) for factor in (2, 0.5, 4, 0.25, 1.25, 0.75, 3, 8))
        for target in (*targets, *(free.nearest(point[i] + j * free.step) for j in (1, -1, 2))):
            yield from self.valid_near((*point[:i], target, *point[i + 1 :]), i)

    def valid_alone(self, i: int, values: Iterable[int]) -> list[int]:
        """The values of key i at which the spec is valid with the other keys as they are; all of them where none is."""
        current = tuple(free.current for free in self.free)
        values = list(values)
        return [v for v in values if self.spec_at((*current[:i], v, *current[i + 1 :])) is not None] or values

    def price(self, point: Point) -> Candidate | None:
        if point not in self.priced:
            spec = self.spec_at(point)
            fits = spec is not None and spec.model.max_seq_len >= self.seq_len
            self.priced[point] = self._price(point, make_model_plan(spec)) if spec is not None and fits else None
        return self.priced[point]

    def _price(self, point: Point, model: ModelPlan) -> Candidate:
        found = estimate(model, seq_len=self.seq_len, devices=()).exact_axes()
        axes = (Axis(name, found[name], self.baseline[name], self.tolerances.get(name)) for name in found)
        return Candidate(point, tuple(axes))

    def ranked(self) -> list[Candidate]:
        """What was priced, best first: the least off, then the least changed."""
        found = [c for c in self.priced.values() if c is not None and self.allowed(c.values)]
        return sorted(found, key=lambda c: (c.score, self.change(c.values)))

    def allowed(self, point: Point) -> bool:
        """The polynomial may have been fitted outside the range."""
        return all(v % f.step == 0 and f.first <= v <= f.high for f, v in zip(self.free, point, strict=True))

    def change(self, point: Point) -> float:
        return sum(abs(math.log(max(1, v) / max(1, f.current))) for f, v in zip(self.free, point, strict=True))


def _fit(ledger: _Ledger, centre: Point) -> dict[str, Surface]:
    """Surfaces through the ledger at up to three values of each key, the centre's too, valid in all combinations."""
    nodes: list[tuple[int, ...]] = []
    for i in range(len(ledger.free)):
        found = [centre[i]]
        for value in ledger.valid_around(centre, i):
            if len(found) == 3:
                break
            points = ((*others, value, *centre[i + 1 :]) for others in product(*nodes))
            if value not in found and all(ledger.price(point) is not None for point in points):
                found.append(value)
        nodes.append(tuple(found))
    grid = {point: cast(Candidate, ledger.price(point)) for point in product(*nodes)}
    return {
        name: Surface(
            tuple(nodes),
            {point: next(a.ratio for a in candidate.axes if a.name == name) for point, candidate in grid.items()},
            tolerance,
        )
        for name, tolerance in ledger.tolerances.items()
    }


def _require_effects(ledger: _Ledger, surfaces: Mapping[str, Surface]) -> None:
    """Raises UsageError for a key on which no judged axis depends."""
    for i, free in enumerate(ledger.free):
        moves = False
        for surface in surfaces.values():
            seen: dict[Point, set[float]] = {}
            for point, value in surface.values.items():
                seen.setdefault((*point[:i], *point[i + 1 :]), set()).add(value)
            moves = moves or len(surface.nodes[i]) == 1 or any(len(values) > 1 for values in seen.values())
        if not moves:
            raise UsageError(f"{OPTION} {free.key.name}: it does not change {' or '.join(surfaces)}")


def _search(ledger: _Ledger, surfaces: Mapping[str, Surface]) -> list[Point]:
    """Points where the surfaces come closest to 1, best first.

    All keys but the one with the most values are enumerated; at each of their values the largest difference is least
    where one axis meets its target, where two axes are equally far off, or at an end of the range.
    """
    *others, last = ledger.free
    per_key = max(2, round(TRIED ** (1 / max(1, len(others)))))
    scores: dict[Point, float] = {}

    def visit(first: Point) -> None:
        curves = [surface.curve(first) for surface in surfaces.values()]
        for value in _least(curves, last):
            scores[(*first, value)] = score(curves, value)

    for first in product(*(ledger.valid_alone(i, f.spread(per_key)) for i, f in enumerate(others))):
        visit(first)
    for halvings in range(1, HALVINGS if others else 0):  # between the values that were tried
        for point in ledger.valid_of(nsmallest(KEPT + REFUSED, scores, key=scores.__getitem__), KEPT):
            steps = (
                {f.nearest(v * (1 + j * 0.5**halvings)) for j in (-1, 0, 1)}
                for f, v in zip(others, point, strict=False)
            )
            for first in product(*steps):
                visit(first)
    # Where the spec is not valid at all values of the last key, the nearest ones at which it is.
    best: dict[Point, Point] = {}
    for point in sorted(scores, key=scores.__getitem__):
        best.setdefault(point[:-1], point)
    checked = len(ledger.specs)
    for first, point in best.items():
        if len(ledger.specs) - checked > CHECKED:
            break
        curves = [surface.curve(first) for surface in surfaces.values()]
        near = ledger.valid_near(point, len(point) - 1)
        scores |= {(*first, value): score(curves, value) for value in near}
    return sorted(scores, key=lambda point: (scores[point], ledger.change(point)))


def _least(curves: Sequence[Curve], free: Free) -> set[int]:
    """Values of the last key at which the largest difference can be least."""
    ends = {free.nearest(free.low), free.nearest(free.high), free.nearest(free.current)}
    roots = {root + i * free.step for root in turns(curves) for i in (-1, 0, 1)}
    return ends | {value for root in roots for value in free.around(root)}


def _off(axis: Axis) -> float:
    return abs(axis.ratio - 1) / (axis.tolerance or TINY)


def _bounds(spec: Spec, key: Key) -> tuple[int, int]:
    """What the grammar allows at every place of a key."""
    low, high = 0, 2**31
    for place in key.places:
        field = field_of(spec, place)
        for bound in field.metadata if field is not None else ():
            low = max(low, int(getattr(bound, "ge", low)), int(getattr(bound, "gt", low - 1)) + 1)
            high = min(high, int(getattr(bound, "le", high)), int(getattr(bound, "lt", high + 1)) - 1)
    return low, high


def _at(text: str, column: int, message: str, hint: str | None = None) -> SpecError:
    return SpecError([Diagnostic(message, Source(OPTION, text).position(0, column, len(text)), (), hint)])
