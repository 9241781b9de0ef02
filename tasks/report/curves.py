"""Draws a metric over the rounds of a job: pure functions from the rounds' records to SVG text.

The same records give the same text. A value is drawn at the round whose record holds it. The
metrics of a round are the score of the model that it started from. Metric names come from the
sites, so the picture escapes them, and keys contain only safe characters.
"""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from fedpool.tasks.record import RoundRecord
from fedpool.tasks.report.tables import metric_names, values

MAX_CURVES = 8

_WIDTH, _HEIGHT = 640, 320
_LEFT, _TOP, _RIGHT, _BOTTOM = 96, 48, 624, 272
"""Edges of the plot area, in pixels."""
_MAX_POINTS = 600
"""More points are thinned out, because the plot has only about one pixel for each."""
_MAX_DOTS = 60
_MAX_TITLE, _MAX_SLUG = 30, 40
_LARGEST = 1e100
_SMALLEST = 1e-100

Point = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A picture of one metric.

    Attributes:
        key: of its artifact: lowercase letters, digits and dashes.
        metric: the name as the sites report it.
        svg: the picture.
    """

    key: str
    metric: str
    svg: str

    @property
    def uri(self) -> str:
        """The picture as a `data:` URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def curves(records: Sequence[RoundRecord], *, first: str) -> list[Curve]:
    """A picture per metric or logged scalar of a job, at most `MAX_CURVES`, if it has finite
    values.

    Args:
        first: the metric that comes first; the others follow in the order of their names.
    """
    drawn: dict[str, Curve] = {}
    for name in sorted(metric_names(records), key=lambda name: (name != first, name)):
        known = [(record.round, values(record)[name]) for record in records if name in values(record)]
        points = [(round, value) for round, value in known if abs(value) <= _LARGEST]  # excludes NaN and infinity
        if points and len(drawn) < MAX_CURVES:
            key = _key(name, drawn)
            drawn[key] = Curve(key, name, draw(name, points))
    return list(drawn.values())


def draw(name: str, points: Sequence[Point]) -> str:
    """The SVG of a metric: a line through its values, with labelled axes; a dot for a single value.

    Args:
        name: of the metric, any text.
        points: one or more (round, value), by ascending round; values are at most 1e100 in
            magnitude.
    """
    axes = _Axes.of(points)
    shown = "".join(c if c.isprintable() else "?" for c in name)
    shown = escape(shown if len(shown) <= _MAX_TITLE else f"{shown[: _MAX_TITLE - 1]}…")
    last_round, last = points[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#475569">',
        f"<title>{shown} over rounds</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="28" font-size="16" font-weight="bold" fill="#0f172a">{shown}</text>',
        f'<text x="{_RIGHT}" y="28" text-anchor="end">{last:.6g} in round {last_round}</text>',
        *axes.drawn(),
    ]
    places = [f"{axes.x(number):.1f},{axes.y(value):.1f}" for number, value in _thinned(points)]
    parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="#2563eb" stroke-width="2"/>')
    if len(places) <= _MAX_DOTS:
        parts += [
            f'<circle cx="{left}" cy="{height}" r="3.5" fill="#2563eb"/>'
            for left, height in (place.split(",") for place in places)
        ]
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True, slots=True)
class _Axes:
    """The axes: rounds from `start` to `end`, values from `bottom` to `top`, in round steps."""

    start: int
    end: int
    x_step: int
    bottom: float
    top: float
    y_step: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Axes":
        start, end = points[0][0], points[-1][0]
        x_step = max(1, math.ceil(_nice((end - start) / 8)))
        return cls(start, end, x_step, *_value_axis([value for _, value in points]))

    def x(self, round: int) -> float:
        share = (round - self.start) / (self.end - self.start) if self.end > self.start else 0.5
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (_BOTTOM - _TOP)

    def drawn(self) -> list[str]:
        """The two axes, with a label at each step, and a grid line at each step of the values."""
        parts = []
        digits = _digits(max(abs(self.bottom), abs(self.top)), self.y_step)
        for count in range(round(self.bottom / self.y_step), round(self.top / self.y_step) + 1):
            value = count * self.y_step
            height = self.y(value)
            parts.append(f'<path d="M{_LEFT} {height:.1f}H{_RIGHT}" stroke="#e2e8f0"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:.{digits}g}</text>')
        for number in range(math.ceil(self.start / self.x_step) * self.x_step, self.end + 1, self.x_step):
            left = self.x(number)
            parts.append(f'<path d="M{left:.1f} {_BOTTOM}v5" stroke="#475569"/>')
            parts.append(f'<text x="{left:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{number}</text>')
        parts.append(f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_HEIGHT - 8}" text-anchor="middle">round</text>')
        parts.append(f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="#475569"/>')
        return parts


def _value_axis(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, upper end and step of an axis that holds the numbers, rounded."""
    low, high = min(numbers), max(numbers)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, _SMALLEST):  # all values are equal: nothing to magnify
        room = size / 2 if size > _SMALLEST else 1.0
        low, high = low - room, high + room
    step = _nice((high - low) / 5)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _nice(least: float) -> float:
    """The smallest number >= `least` that is 1, 2 or 5 times a power of ten."""
    if least <= 0:
        return 0.0
    power = math.floor(math.log10(least))
    return next(float(f"{m}e{power}") for m in (1, 2, 5, 10, 20) if float(f"{m}e{power}") >= least)


def _digits(size: float, step: float) -> int:
    """Significant digits needed to distinguish numbers of a size that differ by a step."""
    return max(6, math.ceil(math.log10(size / step)) + 1)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `_MAX_POINTS` points: the lowest and highest of each group, so no peak is lost."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [{min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])} for group in groups]
    return [point for pair in ends for point in sorted(pair)]


def _key(name: str, taken: dict[str, Curve]) -> str:
    """A metric's key: `curve-` and its name, with dashes for other characters; made unique."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_MAX_SLUG] or "metric"
    key, number = f"curve-{slug}", 1
    while key in taken:
        number += 1
        key = f"curve-{slug}-{number}"
    return key
