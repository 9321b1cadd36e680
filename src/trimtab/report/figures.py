"""The pictures, as inline SVG. Colours and shapes are classes of style.css, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from trimtab.judge import Interval
from trimtab.report.rows import fraction, interval_text, number

#: Width and height of a scatter, and its margins, in SVG units (about a CSS pixel).
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 330, 58, 18, 16, 48
#: Half the width of a character, and the height of a line, in the larger letters of a telephone.
CHARACTER, LINE = 5.0, 17


@dataclass(frozen=True)
class Point:
    """One measured model: `x` in the unit of the axis, `y` with its interval."""

    label: str
    title: str
    outcome: str
    x: float
    y: Interval


@dataclass(frozen=True)
class Dimension:
    """What an axis shows, whether less of it is better, and whether 0 lies infinitely far off (a ratio)."""

    name: str
    less_is_better: bool
    positive: bool = False

    def better(self, value: float) -> float:
        """Returns a number that grows with quality."""
        return -value if self.less_is_better else value


#: Something that a label must not cover: centre x, centre y, half the width, in SVG units.
Box = tuple[float, float, float]


class Axis:
    """A map from values to SVG units; logarithmic where values span more than a factor of 4.

    Args:
        values: what must be visible; those that are not finite are ignored.
        positive: ignore values that are not positive, too, so that the axis may be logarithmic.
        start, stop: SVG units of the least and the greatest value.
        margin: share of the span that is left free at both ends.
    """

    def __init__(
        self, values: Sequence[float], start: float, stop: float, *, margin: float = 0.07, positive: bool = False
    ):
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not positive)] or [1.0]
        low, high = min(finite), max(finite)
        self.log = low > 0 and high / low > 4
        self.start, self.stop = start, stop
        low, high = self._scale(low), self._scale(high)
        room = (high - low) * margin or abs(high) * 0.05 or 1.0
        self.low, self.high = low - room, high + room

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def __call__(self, value: float) -> float:
        """Returns the place of a value; one outside the axis, or infinite, lies at its end."""
        if self.log and value <= 0:
            return self.start
        share = (self._scale(value) - self.low) / (self.high - self.low) if math.isfinite(value) else value
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Returns about five round values: 1, 2 or 5 times a power of ten; over many decades, the powers alone."""
        if self.log:
            exponents = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1)
            digits = (1, 2, 5) if self.high - self.low < math.log(200) else (1,)
            found = [digit * 10.0**e for e in exponents for digit in digits]
            return [tick for tick in found if self.low <= math.log(tick) <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(i * step, 10) for i in range(first, last + 1)]


def scatter(points: Sequence[Point], x: Dimension, y: Dimension, limit: float | None) -> Markup:
    """Returns quality (with error bars and its limit) against cost, the Pareto frontier as a staircase."""
    points = [point for point in points if math.isfinite(point.y.estimate)]
    if not points:
        return Markup("")
    ends = [end for p in points for end in (p.y.estimate, p.y.low, p.y.high)] + ([limit] if limit else [])
    across = Axis([p.x for p in points], LEFT, WIDTH - RIGHT, margin=0.09)
    up = Axis(ends, HEIGHT - BOTTOM, TOP, positive=y.positive)
    taken: list[Box] = [(across(p.x), up(p.y.estimate), 8.0) for p in points]
    parts = [_grid(across, up, x, y)]
    parts.append(_frontier(points, x, y, across, up))
    if limit is not None:
        parts.append(_limit(up(limit), limit, y, taken))
    parts += [_error_bar(across(p.x), up(p.y.low), up(p.y.high), p.outcome) for p in points]
    parts += [_mark(p, across(p.x), up(p.y.estimate), x) for p in points]
    parts += _labels(points, across, up, taken)
    return _tag(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{y.name} against {x.name}, {len(points)} measured models",
    )


def pareto(points: Sequence[Point], x: Dimension, y: Dimension) -> list[Point]:
    """Returns the points that no other beats in both dimensions, from the best x to the best y."""
    chosen: list[Point] = []
    for point in sorted(points, key=lambda p: (x.better(p.x), y.better(p.y.estimate)), reverse=True):
        if not chosen or y.better(point.y.estimate) > y.better(chosen[-1].y.estimate):
            chosen.append(point)
    return chosen


def interval_plot(lines: Sequence[tuple[str, Interval]], limit: float | None, quantity: Dimension) -> Markup:
    """Returns one line for each interval on a common axis; the side of the limit that fails is shaded.

    Args:
        lines: what the interval is of, and the interval.
        limit: where the criterion lies, or None.
    """
    left, right, line, width = 110, 210, 30, 700
    bottom = 14 + line * len(lines)
    ends = [end for _, i in lines for end in (i.estimate, i.low, i.high)] + ([limit] if limit else [])
    if not any(math.isfinite(end) for end in ends):
        return Markup("")
    axis = Axis(ends, left, width - right, margin=0.12, positive=quantity.positive)
    parts: list[Markup] = []
    if limit is not None:
        place = axis(limit)
        failing = (place, axis.stop) if quantity.less_is_better else (axis.start, place)
        parts.append(
            _tag("rect", x=failing[0], y=6, width=failing[1] - failing[0], height=bottom - 6, class_="failing")
        )
        parts.append(_line(place, 6, place, bottom, "limit"))
        word = "at most" if quantity.less_is_better else "at least"
        parts.append(_text(f"{word} {fraction(limit)}", width - right + 14, bottom + 18, "limit-text"))
    parts.append(_line(axis.start, bottom, axis.stop, bottom, "axis"))
    parts += [_text(_tick(tick, axis), axis(tick), bottom + 18, "tick", text_anchor="middle") for tick in axis.ticks()]
    for place, (label, interval) in enumerate(lines):
        middle = 14 + line * (place + 0.5)
        parts.append(_text(label, left - 14, middle + 4, "tick", text_anchor="end"))
        parts.append(_line(axis(interval.low), middle, axis(interval.high), middle, "interval"))
        parts += [_line(axis(e), middle - 5, axis(e), middle + 5, "interval") for e in (interval.low, interval.high)]
        if math.isfinite(interval.estimate):
            parts.append(_tag("circle", cx=axis(interval.estimate), cy=middle, r=5, class_="estimate"))
        parts.append(_text(interval_text(interval), width - right + 14, middle + 4, "value"))
    return _tag(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {width} {bottom + 26}",
        role="img",
        aria_label=f"{quantity.name}: " + "; ".join(f"{name} {interval_text(i)}" for name, i in lines),
    )


def key(outcome: str) -> Markup:
    """Returns the shape of an outcome, for a legend."""
    return _tag("svg", _shape(outcome, 9, 9), viewBox="0 0 18 18", class_="key", aria_hidden="true")


def _grid(across: Axis, up: Axis, x: Dimension, y: Dimension, arrow: bool = True) -> Markup:
    parts = []
    for tick in up.ticks():
        parts.append(_line(LEFT, up(tick), WIDTH - RIGHT, up(tick), "grid"))
        parts.append(_text(_tick(tick, up), LEFT - 8, up(tick) + 4, "tick", text_anchor="end"))
    for tick in across.ticks():
        text = _tick(tick, across)
        place = min(across(tick), WIDTH - CHARACTER * len(text))  # a long number stays within the picture
        parts.append(_text(text, place, HEIGHT - BOTTOM + 19, "tick", text_anchor="middle"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    sideways = f"← {x.name}, less is better" if x.less_is_better else f"{x.name}, more is better →"
    sideways = sideways if arrow else x.name
    anchor, place = ("start", LEFT) if x.less_is_better else ("end", WIDTH - RIGHT)
    parts.append(_text(sideways, place, HEIGHT - 8, "name", text_anchor=anchor))
    return Markup("").join(parts)


def _limit(place: float, limit: float, y: Dimension, taken: list[Box]) -> Markup:
    """Draws the limit and names it where the name covers no point; its box joins `taken`."""
    half = 48.0
    spots = [(x, place + rise) for x in (WIDTH - RIGHT - half, LEFT + half) for rise in (-9, 11)]
    spot = _free([s for s in spots if TOP <= s[1] <= HEIGHT - BOTTOM - 8] or spots, half, taken)
    words = f"{'at most' if y.less_is_better else 'at least'} {fraction(limit)}"
    text = _text(words, spot[0], spot[1] + 4, "limit-text", text_anchor="middle")
    return _line(LEFT, place, WIDTH - RIGHT, place, "limit") + text


def _free(spots: Sequence[tuple[float, float]], half: float, taken: list[Box]) -> tuple[float, float]:
    """Returns the first spot where a label of half the width `half` covers nothing (or the first), and takes it."""
    free = (s for s in spots if all(abs(s[0] - x) > half + w or abs(s[1] - y) >= LINE for x, y, w in taken))
    spot = next(free, spots[0])
    taken.append((*spot, half))
    return spot


def _frontier(points: Sequence[Point], x: Dimension, y: Dimension, across: Axis, up: Axis) -> Markup:
    """Between two neighbours the frontier has the x of the better y and the y of the better x: a corner."""
    best = pareto(points, x, y)
    if len(best) < 2:
        return Markup("")
    path = f"M{across(best[0].x):.1f} {up(best[0].y.estimate):.1f}"
    path += "".join(f"H{across(p.x):.1f}V{up(p.y.estimate):.1f}" for p in best[1:])
    return _tag("path", d=path, class_="frontier")


def _error_bar(x: float, low: float, high: float, outcome: str) -> Markup:
    ends = [_line(x - 4, y, x + 4, y, f"bar {outcome}") for y in (low, high)] if low != high else []
    return Markup("").join([_line(x, low, x, high, f"bar {outcome}"), *ends])


def _mark(point: Point, x: float, y: float, dimension: Dimension) -> Markup:
    told = f"{point.label}: {point.title}, {interval_text(point.y)}, {number(point.x)} {dimension.name}"
    return _tag("g", _tag("title", told) + _shape(point.outcome, x, y))


def _shape(outcome: str, x: float, y: float) -> Markup:
    css = f"mark {outcome}"
    if outcome == "accepted":
        return _tag("circle", cx=x, cy=y, r=6.5, class_=css)
    if outcome == "rejected":
        d = f"M{x - 5:.1f} {y - 5:.1f}L{x + 5:.1f} {y + 5:.1f}M{x - 5:.1f} {y + 5:.1f}L{x + 5:.1f} {y - 5:.1f}"
        return _tag("path", d=d, class_=css)
    if outcome == "indeterminate":
        return _tag("path", d=f"M{x:.1f} {y - 6.5:.1f}l6.5 12h-13z", class_=css)
    return _tag("rect", x=x - 5, y=y - 5, width=10, height=10, class_=css)


def _labels(points: Sequence[Point], across: Axis, up: Axis, taken: list[Box]) -> list[Markup]:
    """Places each label beside its point, where it covers no other point and no other label."""
    parts = []
    for point in points:
        x, y, half = across(point.x), up(point.y.estimate), CHARACTER * len(point.label)
        rises = sorted((LINE * step for step in range(-5, 6)), key=abs)
        spots = [(x + side * (9 + half), y + rise) for rise in rises for side in (1, -1)]
        inside = [s for s in spots if LEFT + half <= s[0] <= WIDTH - RIGHT - half and TOP <= s[1] <= HEIGHT - BOTTOM]
        left, middle = _free(inside or spots, half, taken)
        if abs(middle - y) > LINE:
            parts.append(_line(x, y, left - math.copysign(half, left - x), middle, "leader"))
        parts.append(_text(point.label, left, middle + 5, "label", text_anchor="middle"))
    return parts


def _tick(value: float, axis: Axis) -> str:
    if axis.log:
        return f"{value:g}"
    ticks = axis.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def _text(text: str, x: float, y: float, css: str, **attributes: str) -> Markup:
    return _tag("text", text, x=x, y=y, class_=css, **attributes)


def _tag(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """Returns an element; text and attribute values are escaped, floats are rounded to a tenth."""
    written = (
        (key.rstrip("_") if key == "class_" else key.replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    )
    inside = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in written)
    return Markup("<{}{}>{}</{}>").format(Markup(name), inside, escape(content), Markup(name))
