"""Where things go in a scatter plot: scales, ticks, and labels that do not cover each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LOG_FROM = 4.0  # largest over smallest value from which an axis is logarithmic
_MARKER = 9.0  # pixels a marker takes to each side
_TEXT_HEIGHT, _TEXT_WIDTH = 15.0, 6.9  # of a label: line, and mean character


@dataclass(frozen=True)
class Point:
    """One thing to plot; `fill` from 0 to 1 is the share of the ring around the marker."""

    label: str
    colour: str
    x: float
    y: float
    fill: float | None
    details: str


@dataclass(frozen=True)
class Mark:
    """A point in pixels, its label's anchor, and whether a line must lead from one to the other."""

    point: Point
    x: float
    y: float
    text_x: float
    text_y: float
    anchor: str
    leader: bool


@dataclass(frozen=True)
class Axis:
    """Ticks as (pixel, label)."""

    title: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Scatter:
    """A plot of width × height pixels whose inner area is left..right × top..bottom."""

    title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis
    marks: list[Mark]


def scatter(
    title: str, x_title: str, y_title: str, points: Sequence[Point], width: float = 560, height: float = 400
) -> Scatter:
    """Lay out a plot; x starts at 0, y is logarithmic where the values span orders of magnitude."""
    left, right, top, bottom = 62.0, width - 16.0, 16.0, height - 48.0
    x_of, x_ticks = _linear(0.0, max(p.x for p in points), left, right)
    low, high = min(p.y for p in points), max(p.y for p in points)
    scale = _logarithmic if low > 0 and high / low > _LOG_FROM else _linear
    y_of, y_ticks = scale(low, high, bottom, top)
    places = [(x_of(p.x), y_of(p.y)) for p in points]
    return Scatter(
        title, width, height, left, right, top, bottom, Axis(x_title, x_ticks), Axis(y_title, y_ticks),
        _label(points, places, (left, right, top, bottom)),
    )  # fmt: skip


Scale = tuple[Callable[[float], float], list[tuple[float, str]]]


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    """Pixels from start to end for values from low to high, with some air, and ticks at round values."""
    span = high - low or abs(high) or 1.0
    first, last = (low if low == 0 else low - 0.08 * span), high + 0.08 * span
    step = 10 ** math.floor(math.log10((last - first) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (last - first) / (step * factor) <= 6)

    def place(value: float) -> float:
        return start + (value - first) / (last - first) * (end - start)

    values = [i * step for i in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return place, [(place(value), f"{value:,.10g}") for value in values]


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """The same on a logarithmic axis, ticks at 1, 2 and 5 times powers of ten."""
    first, last = math.log10(low), math.log10(high)
    air = 0.08 * (last - first)
    first, last = first - air, last + air

    def place(value: float) -> float:
        return start + (math.log10(value) - first) / (last - first) * (end - start)

    decades = range(math.floor(first), math.ceil(last) + 1)
    factors = (1, 2, 5) if last - first < 3 else (1,)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return place, [(place(value), f"{value:,.10g}") for value in values if first <= math.log10(value) <= last]


Box = tuple[float, float, float, float]


def _label(points: Sequence[Point], places: Sequence[tuple[float, float]], area: Box) -> list[Mark]:
    """Put each label at the nearest free place around its marker."""
    taken: list[Box] = [(x - _MARKER, x + _MARKER, y - _MARKER, y + _MARKER) for x, y in places]
    marks: dict[int, Mark] = {}
    for i in sorted(range(len(points)), key=lambda i: places[i][1]):
        (x, y), width = places[i], len(points[i].label) * _TEXT_WIDTH
        best = min(_candidates(x, y, width), key=lambda c: (_overlap(c[3], taken, area), abs(c[1] - y)))
        text_x, text_y, anchor, box = best
        taken.append(box)
        marks[i] = Mark(points[i], x, y, text_x, text_y, anchor, leader=abs(text_y - y) > _TEXT_HEIGHT)
    return [marks[i] for i in range(len(points))]


def _candidates(x: float, y: float, width: float) -> list[tuple[float, float, str, Box]]:
    """Label places right and left of a marker, at its height and farther and farther above and below."""
    found = []
    for lines in range(9):
        for dy in {lines * _TEXT_HEIGHT, -lines * _TEXT_HEIGHT}:
            middle = y + dy
            rows = (middle - _TEXT_HEIGHT / 2, middle + _TEXT_HEIGHT / 2)
            start = x + _MARKER + 4
            found.append((start, middle, "start", (start, start + width, *rows)))
            end = x - _MARKER - 4
            found.append((end, middle, "end", (end - width, end, *rows)))
    return found


def _overlap(box: Box, taken: Sequence[Box], area: Box) -> float:
    """How much of a label would cover others or leave the plot."""
    covered = sum(_shared(box, other) for other in taken)
    size = (box[1] - box[0]) * (box[3] - box[2])
    return covered + 4 * (size - _shared(box, area))


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))
