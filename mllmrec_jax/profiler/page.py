"""A profile as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from mllmrec_jax.pages.render import render_template
from mllmrec_jax.profiler.phases import KINDS, PHASES
from mllmrec_jax.profiler.text import describe_profile, format_bytes, format_ms, format_share, list_large_rows

SHADES = {name: f"k{index}" for index, name in enumerate(KINDS)} | {name: f"p{index}" for index, name in enumerate(PHASES)}


def _shade(name: str) -> str:
    if name.startswith("host: "):
        return SHADES["host"]
    return SHADES.get(name, SHADES["idle"])


def _view_shares(shares: Mapping[str, float], step_s: float) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "share": format_share(share),
            "time": format_ms(share * step_s),
            "width": f"{share * 100:.3f}",
            "shade": _shade(name),
        }
        for name, share in shares.items()
    ]


def _tile(label: str, value: str, below: str) -> dict[str, str]:
    return {"label": label, "value": value, "below": below}


def draw_lanes(lanes: Mapping[str, Sequence[tuple[float, float]]], *, seconds: float) -> Markup:
    """An SVG of one step: a lane a name, stretches from 0 to 1 of the step."""
    if not lanes:
        return Markup("")
    width, left, right, height = 1100, 150, 8, 22
    order = {name: index for index, name in enumerate(PHASES)}
    names = sorted(lanes, key=lambda name: (name not in order, order.get(name, 0), name))
    parts = []
    for row, name in enumerate(names):
        y = row * height
        parts.append(f'<text class="lane" x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y + height}" y2="{y + height}"/>')
        for start, end in lanes[name]:
            x, wide = left + start * (width - left - right), max(0.6, (end - start) * (width - left - right))
            tip = f"{name}: {format_ms(start * seconds)} to {format_ms(end * seconds)}"
            box = f'x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{height - 6}"'
            parts.append(f'<rect class="{_shade(name)}" {box}><title>{escape(tip)}</title></rect>')
    bottom = len(names) * height
    for tick in range(5):
        x = left + tick / 4 * (width - left - right)
        anchor = "start" if tick == 0 else "end" if tick == 4 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{format_ms(tick / 4 * seconds)}</text>')
    label = escape("One step, from left to right: " + ", ".join(names))
    return Markup(f'<svg class="plot" viewBox="0 0 {width} {bottom + 22}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def render_page(profile: Mapping[str, Any], lanes: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """`breakdown.html`."""
    breakdown, memory = profile["breakdown"], profile["memory"]
    step_s = breakdown["step_s"]
    rows = [
        {**row, "time": format_ms(row["seconds"]), "percent": format_share(row["share"]), "shade": _shade(row["kind"])}
        for row in list_large_rows(breakdown)
    ]
    return render_template(
        "mllmrec_jax.profiler",
        "breakdown.html.jinja",
        styles=["breakdown.css"],
        name=profile["name"],
        posters={},
        profile=profile,
        findings=describe_profile(dict(profile)),
        tiles=[
            _tile("Step", format_ms(step_s), f"{format_ms(profile['untraced_s'])} without a trace"),
            _tile("No program ran", f"{breakdown['idle_share']:.2%}", "of the device's time"),
            _tile("Compiled meanwhile", str(len(profile["compilations"])), "programs"),
            _tile("Memory planned", format_bytes(max(memory["totals"].values(), default=0)), "of one device, at most"),
        ],
        lanes=draw_lanes(lanes, seconds=breakdown["steps"][-1]["seconds"]),
        shares=[
            ("By phase", _view_shares(breakdown["phases"], step_s)),
            ("By kind of operation", _view_shares(breakdown["kinds"], step_s)),
        ],
        rows=rows,
        operations=[
            {**row, "time": format_ms(row["seconds"]), "percent": format_share(row["share"]), "runs": f"{row['count']:g}"}
            for row in breakdown["operations"]
        ],
        memory={
            program: [(owner, format_bytes(size)) for owner, size in owners.items() if size]
            + [("all", format_bytes(memory["totals"][program]))]
            for program, owners in memory["owners"].items()
        },
        programs=[
            {
                **one,
                "temp": format_bytes(one["memory"]["temp"]),
                "largest": [(format_bytes(b["bytes"]), b["shape"], b["scope"] or b["instruction"]) for b in one["largest_buffers"][:3]],
                "received": format_bytes(sum(c["received"] for c in one["collectives"])),
                "gflops": f"{one['flops'] / 1e9:,.3g}",
                "accessed": format_bytes(one["bytes_accessed"]),
            }
            for one in profile["programs"]
        ],
    )
