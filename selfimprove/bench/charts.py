"""Charts as SVG text: lines with bands, and intervals. Colours are classes, so that the page's style sheet gives them in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 12, 48
COLOURS = 8
"""Classes ``c0`` … ``c7`` of the style sheet; the ninth line begins again, with dashes."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: points (x, y, half width of its band), from left to right."""

    name: str
    points: Sequence[tuple[float, float, float]]
    dashed: bool = False


def lines(series: Sequence[Line], x: str, y: str) -> str:
    """A chart of lines with their bands, and its legend; empty without a point."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    low_x, high_x = _range([p[0] for p in points])
    low_y, high_y = _range([v for p in points for v in (p[1] - p[2], p[1] + p[2])])

    def at(px: float, py: float) -> tuple[float, float]:
        across = LEFT + (px - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high_y - py) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    body = [_axes(low_x, high_x, low_y, high_y, x, y)]
    for n, s in enumerate(series):
        if any(p[2] for p in s.points):
            edge = [at(p[0], p[1] + p[2]) for p in s.points] + [at(p[0], p[1] - p[2]) for p in reversed(s.points)]
            body.append(f'<polygon class="band c{n % COLOURS}" points="{_path(edge)}"/>')
    for n, s in enumerate(series):
        dashes = " dashed" if s.dashed or n >= COLOURS else ""
        body.append(f'<polyline class="line c{n % COLOURS}{dashes}" points="{_path([at(p[0], p[1]) for p in s.points])}"/>')
        body += [f'<circle class="dot c{n % COLOURS}" cx="{cx}" cy="{cy}" r="2.5"/>' for cx, cy in (at(p[0], p[1]) for p in s.points[-1:])]
    legend = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><line class="line c{n % COLOURS}{" dashed" if s.dashed or n >= COLOURS else ""}" '
        f'x1="0" y1="4" x2="24" y2="4"/></svg>{escape(s.name)}</li>'
        for n, s in enumerate(series)
    )
    label = escape(f"{y} over {x}: " + "; ".join(f"{s.name} ends at {s.points[-1][1]:.3f}" for s in series if s.points))
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    return f'<figure>{svg}<ul class="legend">{legend}</ul></figure>'


def intervals(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Differences with their intervals, one below the other, and a line at zero. A row is (name, difference, low, high, class)."""
    if not rows:
        return ""
    step, low, high = 40, *_range([0.0, *(v for r in rows for v in r[1:4])])
    height = step * len(rows) + 26

    def at(value: float) -> float:
        return round(30 + (value - low) / (high - low) * (WIDTH - 60), 1)

    body = [f'<line class="zero" x1="{at(0)}" y1="0" x2="{at(0)}" y2="{height - 22}"/>']
    for n, (name, value, left, right, kind) in enumerate(rows):
        y = step * n + 28
        body.append(f'<text class="tick" x="12" y="{y - 12}">{escape(name)}</text>')
        body.append(f'<line class="interval {kind}" x1="{at(left)}" y1="{y}" x2="{at(right)}" y2="{y}"/>')
        body.append(f'<circle class="point {kind}" cx="{at(value)}" cy="{y}" r="4"/>')
    body += [f'<text class="tick" text-anchor="middle" x="{at(t)}" y="{height - 6}">{t:+.3g}</text>' for t in _ticks(low, high)]
    label = escape("; ".join(f"{r[0]}: {r[1]:+.3f} from {r[2]:+.3f} to {r[3]:+.3f}" for r in rows))
    return f'<figure><svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(body)}</svg></figure>'


def _axes(low_x: float, high_x: float, low_y: float, high_y: float, x: str, y: str) -> str:
    body = []
    for tick in _ticks(low_y, high_y):
        at = round(TOP + (high_y - tick) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)
        body.append(f'<line class="grid" x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}"/>')
        body.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 4}">{tick:.3g}</text>')
    for tick in _ticks(low_x, high_x):
        at = round(LEFT + (tick - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)
        body.append(f'<text class="tick" text-anchor="middle" x="{at}" y="{HEIGHT - BOTTOM + 20}">{tick:.3g}</text>')
    body.append(f'<text class="tick" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x)}</text>')
    body.append(f'<text class="tick" text-anchor="middle" transform="translate(12 {HEIGHT / 2 - 20}) rotate(-90)">{escape(y)}</text>')
    return "".join(body)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, never the same."""
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or max(abs(high) * 0.1, 0.05)
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)
