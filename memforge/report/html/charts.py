"""The geometry of line charts: scales, ticks, and curves of any length in as many points as there are pixels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from memforge.report.cost import si
from memforge.report.html.figures import Tick
from memforge.report.inspect import share
from memforge.report.run import Series

# The greatest value is so many times the least: on a linear axis, the lower half of such a curve is a flat line.
LOG_RATIO = 20
# Ten times less than this has few digits left in a float.
LEAST_LOG = 1e-300
# A curve of so few points shows each as a dot.
MAX_DOTS = 40
# The label of a resume needs this much room.
LABEL_GAP = 64


@dataclass(frozen=True)
class Frame:
    """The size of a chart and its margins, in the units of its viewBox."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    x_ticks: int
    y_ticks: int


WIDE = Frame(width=860, height=270, left=54, top=16, right=840, bottom=242, x_ticks=8, y_ticks=5)
SMALL = Frame(width=260, height=154, left=50, top=17, right=246, bottom=130, x_ticks=4, y_ticks=4)


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """One line; `color` is the number of its class. Of more values than pixels, `spread` covers all and the line is the
    mean of each pixel column.
    """

    name: str
    color: int
    path: str
    spread: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Resume:
    """Where another process went on; the label is empty where there is no room."""

    x: float
    step: int
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    text: str
    frame: Frame
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    resumes: tuple[Resume, ...]
    log: bool


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of a picture, and where its ticks stand."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def all_at(self, values: Iterable[float]) -> list[float]:
        """Where values stand; NaN stands at NaN."""
        if self.log:
            values = (math.log10(value) for value in values)
        low, high = (math.log10(end) if self.log else end for end in (self.low, self.high))
        scale = (self.end - self.start) / (high - low)
        return [self.start + (value - low) * scale for value in values]


@dataclass(frozen=True)
class Look:
    """How the values of a chart are shown: as shares in percent or as numbers, from zero or from the least one."""

    percent: bool = False
    from_zero: bool = False
    log: bool = False

    def shown(self, value: float) -> str:
        return share(value) if self.percent else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"

    def tick(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.6g}%"
        if 0 < abs(value) < 0.001:
            digits, _, power = f"{value:.1e}".partition("e")
            return f"{float(digits):g}e{int(power)}"
        return si(value) if abs(value) >= 10_000 else f"{value:,.6g}"


def chart(
    title: str,
    named: Sequence[tuple[str, Series]],
    *,
    frame: Frame,
    steps: tuple[int, int],
    look: Look = Look(),
    starts: Sequence[int] = (),
) -> Chart | None:
    """The curves of a chart over the steps of a run; None when none of them has a value."""
    values = [value for _, series in named for value in series.values if value == value]
    if not values:
        return None
    x, y = step_axis(*steps, frame), value_axis(min(values), max(values), frame, look)
    drawn = [(i, name, series) for i, (name, series) in enumerate(named) if any(v == v for v in series.values)]
    return Chart(
        title=title,
        text=f"{title}. " + "; ".join(_told(name, series, look) for _, name, series in drawn),
        frame=frame,
        x_ticks=tuple(Tick(at, si(int(value))) for at, value in zip(x.all_at(x.ticks), x.ticks, strict=True)),
        y_ticks=tuple(Tick(at, look.tick(value)) for at, value in zip(y.all_at(y.ticks), y.ticks, strict=True)),
        curves=tuple(_curve(name, i, series, x, y, look) for i, name, series in drawn),
        resumes=_resumes(starts, x, frame),
        log=y.log,
    )


def _told(name: str, series: Series, look: Look) -> str:
    """A curve in words."""
    points = [(v, s) for s, v in zip(series.steps, series.values, strict=True) if v == v]
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{name} {look.shown(first)} at step {start:,}"
    least, most = min(points), max(points)
    return (
        f"{name} from {look.shown(first)} at step {start:,} to {look.shown(last)} at step {end:,}, "
        f"least {look.shown(least[0])} at {least[1]:,}, greatest {look.shown(most[0])} at {most[1]:,}"
    )


def step_axis(first: int, last: int, frame: Frame) -> Axis:
    """Whole steps; a run of one stands in the middle."""
    low, high = (first - 1, last + 1) if first == last else (first, last)
    every = max(1.0, _round_step((high - low) / frame.x_ticks))
    ticks = (first,) if first == last else tuple(_multiples(low, high, every))
    return Axis(low, high, frame.left, frame.right, tuple(ticks))


def value_axis(low: float, high: float, frame: Frame, look: Look) -> Axis:
    """The axis of values, logarithmic where it may be and their range asks for it."""
    if look.log and low > LEAST_LOG and high / low > LOG_RATIO:
        return _log_axis(low, high, frame)
    low = min(low, 0.0) if look.from_zero else low
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        room = abs(high) * 0.1 or 1.0
        low, high = (low if look.from_zero else low - room), high + room
    every = _round_step((high - low) / frame.y_ticks)
    low, high = math.floor(low / every + 1e-9) * every, math.ceil(high / every - 1e-9) * every
    return Axis(low, high, frame.bottom, frame.top, tuple(_multiples(low, high, every)))


def _log_axis(low: float, high: float, frame: Frame) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    low, high = max(m for m in marks if m <= low * (1 + 1e-9)), min(m for m in marks if m >= high * (1 - 1e-9))
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) > 2 * frame.y_ticks:
        tens = [10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high]
        ticks = tens[:: math.ceil(len(tens) / (2 * frame.y_ticks))]
    return Axis(low, high, frame.bottom, frame.top, tuple(ticks), log=True)


def _round_step(rough: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _multiples(low: float, high: float, every: float) -> Iterator[float]:
    for i in range(math.ceil(low / every - 1e-9), math.floor(high / every + 1e-9) + 1):
        yield i * every


def _curve(name: str, color: int, series: Series, x: Axis, y: Axis, look: Look) -> Curve:
    points = list(zip(x.all_at(series.steps), y.all_at(series.values), strict=True))
    dots: tuple[Dot, ...] = ()
    if len(points) <= MAX_DOTS:
        dots = tuple(
            Dot(*point, f"{name}: {look.shown(value)} at step {step:,}")
            for point, step, value in zip(points, series.steps, series.values, strict=True)
            if value == value
        )
    if len(points) <= 2 * (x.end - x.start):
        return Curve(name, color, path_of(points), "", dots)
    columns = _columns(points)
    means = [_mean(column) for column in columns]
    return Curve(name, color, path_of(means), path_of([p for column in columns for p in _extremes(column)]), dots)


Point = tuple[float, float]


def _columns(points: Sequence[Point]) -> list[list[Point]]:
    """The points by the pixel column they stand in."""
    return [list(column) for _, column in groupby(points, key=lambda point: int(point[0]))]


def _mean(column: list[Point]) -> Point:
    known = [y for _, y in column if y == y]
    return column[0][0], sum(known) / len(known) if known else math.nan


def _extremes(column: list[Point]) -> list[Point]:
    """The lowest and the highest point of a column in their order, or a gap."""
    known = [point for point in column if point[1] == point[1]]
    if not known:
        return column[:1]
    return sorted({min(known, key=_height), max(known, key=_height)})


def _height(point: Point) -> float:
    return point[1]


def path_of(points: Sequence[Point]) -> str:
    """The d of an SVG path, which starts anew after a gap."""
    parts, pen = [], "M"
    for x, y in points:
        if y != y:
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def _resumes(starts: Sequence[int], x: Axis, frame: Frame) -> tuple[Resume, ...]:
    """All starts but the first, labelled where there is room up to the next."""
    at = x.all_at(starts[1:])
    room = [next_ - here for here, next_ in pairwise([*at, frame.right])]
    labels = ["resumed" if frame is WIDE and gap >= LABEL_GAP else "" for gap in room]
    return tuple(Resume(*one) for one in zip(at, starts[1:], labels, strict=True))
