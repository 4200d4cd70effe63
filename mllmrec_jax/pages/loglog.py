"""A picture with two logarithmic axes as an SVG that stands alone: lines, marks with names, and a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from mllmrec_jax.pages.charts import format_number

COLOURS = ("#0969da", "#cf5c00", "#1a7f37", "#8250df", "#7d8590")
"""Readable on white and on the dark page of a repository."""
GREY = "#7d8590"
LEFT, TOP, BOTTOM = 64, 44, 48


class Line(NamedTuple):
    """Points joined in order; an empty label keeps it out of the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = True
    dashed: bool = False


class Mark(NamedTuple):
    """One named point."""

    label: str
    x: float
    y: float
    colour: str
    hollow: bool = False


def choose_log_ticks(low: float, high: float) -> list[float]:
    """Values that enclose [low, high]: 1, 2 and 5 times powers of ten, or powers of ten alone over three decades or more."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    steps = [f * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for f in factors]
    first = max(step for step in steps if step <= low * 1.0001)
    last = min(step for step in steps if step >= high * 0.9999)
    return [step for step in steps if first <= step <= last]


def draw_loglog_panel(
    lines: Sequence[Line], marks: Sequence[Mark] = (), *, title: str, x_label: str, y_label: str, width: int = 380, height: int = 320
) -> Markup:
    """One panel at the origin.

    Raises:
      ValueError: nothing to draw, or a coordinate is not positive.
    """
    points = [point for line in lines for point in line.points] + [(mark.x, mark.y) for mark in marks]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError(f"points: must be positive and at least one, were {points[:4]}")
    x_ticks = choose_log_ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = choose_log_ticks(min(y for _, y in points), max(y for _, y in points))
    right, bottom = width - 20, height - BOTTOM

    def scale(value: float, ticks: Sequence[float], first: float, last: float) -> float:
        span = math.log(ticks[-1] / ticks[0]) or 1.0
        return first + math.log(value / ticks[0]) / span * (last - first)

    def place(x: float, y: float) -> tuple[float, float]:
        return scale(x, x_ticks, LEFT, right), scale(y, y_ticks, bottom, TOP)

    parts = [Markup('<text x="{}" y="16" class="title">{}</text>').format(LEFT, title)]
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts.append(Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" class="grid"/>').format(LEFT, right, y, y))
        parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, format_number(tick)))
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}" class="grid"/>').format(x, x, TOP, bottom))
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, bottom + 16, format_number(tick)))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format((LEFT + right) / 2, height - 10, x_label))
    parts.append(
        Markup('<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format((TOP + bottom) / 2, y_label)
    )
    at = LEFT
    for line in lines:
        placed = [place(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = Markup(' stroke-dasharray="5 4"') if line.dashed else ""
        parts.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"{}/>').format(path, line.colour, dash))
        if line.dots:
            parts += [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2" fill="{}"/>').format(x, y, line.colour) for x, y in placed]
        if line.label:
            parts.append(Markup('<text x="{}" y="34" style="fill:{}">{}</text>').format(at, line.colour, line.label))
            at += 7 * len(line.label) + 14
    taken: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.y):
        x, y = place(mark.x, mark.y)
        fill = "none" if mark.hollow else mark.colour
        parts.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.5" fill="{}" stroke="{}" stroke-width="1.6"/>').format(x, y, fill, mark.colour)
        )
        if not mark.label:
            continue
        below = y - 8
        while any(abs(below - other) < 12 and abs(x - beside) < 90 for beside, other in taken):
            below -= 6  # names of neighbours are pushed apart
        taken.append((x, below))
        side, shift = ("end", -8) if x > (LEFT + right) / 2 else ("start", 8)
        text = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" style="fill:{}">{}</text>'
        parts.append(Markup(text).format(x + shift, below, side, mark.colour, mark.label))
    return Markup("").join(parts)


def join_panels(panels: Sequence[Markup], *, label: str, columns: int | None = None, width: int = 380, height: int = 320) -> str:
    """The panels as one SVG file, in rows of `columns` (all in one row where None); `label` says what it shows."""
    columns = columns or len(panels)
    groups = [
        Markup('<g transform="translate({} {})">{}</g>').format(i % columns * width, i // columns * height, panel)
        for i, panel in enumerate(panels)
    ]
    whole = (columns * width, -(-len(panels) // columns) * height)
    style = f"text{{font:12px system-ui,sans-serif;fill:{GREY}}}.title{{font-weight:600}}.grid{{stroke:{GREY};stroke-opacity:.25}}"
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" viewBox="0 0 {} {}" role="img" aria-label="{}"><style>{}</style>'
    ).format(*whole, *whole, label, Markup(style))
    return f"{head}{Markup('').join(groups)}</svg>\n"
