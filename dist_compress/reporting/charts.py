"""Line charts as inline SVG: no script, no external resource, coloured by the style sheet of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 26
_MAX_POINTS = 600  # more than that no screen shows; the extremes of each bucket are kept
_MAX_DOTS = 40


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high], steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points, limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points: of each bucket the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def line_chart(
    label: str,
    series: Mapping[str, Points],
    *,
    marks: Mapping[float, str] | None = None,
    last_step: float | None = None,
    show: Callable[[float], str] = "{:g}".format,
    from_zero: bool = False,
    steps: bool = False,
) -> str:
    """An <svg> of named series [(step, value)] over the step axis.

    `marks`: {step: tooltip} drawn as vertical lines. `steps`: values hold until the next one (settings, not
    measurements). A series has its colour by position; six are told apart.
    """
    points = [p for line in series.values() for p in line]
    values = [0.0, *(v for _, v in points)] if from_zero else [v for _, v in points]
    y_ticks = ticks(min(values), max(values))
    x_end = max(last_step or 0, max(x for x, _ in points), 1)
    x_ticks = [x for x in ticks(0, x_end, about=5) if x <= x_end and x == int(x)]

    def x_of(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / x_end

    def y_of(value: float) -> float:
        low, high = y_ticks[0], y_ticks[-1]
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    right = _WIDTH - _RIGHT
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_tick(_LEFT - 8, y + 3.5, "end", show(value)))
    for step in x_ticks:
        parts.append(_tick(x_of(step), _HEIGHT - 8, "middle", f"{step:.0f}"))
    for step, text in (marks or {}).items():
        x = f"{x_of(step):.1f}"
        parts.append(
            f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(text)}</title></line>"
        )
    for number, (name, line) in enumerate(series.items()):
        parts.append(_line(name, number % 6, thin(line), x_of, y_of, show, steps, x_end))
    return "".join([*parts, "</svg>"])


def _tick(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(
    name: str,
    number: int,
    points: Points,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    show: Callable[[float], str],
    steps: bool,
    x_end: float,
) -> str:
    """One series: its path, and a dot with a tooltip at each point where there are few."""
    path = f"M{x_of(points[0][0]):.1f} {y_of(points[0][1]):.1f}"
    for x, y in points[1:]:
        path += f"H{x_of(x):.1f}V{y_of(y):.1f}" if steps else f"L{x_of(x):.1f} {y_of(y):.1f}"
    if steps:
        path += f"H{x_of(x_end):.1f}"
    parts = [f'<path class="line c{number}" d="{path}"/>']
    dots = points if len(points) <= _MAX_DOTS and not steps else points[-1:]
    for x, y in dots:
        tip = escape(f"{name}, step {x:g}: {show(y)}")
        at = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}"'
        parts.append(f'<circle class="dot c{number}" {at} r="2.6"><title>{tip}</title></circle>')
    return "".join(parts)
