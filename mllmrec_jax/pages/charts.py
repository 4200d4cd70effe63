"""Inline SVG charts for reports: lines over steps, means with intervals, histograms, radars.

They carry no colours: the page's style sheet colours the classes `ink-<key>`, so one picture serves light and dark.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 360
"""Width of every chart's view box; about one CSS pixel a unit at the page's column width."""
MAX_POINTS = 240
"""Longer series are averaged in bins down to this many points."""
OUTLIER_FACTOR = 4.0
"""Points this many times above the 95th percentile (a first step that compiles) stay outside the frame, which says so."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: `ys` may hold None or non-finite values, which are left out."""

    label: str
    ink: str
    xs: Sequence[float]
    ys: Sequence[float | None]

    def points(self) -> list[tuple[float, float]]:
        """Finite (x, y) pairs."""
        return [(float(x), float(y)) for x, y in zip(self.xs, self.ys, strict=True) if y is not None and math.isfinite(y)]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval; `hollow` marks a floor."""

    label: str
    ink: str
    mean: float
    low: float
    high: float
    hollow: bool = False


def format_number(value: float) -> str:
    """Three significant digits: `0.412`, `1,240`, `1e-5`, `−0.31` (a true minus sign)."""
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-3 <= size < 1e4:
        text = f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"
    elif 1e4 <= size < 1e12:
        power = 1e9 if size >= 1e9 else 1e6 if size >= 1e6 else 1e3
        text = f"{value / power:.3g}" + {1e3: "k", 1e6: "M", 1e9: "G"}[power]
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")


def choose_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def bin_points(points: Sequence[tuple[float, float]], *, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of one bin of neighbours."""
    if len(points) <= limit:
        return list(points)
    edges = [round(index * len(points) / limit) for index in range(limit + 1)]
    bins = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def smooth_points(points: Sequence[tuple[float, float]], *, window: int) -> list[tuple[float, float]]:
    """Running mean over up to `window` points centred on each (fewer at the ends)."""
    before, after = (window - 1) // 2, window // 2
    smooth = []
    for index, (x, _) in enumerate(points):
        part = points[max(0, index - before) : index + after + 1]
        smooth.append((x, sum(y for _, y in part) / len(part)))
    return smooth


def find_cap(values: Sequence[float]) -> float:
    """The largest value that belongs in the frame: infinite unless a few positive values tower over all others."""
    ordered = sorted(values)
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    towering = len(ordered) >= 10 and ordered[0] >= 0 and usual > 0 and ordered[-1] > OUTLIER_FACTOR * usual
    return OUTLIER_FACTOR * usual if towering else math.inf


def _range_y(values: Sequence[float], *, share: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    if share:
        low, high = 0.0, max(high, 0.05)
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = (0.0 if low >= 0 else low - margin), high + margin
    return low, high


def draw_lines(series: Sequence[Series], *, title: str, share: bool = False, smooth: bool = True, height: int = 188) -> Markup:
    """Lines over steps: each point faint, a running mean on top, the last running mean written at its end.

    A few points that tower over all others (`find_cap`) are left out of frame and means, and counted below the frame.

    Args:
      series: what to draw; series without a finite point are left out.
      title: spoken name of the picture.
      share: values are shares of one: the axis starts at 0 and ends at 1 or earlier.
      smooth: whether to draw the running mean; without it the points themselves are joined.
      height: of the view box.
    Returns: an `<svg>`, or empty markup when there is nothing to draw.
    """
    drawn = [(one, one.points()) for one in series]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return Markup("")
    cap = find_cap([y for _, points in drawn for _, y in points])
    outside = [y for _, points in drawn for _, y in points if y > cap]
    drawn = [(one, kept) for one, points in drawn if (kept := [(x, y) for x, y in points if y <= cap])]
    low, high = _range_y([y for _, points in drawn for _, y in points], share=share)
    ticks = choose_ticks(low, high)
    if share:
        ticks = [tick for tick in ticks if tick <= 1.0 + 1e-9]
    low, high = min(ticks[0], low), max(ticks[-1], high)
    first = min(points[0][0] for _, points in drawn)
    last = max(points[-1][0] for _, points in drawn)
    left, right, top, bottom = 44.0, WIDTH - 46.0, 10.0, height - 24.0

    def x_of(x: float) -> float:
        return left + (x - first) / ((last - first) or 1.0) * (right - left)

    def y_of(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid{" zero" if tick == 0 else ""}" x1="{left}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{left - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    marks = [(first, "start"), ((first + last) / 2, "middle"), (last, "end")] if last > first else [(first, "start")]
    for x, anchor in marks:
        if not (outside and anchor == "middle"):
            parts.append(f'<text class="tick" x="{x_of(x):.1f}" y="{height - 8}" text-anchor="{anchor}">{format_number(round(x))}</text>')
    if outside:
        note = f"↑ {len(outside)} beyond the frame, up to {format_number(max(outside))}"
        parts.append(f'<text class="tick" x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">{note}</text>')

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)

    ends, summary = [], []
    for one, points in drawn:
        binned = bin_points(points)
        window = max(1, len(binned) // 12) if smooth else 1
        line = smooth_points(binned, window=window)
        ink, end = escape(one.ink), line[-1][1]
        if window > 1:
            parts.append(f'<polyline class="raw ink-{ink}" points="{path(binned)}"/>')
        parts.append(f'<polyline class="line ink-{ink}" points="{path(line)}"/>')
        parts.append(f'<circle class="dot ink-{ink}" cx="{x_of(line[-1][0]):.1f}" cy="{y_of(end):.1f}" r="3"/>')
        ends.append((y_of(end), ink, end))
        summary.append(f"{one.label}: {format_number(points[0][1])} at step {points[0][0]:g}, about {format_number(end)} at the end")
    below = -math.inf
    for y, ink, end in sorted(ends):
        below = max(y + 4, below + 13)  # labels of lines that end together are pushed apart
        parts.append(f'<text class="end ink-{ink}" x="{right + 7}" y="{below:.1f}">{format_number(end)}</text>')
    label = escape(f"{title}. {'; '.join(summary)}.")
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def draw_intervals(rows: Sequence[Interval], *, title: str, bound: float | None = None, bound_label: str = "oracle") -> Markup:
    """A dot and a 95% interval a row, means written at the right; `bound` is a labelled vertical line.

    Rows keep their order. Returns: an `<svg>`, or empty markup when there are no rows.
    """
    if not rows:
        return Markup("")
    spacing, top, left, right = 25, 24.0, 92.0, WIDTH - 44.0
    bottom = top + spacing * len(rows)
    height = bottom + 22
    values = [value for row in rows for value in (row.low, row.mean, row.high)] + ([] if bound is None else [bound])
    ticks = choose_ticks(min(0.0, *values), max(values), count=4)
    if max(values) <= 1.0:
        ticks = [tick for tick in ticks if tick <= 1.0 + 1e-9]
    low, high = ticks[0], max(ticks[-1], *values)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x_of(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{format_number(tick)}</text>')
    if bound is not None:
        x = x_of(bound)
        side = "end" if x > (left + right) / 2 else "start"
        parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom}"/>')
        parts.append(
            f'<text class="bound-label" x="{x + (6 if side == "end" else -6):.1f}" y="{top - 10}" text-anchor="{side}">'
            f"{escape(bound_label)} {bound:.3f}</text>"
        )
    for index, row in enumerate(rows):
        y = top + spacing * (index + 0.5)
        ink, weight = escape(row.ink), "" if row.hollow else " strong"
        name = row.label if len(row.label) <= 13 else row.label[:12] + "…"
        tip = f"{row.label}: {row.mean:.3f}, 95% interval {row.low:.3f} to {row.high:.3f}"
        parts.append(f"<g><title>{escape(tip)}</title>")
        parts.append(f'<text class="row-label{weight}" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line class="whisker ink-{ink}" x1="{x_of(row.low):.1f}" x2="{x_of(row.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{"hollow" if row.hollow else "dot"} ink-{ink}" cx="{x_of(row.mean):.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="row-value{weight}" x="{WIDTH - 2}" y="{y + 4}" text-anchor="end">{row.mean:.3f}</text></g>')
    summary = "; ".join(f"{row.label} {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in rows)
    label = escape(f"{title}. {summary}{'' if bound is None else f'; {bound_label} {bound:.3f}'}.")
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def draw_difference(difference: float, low: float, high: float, *, least: float, most: float, ink: str) -> Markup:
    """A small interval beside a zero line, for one row of a table; all rows share the scale from `least` <= 0 to `most` >= 0."""
    width, margin = 150, 7

    def x_of(value: float) -> float:
        return margin + (value - least) / ((most - least) or 1.0) * (width - 2 * margin)

    return Markup(
        f'<svg class="difference" viewBox="0 0 {width} 16" width="{width}" height="16" aria-hidden="true">'
        f'<line class="zero" x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="-8" y2="24"/>'
        f'<line class="whisker ink-{escape(ink)}" x1="{x_of(low):.1f}" x2="{x_of(high):.1f}" y1="8" y2="8"/>'
        f'<circle class="dot ink-{escape(ink)}" cx="{x_of(difference):.1f}" cy="8" r="4"/></svg>'
    )


@dataclasses.dataclass(frozen=True)
class Mark:
    """A labelled value on a histogram's axis."""

    label: str
    ink: str
    value: float


def draw_histogram(
    edges: Sequence[float], counts: Sequence[int], *, title: str, ink: str, marks: Sequence[Mark] = (), height: int = 188
) -> Markup:
    """Bars of `counts` between `edges` (one more than counts), and a vertical line for each mark.

    Returns: an `<svg>`, or empty markup when nothing was counted.
    """
    if not sum(counts):
        return Markup("")
    left, right, top, bottom = 40.0, WIDTH - 12.0, 16.0 + 15 * len(marks), height - 24.0
    low, high, most = edges[0], edges[-1], max(counts)

    def x_of(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (right - left)

    def y_of(count: float) -> float:
        return bottom - count / ticks[-1] * (bottom - top)

    ticks = [tick for tick in choose_ticks(0, most, count=3) if tick == round(tick)]
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for (start, end), count in zip(itertools.pairwise(edges), counts, strict=True):
        if count:
            x, width, y = x_of(start) + 0.4, max(x_of(end) - x_of(start) - 0.8, 0.8), y_of(count)
            tip = f"{format_number(start)} to {format_number(end)}: {count:,}"
            parts.append(f'<rect class="column ink-{escape(ink)}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{bottom - y:.1f}">')
            parts.append(f"<title>{escape(tip)}</title></rect>")
    for value in (low, (low + high) / 2, high):
        anchor = "start" if value == low else "end" if value == high else "middle"
        parts.append(f'<text class="tick" x="{x_of(value):.1f}" y="{height - 8}" text-anchor="{anchor}">{format_number(value)}</text>')
    # The outermost mark is labelled highest: a label points to the middle and would lie across the lines of others.
    for row, mark in enumerate(sorted(marks, key=lambda mark: -abs(x_of(mark.value) - (left + right) / 2))):
        x, y = x_of(mark.value), 12.0 + 15 * row
        side = "end" if x > (left + right) / 2 else "start"
        parts.append(f'<line class="mark ink-{escape(mark.ink)}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8:.1f}" y2="{bottom}"/>')
        parts.append(
            f'<text class="end ink-{escape(mark.ink)}" x="{x + (-5 if side == "end" else 5):.1f}" y="{y:.1f}" text-anchor="{side}">'
            f"{escape(mark.label)} {format_number(mark.value)}</text>"
        )
    marked = "".join(f"; {mark.label} at {format_number(mark.value)}" for mark in marks)
    label = escape(f"{title}: {sum(counts):,} values from {format_number(low)} to {format_number(high)}{marked}.")
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def draw_radar(axes: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], *, title: str, rings: Sequence[float]) -> Markup:
    """A polygon a series of (label, ink, a value an axis), the first axis at the top; `rings` are the ticks, the first at the centre."""
    size, middle, radius = 268, WIDTH / 2, 96.0
    low, high = rings[0], rings[-1]

    def place(axis: int, value: float) -> tuple[float, float]:
        angle, reach = 2 * math.pi * axis / len(axes), (value - low) / (high - low) * radius
        return middle + reach * math.sin(angle), size / 2 - reach * math.cos(angle)

    def outline(values: Sequence[float]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(axis, value) for axis, value in enumerate(values)))

    parts = [f'<polygon class="ring" points="{outline([ring] * len(axes))}"/>' for ring in rings[1:]]
    for axis, name in enumerate(axes):
        x, y = place(axis, high)
        parts.append(f'<line class="grid" x1="{middle}" y1="{size / 2}" x2="{x:.1f}" y2="{y:.1f}"/>')
        x, y = place(axis, high + 0.09 * (high - low))
        anchor = "middle" if abs(x - middle) < 1 else "start" if x > middle else "end"
        parts.append(f'<text class="row-label" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    for ring in rings:
        x, y = place(0, ring)
        parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{y + 10:.1f}">{format_number(ring)}</text>')
    tips = []
    for label, ink, values in series:
        tip = f"{label}: " + ", ".join(f"{name} {format_number(value)}" for name, value in zip(axes, values, strict=True))
        tips.append(tip)
        parts.append(f'<polygon class="area ink-{escape(ink)}" points="{outline(values)}"><title>{escape(tip)}</title></polygon>')
        parts += [
            f'<circle class="dot ink-{escape(ink)}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in (place(axis, value) for axis, value in enumerate(values))
        ]
    label = escape(f"{title}. {'; '.join(tips)}.")
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {size}" role="img" aria-label="{label}">{"".join(parts)}</svg>')
